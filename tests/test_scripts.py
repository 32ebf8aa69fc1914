"""The scripts as a new user meets them: help, imports, and adding a method."""

import ast
import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from fresh import printed
from test_check_method import write_readme_example

import active_learning
import cache_embeddings
import eval as evaluation
import train
from utils.config import HOME, known

SCRIPTS = ["cache_embeddings.py", "train.py", "eval.py", "uncertainty.py", "report.py"]
# What takes long to load, scipy.stats and scipy.optimize included, and is not needed to read flags.
HEAVY = ("torch", "scipy", "matplotlib", "open_clip", "transformers", "sklearn", "pandas", "jinja2")


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_end_with_one_sentence_and_code_2(script, tmp_path):
    """Started from anywhere, and with a foreign package called datasets in the way."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    more = {"cache_embeddings.py": [], "report.py": [], "uncertainty.py": ["--method", "clip", "a photo"]}
    flags = ["--dataset", "nowhere", *more.get(script, ["--method", "clip"])]
    done = run(HOME / script, *flags, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script.removesuffix(".py")).main(["--help"])
    assert stop.value.code == 0 and "--dataset" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scripts", "heavy"),
    [
        ("train, eval", "open_clip matplotlib sklearn pandas scipy.stats scipy.optimize"),
        ("report", "open_clip torch sklearn pandas"),
        ("reporting.terminal", "open_clip torch matplotlib"),
    ],
)
def test_scripts_import_no_more_than_they_need(scripts, heavy):
    code = f"import sys, {scripts}; print([name for name in '{heavy}'.split() if name in sys.modules])"
    assert (run("-c", code, PYTHONPATH=str(HOME)).stdout if "torch" in heavy else printed(code)) == "[]\n"


AS_SCRIPT = """
import runpy, sys
path, *commands = sys.argv[1:]
for flags in commands:
    sys.argv = [path, *flags.split()]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        print("ends with", stop.code, *(name for name in {heavy} if name in sys.modules), file=sys.stderr)
"""
NOWHERE = {  # report.py looks for results of any name
    "active_learning.py": "--dataset nowhere --pool train --target test",
    "cache_embeddings.py": "--dataset nowhere",
    "eval.py": "--dataset nowhere --method clip",
    "reproduce.py": "--datasets nowhere",
    "train.py": "--dataset coco --method nowhere",
    "uncertainty.py": "--dataset coco --method nowhere cat",
}


@pytest.mark.parametrize("script", sorted(path.name for path in HOME.glob("*.py")))
def test_flags_are_read_before_anything_heavy_loads(script):
    """A call for help, a mistake in a flag, and a name that there is not."""
    commands = ["--help", "--hlep", *([NOWHERE[script]] if script in NOWHERE else [])]
    done = run("-c", AS_SCRIPT.format(heavy=HEAVY), HOME / script, *commands, PYTHONPATH=str(HOME))
    ends = [line for line in done.stderr.splitlines() if line.startswith("ends with")]
    assert ends == [f"ends with {code}" for code in (0, 2, 2)[: len(commands)]], done.stderr


def test_ctrl_c_while_libraries_load_is_one_line():
    for script in HOME.glob("*.py"):
        imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert ast.unparse(imports[0]) == "import utils.interrupt", script
    done = run("-c", "import utils.interrupt; raise KeyboardInterrupt", PYTHONPATH=str(HOME))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "-c: interrupted.\n")


PRINTS = """
from utils.errors import exits_cleanly
@exits_cleanly()
def main(argv):
    for _ in range(5000): print('0.25 \u2013 \u65e5')
main([])
"""


def test_a_terminal_without_a_letter_shows_another():
    done = run("-c", PRINTS, PYTHONPATH=str(HOME), PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr, done.stdout[:9]) == (0, "", "0.25 ? ?\n")


@pytest.mark.parametrize("printed", [PRINTS, PRINTS.replace("5000", "1")], ids=["much", "little"])
def test_a_reader_that_has_enough_ends_it_silently(printed):
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, "-c", printed], os.environ | {"PYTHONPATH": str(HOME)}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("split", ["../shapes-tiny/val", "..", ".hidden", "a\\b", "val/"])
def test_no_name_is_a_path(world, refusal, split):
    data = ["--dataset", "shapes", "--quiet"]
    run = [*data, "--method", "clip"]
    for script, *flags in (
        (cache_embeddings, *data, "--splits", split),
        (train, *run, "--set", f"data.train_split={split}"),
        (evaluation, *run, "--split", split),
        (active_learning, *data, "--pool", split, "--target", "test", "--budgets", "2"),
    ):
        assert f"a split names a folder: it cannot be {split!r}" in refusal(script.main, *flags)
    for script in (train, evaluation):
        assert "--tag names a folder" in refusal(script.main, *run, "--tag", split)
    assert {path.name for path in world.iterdir()} == {"data", "embeddings"}


def test_a_method_is_one_file_and_one_yaml(world, monkeypatch, capsys, one_figure):
    """README's example, a YAML and a module that nothing names, is in --help, train, evaluate and in the report."""
    home = world / "home"
    shutil.copytree(HOME / "configs", home / "configs")
    write_readme_example(home, monkeypatch)
    monkeypatch.setattr("utils.config.HOME", home)
    assert "mine" in known("methods")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert " mine," in " ".join(capsys.readouterr().out.split())
    train.main(["--dataset", "shapes", "--method", "mine", "--quiet", "--val-fraction", "0.1", "--set", "optim.lr=9"])
    assert "the untrained start is kept" in capsys.readouterr().out
    evaluation.main(["--dataset", "shapes", "--method", "mine", "--quiet"])
    result = json.loads((world / "results/shapes/shapes-tiny/mine/seed0/shapes-retrieval.json").read_text())
    assert len(result["text_to_image"]["uncertainty"]["query"]["levels"]["count"]) == 10
    # Training has no part in this uncertainty, so it is that of the method although the start was kept.
    assert not result["untrained"]
    import report

    capsys.readouterr()
    report.main(["--dataset", "shapes"])
    with open("results/shapes/table.csv", newline="") as file:
        figures = {(row["row"], row["column"]) for row in csv.DictReader(file)}
    assert ("mine", "text_to_image_query_auroc") in figures and ("mine", "query_spearman") in figures
    assert re.search(r"\bmine\b", capsys.readouterr().out)
    assert ">mine<" in (world / "results/shapes/report.html").read_text()
