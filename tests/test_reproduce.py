"""The grid: finished cells are skipped, a failing cell does not stop the others, and kills do no harm."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import draw_one_figure, forked, handlers_kept

import eval as evaluation
import models
import reproduce
import train
from grid.workers import Workers, without_signals
from utils.config import HOME

SETTINGS = ["--set", "train.epochs=2", "model.width=32"]
LONG = ["--set", "train.epochs=500", "train.save_every=0"]
METHODS = ["asymvlm-psd", "pfe"]
CELLS = [f"shapes/shapes-tiny/{method}/seed{seed}" for seed in (0, 1) for method in METHODS]


def command(*more, methods=METHODS, devices=("cpu",), settings=SETTINGS):
    return ["--datasets", "shapes", "--methods", *methods, "--seeds", "0", "1", "--devices", *devices, *more, *settings]


def files(*folders):
    """Bytes of all results and weights by path."""
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in (".json", ".npz", ".pt")]
    return {str(path): path.read_bytes() for path in paths}


def stamps():
    return {str(path): path.stat().st_mtime_ns for path in Path("results").rglob("*.json")}


def start_by_fork(patch):
    """Start workers by fork, which skips seconds of imports."""
    assert train and evaluation
    patch.setattr("grid.workers.START", "fork")


@pytest.fixture
def forks(monkeypatch):
    start_by_fork(monkeypatch)


pytestmark = pytest.mark.usefixtures("one_figure")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes that are started anew


@pytest.fixture(scope="module")
def unbroken(small_world, tmp_path_factory):
    """A folder in which the grid ran without interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "embeddings").symlink_to(small_world / "embeddings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start_by_fork(patch)
        draw_one_figure(patch)
        reproduce.main(command("--quiet"))
    return folder


@pytest.fixture
def made(unbroken, tmp_path, monkeypatch):
    """A copy of `unbroken`, with its files' times, as working folder."""
    folder = shutil.copytree(unbroken, tmp_path / "made", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def same(unbroken, monkeypatch):
    """Assert that results, tables and weights of the working folder are those of the unbroken grid."""

    def check():
        ours = files("results", "checkpoints"), Path("results/shapes/table.md").read_bytes()
        with monkeypatch.context() as patch:
            patch.chdir(unbroken)
            theirs = files("results", "checkpoints"), Path("results/shapes/table.md").read_bytes()
        assert ours[0].keys() == theirs[0].keys() and len(ours[0]) == 12
        assert [name for name in ours[0] if ours[0][name] != theirs[0][name]] == []
        assert ours[1] == theirs[1]

    return check


def plan(capsys, *argv):
    """The lines of --dry-run: all but the last, and the last."""
    reproduce.main([*argv, "--dry-run"])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, last


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(list(argv))
    captured = capsys.readouterr()
    assert stop.value.code == 1, captured.err
    return captured.out, captured.err.splitlines()


def test_what_is_done_is_left_alone(made, monkeypatch, capsys):
    monkeypatch.setattr("grid.workers._Worker.give", None)
    before = stamps(), files("results", "checkpoints")
    assert len(before[0]) == 4
    assert plan(capsys, *command()) == ([f"done   {name}" for name in CELLS], "4 of 4 cells are done.")
    (made / "results/shapes/report.html").unlink()
    reproduce.main(command())
    assert (made / "results/shapes/report.html").is_file()
    out = capsys.readouterr().out
    assert "asymvlm-psd" in out and out.endswith("4 cells: 4 were done, 0 are made, 0 failed\n")
    assert (stamps(), files("results", "checkpoints")) == before


def test_a_plan_does_nothing(world, capsys):
    lines, last = plan(capsys, *command("--presets", "default", "official"))
    names = [CELLS[0], CELLS[1], CELLS[1].replace("pfe", "pfe+official")]  # asymvlm-psd has no such preset
    assert lines == [f"to do  {name[:-1]}{seed} on shapes: not trained" for seed in (0, 1) for name in names]
    assert last == "0 of 6 cells are done."
    lines, _ = plan(capsys, *command("--evaluate-on", "shapes", "flickr30k", methods=["clip"]))
    assert lines[0] == "to do  embeddings/flickr30k/shapes-tiny"
    assert lines[2] == "to do  shapes/shapes-tiny/clip/seed0 on flickr30k: no embeddings"
    assert sorted(path.name for path in world.iterdir()) == ["data", "embeddings"]


def test_embeddings_of_ones_own_leave_out_what_needs_more(world, capsys):
    every, _ = plan(capsys, "--datasets", "embeddings")
    assert any("/clip/" in line for line in every) and not any("/bayesvlm/" in line for line in every)
    named, _ = plan(capsys, "--datasets", "embeddings", "--methods", "bayesvlm")
    assert named[-1].startswith("to do  embeddings/given/bayesvlm/seed0")
    shapes, _ = plan(capsys, "--datasets", "shapes")
    assert any("/bayesvlm/" in line for line in shapes)


def test_what_is_not_as_asked_for_is_noticed(made, capsys):
    def why(*argv):
        (line,) = [line for line in plan(capsys, *(argv or command()))[0] if CELLS[0] in line]
        return line.partition(": ")[2]

    assert why(*command(settings=[*SETTINGS, "train.patience=3"])) == "its run has another train.patience"
    assert why(*command("--uncer_levels", "5")) == "its result has another uncer_levels"
    assert why(*command("--score", "similarity")) == "its result has another config.score"
    assert why(*command("--score", "both")) == "its result has another choice of scores"
    assert why(*command("--split", "val")) == "" and why(*command("--split", "test")) == "no embeddings"
    assert why(*command("--score", "log_likelihood")) == why(*command("--tag", "", "--overwrite")) == ""
    result = made / "results" / CELLS[0] / "shapes-retrieval.json"
    whole, arrays = result.read_text(), result.with_suffix(".npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], "", "[]", "{}", whole.replace('"checkpoint"', '"check"')):
        result.write_text(damaged)
        assert why() == "its result is damaged"
    result.write_text(whole.replace('"fingerprint": "', '"fingerprint": "0'))
    assert why() == "its result has another fingerprint"
    result.write_text(whole)
    result.with_suffix(".npz").write_bytes(arrays[:-100])
    assert why() == "its result is damaged"
    result.with_suffix(".npz").write_bytes(arrays)
    assert why() == ""
    shutil.copy(made / "checkpoints" / CELLS[2] / "adaptor.pt", made / "checkpoints" / CELLS[0] / "adaptor.pt")
    assert why() == "its result has another checkpoint"
    (made / "checkpoints" / CELLS[0] / "adaptor.pt").write_bytes(b"")
    assert "is damaged or truncated" in why()


def test_a_damaged_result_is_made_again(made, same, forks, capsys):
    before, path = stamps(), f"results/{CELLS[2]}/shapes-retrieval.json"
    Path(path).write_text(Path(path).read_text()[:500])
    reproduce.main(command())
    assert capsys.readouterr().out.endswith("4 cells: 3 were done, 1 are made, 0 failed\n")
    same()
    assert {name for name, stamp in stamps().items() if stamp != before[name]} == {path}


def test_another_configuration_is_refused_unless_told_to_overwrite(made, forks, capsys):
    before, other = stamps(), command(methods=["pfe"], settings=[*SETTINGS, "optim.momentum=0.5"])
    out, lines = fails(capsys, *other)
    assert len(lines) == 2 and out.endswith("2 cells: 0 were done, 0 are made, 2 failed\n")
    assert lines[0].startswith(f"{CELLS[1]}: train.py: checkpoints/") and "another optim.momentum: give" in lines[0]
    assert stamps() == before
    reproduce.main(["--overwrite", *other])
    assert plan(capsys, *other)[1] == "2 of 2 cells are done."
    assert len(stamps().items() & before.items()) == 2


def test_a_failing_cell_keeps_no_other_from_being_made(world, same, forks, capsys):
    """One of three methods has no width, one of two data sets is absent, and two processes share the work."""
    argv = command("--evaluate-on", "shapes", "flickr30k", methods=["clip", *METHODS], devices=["cpu", "cpu"])
    out, lines = fails(capsys, *argv)
    assert out.endswith("6 cells: 0 were done, 0 are made, 6 failed\n")
    messages = dict(line.split(": ", 1) for line in lines)
    assert len(messages) == len(lines) == 7
    assert messages["embeddings/flickr30k/shapes-tiny"].startswith("cache_embeddings.py: ")
    for seed in (0, 1):
        wanted = "train.py: the model of method 'clip' has no key 'width'; it has none."
        assert messages[f"shapes/shapes-tiny/clip/seed{seed}"] == wanted
    for name in CELLS:
        assert messages[name].startswith("eval.py: the cache ") and "flickr30k" in messages[name]
    same()


def test_a_process_that_dies_fails_its_cell_alone(world, forks, monkeypatch, capsys):
    (world / "models").mkdir()
    (world / "models/crash.py").write_text(
        "import os, torch\nfrom models.clip import Clip\n\n\n"
        "class Crash(Clip):\n"
        "    def prepare(self, data, bank, quiet):\n"
        "        if torch.initial_seed() == 0:\n            os.kill(os.getpid(), 9)\n"
        "        if torch.initial_seed() == 1:\n            raise RuntimeError('CUDA error:\\nan odd one')\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(world / "models")])
    settings = ["--seeds", "0", "1", "2", "--set", "model.adaptor=models.crash.Crash"]
    out, (killed, raised) = fails(capsys, *command(methods=["clip"], settings=settings))
    assert out.endswith("3 cells: 0 were done, 1 are made, 2 failed\n")
    assert killed == "shapes/shapes-tiny/clip/seed0: its process was ended by SIGKILL (out of memory?)."
    assert raised.startswith("shapes/shapes-tiny/clip/seed1: train.py: RuntimeError: CUDA error: an odd one (train.py")


def started(argv, until):
    """Start the script as a user does, and wait for a file that matches the pattern `until`."""
    process = subprocess.Popen([sys.executable, HOME / "reproduce.py", *argv], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    appears(until, lambda: process.poll() is None)
    return process


def appears(pattern, alive):
    """Wait for a file that matches the pattern while the process that writes it is alive."""
    deadline = time.monotonic() + 60
    while not list(Path.cwd().glob(pattern)):
        assert alive() and time.monotonic() < deadline
        time.sleep(0.01)


def all_gone(group):
    """Whether all processes of the group end within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.long
def test_a_killed_grid_ends_with_the_same_files_and_repeats_nothing(world, same, forks, capsys):
    process = started(command(), "results/**/*-retrieval.json")
    process.kill()  # not its worker, which has to notice
    assert process.communicate()[1] == ""
    assert all_gone(process.pid)
    before = stamps()
    assert 1 <= len(before) < 4
    reproduce.main(command())
    assert capsys.readouterr().out.endswith(f"4 cells: {len(before)} were done, {4 - len(before)} are made, 0 failed\n")
    same()
    assert before.items() <= stamps().items()


@pytest.mark.long
def test_ctrl_c_ends_all_processes_with_one_sentence(world, forks):
    process = forked(reproduce.main, command(devices=["cpu", "cpu"], settings=LONG), "errors")
    appears("checkpoints/**/state.pt", process.is_alive)
    os.killpg(process.pid, signal.SIGINT)
    process.join(20)
    error = Path("errors").read_text()
    assert process.exitcode == 130, error
    assert error == "reproduce.py: interrupted; the same command resumes from what was last saved.\n"
    assert all_gone(process.pid)


def test_ctrl_c_while_a_process_starts_is_not_lost(forks, monkeypatch):
    start = multiprocessing.context.ForkProcess.start

    def interrupted(process):
        signal.raise_signal(signal.SIGINT)
        start(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", interrupted)
    with handlers_kept(signal.SIGINT), pytest.raises(KeyboardInterrupt), Workers(["cpu"]) as workers:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
        list(workers.run({"job": [("train", ["--dataset", "nowhere"])]}, lambda: None))
    assert workers.workers[0].process is None and not multiprocessing.active_children()


def test_a_signal_that_another_thread_gets_is_handled_after_the_block():
    """As OpenBLAS's threads in the job of a cluster, which block no signal: Python calls the handler in this thread."""
    inside, states, over = True, [], threading.Event()
    thread = threading.Thread(target=over.wait)  # with the mask of now
    thread.start()
    with handlers_kept(signal.SIGUSR2):
        signal.signal(signal.SIGUSR2, lambda *_: states.append(inside))
        with without_signals("SIGUSR2"):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
            inside = False
    over.set()
    thread.join()
    assert states == [False] and signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_mistakes_end_before_anything_is_done(world, refusal):
    for argv, message in [
        (["--datasets", "nowhere"], "there is no dataset 'nowhere'; there is"),
        (["--evaluate-on", "nowhere"], "there is no dataset 'nowhere'; there is"),
        (["--methods", "clip", "x"], "there is no method 'x'; there is"),
        (["--presets", "x"], "there is no preset 'x' of asymvlm-psd"),
        (["--objectives", "x"], "--objective must be native or infonce"),
        (["--devices", "cpu", "cuda:77"], "device 'cuda:77' does not exist here"),
        (["--set", "optim.nme=1"], "has no key 'nme'"),
    ]:
        assert message in refusal(reproduce.main, "--datasets", "shapes", *argv)
    assert sorted(path.name for path in world.iterdir()) == ["data", "embeddings"]
