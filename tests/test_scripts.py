"""The scripts as a new user meets them: help, imports, and adding a method."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import eval as evaluation
import train
from utils.config import HOME, known

SCRIPTS = ["cache_embeddings.py", "train.py", "eval.py", "uncertainty.py", "report.py"]


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_foreign_datasets_package_does_no_harm(script, tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    done = run(HOME / script, "--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "--dataset" in done.stdout


@pytest.mark.parametrize(("scripts", "heavy"), [("train, eval", "open_clip matplotlib"), ("report", "open_clip torch")])
def test_scripts_import_no_more_than_they_need(scripts, heavy):
    code = f"import sys, {scripts}; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = run("-c", code, PYTHONPATH=str(HOME))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_end_with_one_sentence_and_code_2(script, tmp_path):
    rest = {"cache_embeddings.py": [], "report.py": []}.get(script, ["--method", "clip"])
    done = run(HOME / script, "--dataset", "nowhere", *rest, *(["a photo"] if script == "uncertainty.py" else []))
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_method_is_one_file_and_one_yaml(world, monkeypatch, capsys):
    """A YAML and a module that nothing names are in --help, train, evaluate and in the report."""
    home = world / "home"
    shutil.copytree(HOME / "configs", home / "configs")
    (home / "configs/methods/raw-length.yaml").write_text("model: {adaptor: raw_length.RawLength}\nscore: similarity\n")
    (home / "raw_length.py").write_text(
        "from models.base import Adaptor\n\n\n"
        "class RawLength(Adaptor):\n"
        "    def __init__(self, dim):\n        super().__init__()\n\n"
        "    def adapt_text(self, text):\n"
        "        return super().adapt_text(text)._replace(uncertainty=-text.norm(dim=-1))\n"
    )
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr("utils.config.HOME", home)
    assert "raw-length" in known("methods")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "raw-length" in capsys.readouterr().out
    for script in (train, evaluation):
        script.main(["--dataset", "shapes", "--method", "raw-length", "--quiet"])
    result = json.loads((world / "results/shapes/shapes-tiny/raw-length/seed0/shapes-retrieval.json").read_text())
    assert len(result["text_to_image"]["uncertainty"]["query"]["levels"]["count"]) == 10
    import report

    report.main(["--dataset", "shapes"])
    assert "raw-length" in capsys.readouterr().out
    assert "raw-length" in (world / "results/shapes/report.html").read_text()
