"""Odd machines: no make, no home, a read-only suite, names of other systems, other ways to start processes."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from check_method import SMALL_WORLD
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import cache_embeddings
import eval as evaluation
import report
import train
from benchmarks import soak
from datasets.ranks import reported
from grid.workers import Workers
from utils.config import HOME
from utils.errors import UserError
from utils.files import is_name

SHAPES = ["--dataset", "shapes", "--device", "cpu"]
NAME = "größer & \"é'…$HOME;#%+* 日本 🐈 [x] {y}"


def plain(line):
    """A command of the Makefile as a page prints it."""
    return line.replace(".venv/bin/", "").replace(" --quiet", "").strip()


def test_the_commands_of_make_stand_in_the_docs():
    if shutil.which("make") is None:
        pytest.skip("make is absent here")
    command = ["make", "--dry-run", "--always-make", "demo", "test", "docs"]
    printed = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=True).stdout
    commands = {plain(line) for line in printed.splitlines() if not re.match(r"touch |python3 -c |make", line)}
    assert len(commands) == 10
    page = (HOME / "docs" / "machines.md").read_text(encoding="utf-8")
    assert not [command for command in commands if command not in page]


@pytest.mark.long
def test_a_read_only_repository_without_home_or_temporary_folder(small_world, tmp_path):
    """Scripts as processes, in a copy of the suite that cannot be written, from folders of odd and long names."""
    names = [f"{NAME} {'x' * (190 - len(NAME.encode()))}"]
    names.append(unicodedata.normalize("NFD", names[0]))
    assert names[0] != names[1]
    suite, desk = (tmp_path / name for name in names)
    for name in ("configs", "datasets", "grid", "labeling", "metrics", "models", "reporting", "tasks", "utils"):
        shutil.copytree(HOME / name, suite / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in HOME.glob("*.py"):
        shutil.copy(path, suite)
    desk.mkdir()
    for name in ("embeddings", "data"):
        shutil.copytree(small_world / name, desk / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    environment |= {"TMPDIR": str(tmp_path / "nowhere"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(suite)}
    files = sorted(suite.rglob("*"))
    for path in [suite, *files]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        run = [*SHAPES, "--quiet", "--method", "clip"]
        calls = f"import train, eval, sys; sys.argv[0] = train.__file__; train.main({run}); eval.main({run})"
        command = [*unprivileged(), sys.executable, "-c", calls]
        done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(suite.rglob("*")) == files
    finally:
        for path in [suite, *files]:
            path.chmod(path.stat().st_mode | 0o200)
    assert [*(desk / "results").rglob("*-retrieval.json")]


def unprivileged():
    """What to put before a command so that permissions bind root, too; nothing for anyone else."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and setpriv is absent")
    return ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]


@pytest.mark.parametrize("name", ["val", "test+1", "größe", "com", "console", "nul1", "lpt10"])
def test_names_of_files_anywhere(name):
    assert is_name(name, windows=True) and is_name(name, windows=False)


@pytest.mark.parametrize(
    "name", ["NUL", "aux", "con.txt", "com1", "LPT9 .x", "a:b", "a*", "why?", "a.", "a ", '"a"', "<a>", "a|b"]
)
def test_names_of_devices_and_streams_of_windows(name):
    assert not is_name(name, windows=True) and is_name(name, windows=False)


def test_a_platform_without_signal_masks(monkeypatch):
    """Windows: reproduce.py's processes start without them."""
    for name in ("pthread_sigmask", "SIG_BLOCK", "SIG_SETMASK"):
        monkeypatch.delattr(f"signal.{name}")
    monkeypatch.setattr("grid.workers.START", "fork")
    with Workers(["cpu"]) as workers:
        [(name, failures)] = workers.run({"job": [("train", ["--dataset", "nowhere"])]}, lambda: None)
    assert name == "job" and len(failures) == 1 and "train.py: " in failures[0]


def test_what_is_sent_to_processes_can_be_pickled(world, small_world, monkeypatch, one_figure):
    """macOS and Windows spawn processes and send them everything; the tests fork them."""
    for name in ("embeddings", "data"):  # other tests have no split `test`
        (world / name).unlink()
        shutil.copytree(small_world / name, world / name)
    sent = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, dataset, **options):
            sent.append(pickle.dumps((dataset, options["collate_fn"], options["worker_init_fn"])))
            super().__init__(dataset, **options)

    class Pool(ProcessPoolExecutor):
        def __init__(self, count, **options):
            sent.append(pickle.dumps(options))
            super().__init__(count, **options)

    monkeypatch.setattr("torch.utils.data.DataLoader", Loader)
    monkeypatch.setattr("reporting.rendering.ProcessPoolExecutor", Pool)
    few = ["--splits", "test", "--workers", "0", "--set", *SMALL_WORLD, "data.options.test_images=20"]
    cache_embeddings.main([*SHAPES, "--quiet", *few])
    run = [*SHAPES, "--quiet", "--method", "clip"]
    train.main(run)
    evaluation.main(run)
    report.main(["--dataset", "shapes", "--quiet"])
    dataset, *_ = pickle.loads(sent[0])
    assert dataset[0].shape == (3, 64, 64)
    assert len(sent) == 2


def test_the_report_of_torchrun_holds_the_sentence(tmp_path, monkeypatch):
    @reported
    def main(argv):
        raise UserError("größer: mend it.")

    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(UserError):
        main([])
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(UserError):
        main([])
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))  # what torchrun prints
    assert failure.message == "größer: mend it." and failure.timestamp > 1.7e9


def test_soak_tells_growth():
    flat = {"MB": 100.0, "handles": 6, "threads": 2}
    assert not any(grew for *_, grew in soak.compare([flat] * 4).values())
    noisy = [flat | {"MB": 100 + row % 2} for row in range(12)]
    assert soak.compare(noisy)["MB"] == (100.5, 100.5, False)
    leaking = soak.compare([{"MB": 100 + row, "handles": 6 + (row == 5), "threads": 2} for row in range(9)])
    assert leaking == {"MB": (101, 107, True), "handles": (6, 7, True), "threads": (2, 2, False)}
