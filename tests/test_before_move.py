"""Caches, runs and results written before reporting/, labeling/ and models/backbones/ existed work as they did then.

tests/data/before_move/README.md lists the files and the commands that made them. Since then the drawn world has a test
split, `shapes-tiny` was trained without its scenes, and PFE's score was halved.
"""

import csv
import html
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_embeddings
import eval as evaluation
import report
import reproduce
import train
import uncertainty
from utils import config
from utils.config import load_config, make_adaptor

DATA = Path(__file__).parent / "data" / "before_move"
ARCHIVE = DATA / "files.tar.xz"
STATE_DICTS = json.loads((DATA / "state_dicts.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-5  # of float32 arithmetic on another machine, and of a fitted temperature
FITTED = 2e-3  # of what a fitted temperature enters: its search stops at a relative 1e-3
OPTIONS = ["--quiet", "--device", "cpu"]
LEVELS = ["--uncer_levels", "4"]
SIZES = [f"data.options.{option}" for option in ("train_images=32", "val_images=32", "captions_per_image=2")]
TRAINING = ["--set", "model.width=16", "train.epochs=20", "optim.lr=1e-2"]
RUNS = {
    "clip/seed0": ["--method", "clip"],
    "asymvlm-psd/seed0": ["--method", "asymvlm-psd", *TRAINING],
    "asymvlm-psd/seed1": ["--method", "asymvlm-psd", "--seed", "1", *TRAINING],
    "pfe/seed0": ["--method", "pfe", *TRAINING, "train.val_fraction=0"],
}
EVALUATIONS = {
    "clip/seed0/shapes-retrieval": "--dataset shapes --method clip --score both",
    "asymvlm-psd/seed0/shapes-retrieval": "--dataset shapes --method asymvlm-psd --score both",
    "asymvlm-psd/seed1/shapes-retrieval": "--dataset shapes --method asymvlm-psd --seed 1 --score both",
    "asymvlm-psd/seed0/shapes-hierarchy": "--dataset shapes --method asymvlm-psd --task hierarchy",
    "clip/seed0/shapes-objects-classification": (
        "--dataset shapes-objects --train-dataset shapes --method clip --val val"
    ),
}
PROMPTS = [
    "a photo", "a photo of a circle", "a photo of a small red circle",
    "a photo of a small red circle in the center on a black background",
]  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The files of the archive, never written to."""
    folder = tmp_path_factory.mktemp("before_move")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def old(unpacked, tmp_path, monkeypatch):
    """A copy of the files as the working folder."""
    folder = shutil.copytree(unpacked, tmp_path / "old")
    monkeypatch.chdir(folder)
    named = config._named

    def of_then(kind, name):
        values = named(kind, name)
        if (kind, name) == ("datasets", "shapes"):
            del values["data"]["options"]["test_images"]
            values["train"]["epochs"] = 30
        return values

    monkeypatch.setattr(config, "_named", of_then)
    return folder


def contents(*folders):
    """The bytes of all files under folders, without locks."""
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if path.suffix != ".lock"}


def assert_same(value, expected, place="", tolerance=TOLERANCE):
    """Compare nested dicts and lists: floats up to a relative and absolute tolerance, everything else exactly."""
    if isinstance(expected, dict):
        assert value.keys() >= expected.keys(), place  # figures were added since
        for name in expected:
            assert_same(value[name], expected[name], f"{place}/{name}", tolerance)
    elif isinstance(expected, list):
        assert len(value) == len(expected), place
        for i, pair in enumerate(zip(value, expected, strict=True)):
            assert_same(*pair, f"{place}/{i}", tolerance)
    elif isinstance(expected, float):
        if "/temperature/" in place or "/validation/" in place:
            tolerance = FITTED
        assert value == pytest.approx(expected, rel=tolerance, abs=tolerance), place
    else:
        assert value == expected, place


def csv_rows(text):
    """The rows of a table.csv by what they are of: dicts of fields, numbers as floats."""
    rows = csv.DictReader(io.StringIO(text))
    rows = [row | {name: float(row[name]) for name in ("mean", "sd") if row[name]} for row in rows]
    return {tuple(row[name] for name in ("evaluated_on", "task", "table", "row", "column")): row for row in rows}


@pytest.mark.parametrize("dataset", ["shapes", "shapes-colors"])
def test_report_gives_the_same_tables(old, blank_figures, dataset):
    folder = Path("results", dataset)
    before = {name: (folder / name).read_text(encoding="utf-8") for name in ("table.csv", "table.md")}
    report.main(["--dataset", dataset, "--quiet"])
    after = {name: (folder / name).read_text(encoding="utf-8") for name in before}
    # Tables, rows and columns were added since; what was there is the same.
    assert_same(csv_rows(after["table.csv"]), csv_rows(before["table.csv"]), tolerance=1e-12)
    # Arrays did not hold image_of_text, which the bootstrap of the added table groups captions by.
    assert ("captions were drawn singly" in after["table.md"]) == (dataset == "shapes")
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    parts = re.findall(r"^## (.*)$", before["table.md"], re.MULTILINE)
    assert parts and all(f">{part}</h2>" in page for part in parts)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_eval_gives_the_same_figures(old, name):
    path = Path("results/shapes/shapes-tiny", f"{name}.json")
    before = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz")) as file:
        arrays = dict(file)
    path.unlink()
    levels = [] if name.endswith("hierarchy") else LEVELS
    evaluation.main([*EVALUATIONS[name].split(), *levels, *OPTIONS])
    assert_same(json.loads(path.read_text(encoding="utf-8")), before)
    with np.load(path.with_suffix(".npz")) as file:
        for key, expected in arrays.items():
            assert file[key].dtype == expected.dtype, key
            tolerance = FITTED if "_temperature_" in key or "_validation_" in key else TOLERANCE
            np.testing.assert_allclose(file[key], expected, rtol=tolerance, atol=tolerance, err_msg=key)


def test_other_weights_of_the_backbone_are_refused(old, refusal):
    """What was cached with the weights of then is not mixed with those of now."""
    command = ["--dataset", "shapes", "--method", "asymvlm-psd", "--device", "cpu", *PROMPTS]
    assert "weights" in refusal(uncertainty.main, *command)
    before = contents("embeddings")
    assert "a different backbone" in refusal(cache_embeddings.main, "--dataset", "shapes", *OPTIONS, "--set", *SIZES)
    assert contents("embeddings") == before


@pytest.mark.parametrize("name", RUNS)
def test_a_run_counts_as_trained(old, capsys, name):
    before = contents("checkpoints")
    train.main(["--dataset", "shapes", *RUNS[name], *OPTIONS])
    assert capsys.readouterr().out == f"checkpoints/shapes/shapes-tiny/{name}: already trained\n"
    assert contents("checkpoints") == before


@pytest.mark.parametrize("name", STATE_DICTS)
def test_a_state_dict_loads(name):
    """Of every method and preset: its parameters and buffers have the names and shapes that checkpoints have."""
    method, preset = name.split()
    settings = [] if method in ("bayesvlm", "clip") else ["model.width=16"]
    adaptor = make_adaptor(load_config("shapes", method, preset=preset, settings=settings), 24)
    adaptor.load_state_dict({key: torch.zeros(shape) for key, shape in STATE_DICTS[name].items()})


@pytest.mark.parametrize(
    ("methods", "flags", "names"),
    [
        (["clip"], [], ["clip/seed0"]),
        (["asymvlm-psd"], ["--seeds", "0", "1", *TRAINING], ["asymvlm-psd/seed0", "asymvlm-psd/seed1"]),
        (["pfe"], [*TRAINING, "train.val_fraction=0"], ["pfe/seed0"]),
    ],
)
def test_a_cell_of_the_grid_counts_as_done(old, capsys, methods, flags, names):
    grid = ["--datasets", "shapes", "--methods", *methods, "--score", "both", *LEVELS]
    reproduce.main([*grid, "--dry-run", *flags])
    done = [f"done   shapes/shapes-tiny/{name}" for name in names]
    assert capsys.readouterr().out.splitlines() == [*done, f"{len(names)} of {len(names)} cells are done."]
