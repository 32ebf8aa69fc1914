"""Kills at random moments, in every script: files are whole at any time, and the end is that of an unbroken run.

Slow: `make test-faults`.
"""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from check_method import SMALL_WORLD
from conftest import forked
from test_active_learning import FLAGS, SIZES, write_cache

import active_learning
import cache_embeddings
import eval as evaluation
import report
import reproduce
import train
from datasets import blocks

pytestmark = pytest.mark.slow

KILLS = 17  # of each stage, 102 in all
SHAPES = ["--dataset", "shapes", "--quiet"]
SHORT = ["--set", "train.epochs=6", "model.width=32"]
STAGES = {  # in this order: each needs what those before it have made
    "cache": (
        cache_embeddings,
        [*SHAPES, "--device", "cpu", "--features", "pooled", "--set", *SMALL_WORLD, "encoder.batch_size=25"],
    ),
    "train": (train, [*SHAPES, "--device", "cpu", "--method", "pcmepp", *SHORT, "train.save_every=0"]),
    "eval": (evaluation, [*SHAPES, "--device", "cpu", "--method", "pcmepp", "--score", "both"]),
    "reproduce": (
        reproduce,
        ["--datasets", "shapes", "--methods", "asymvlm-psd", "pfe", "--devices", "cpu", "cpu", "--quiet", *SHORT],
    ),
    "active_learning": (active_learning, [*FLAGS, "--seeds", "0", "--strategies", "all", "--quiet"]),
    "report": (report, SHAPES),
}
FOLDERS = "embeddings", "checkpoints", "results"


def made():
    """What lies in the working folder: {path: bytes}, of a log without its seconds, without locks and left-overs."""
    files = {}
    for path in (path for folder in FOLDERS for path in sorted(Path(folder).rglob("*")) if path.is_file()):
        if path.suffix == ".lock" or path.name.endswith(".part"):
            continue
        files[str(path)] = path.read_bytes()
        if path.name == "log.csv":
            rows = csv.DictReader(path.read_text().splitlines())
            files[str(path)] = [{name: row[name] for name in row if name != "seconds"} for row in rows]
    return files


def must_be_whole():
    """Read every file under its final name, as the suite or another program would."""
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".npy": np.load,
        ".npz": lambda path: [array.shape for array in dict(np.load(path)).values()],
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".png": lambda path: PIL.Image.open(path).load(),
        ".pdf": lambda path: path.read_bytes().rstrip().endswith(b"%%EOF") or pytest.fail(f"{path} is cut off"),
        ".html": lambda path: path.read_text().rstrip().endswith("</html>") or pytest.fail(f"{path} is cut off"),
    }
    for path in (path for folder in FOLDERS for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix in readers and not path.name.endswith(".part"):
            readers[path.suffix](path)


def kill(process, whole):
    """Kill a process, or its whole group as a cluster does; nothing that it started may outlive it."""
    with contextlib.suppress(ProcessLookupError):  # it has not yet made its group
        if whole:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        pytest.fail("a process that it started is left")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """An unbroken run of all stages: {stage: (the folder before it, what lies in it afterwards, its seconds)}."""
    folder, stages = tmp_path_factory.mktemp("unbroken"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("grid.workers.START", "fork")
        patch.setattr(blocks, "BLOCK", 50)
        for seed, split in enumerate(SIZES):
            write_cache(split, seed)
        for stage, (script, command) in STAGES.items():
            before = shutil.copytree(folder, tmp_path_factory.mktemp("before") / stage)
            started = time.monotonic()
            process = forked(script.main, command)
            process.join()
            assert process.exitcode == 0
            stages[stage] = before, made(), time.monotonic() - started
        yield stages


@pytest.mark.parametrize("stage", STAGES)
def test_kills_leave_no_trace(unbroken, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("grid.workers.START", "fork")
    monkeypatch.setattr(blocks, "BLOCK", 50)
    before, expected, seconds = unbroken[stage]
    script, command = STAGES[stage]
    chance, kills, runs = random.Random(stage), 0, 0
    while kills < KILLS or runs == 0:
        monkeypatch.chdir(shutil.copytree(before, tmp_path / str(runs)))
        runs += 1
        while True:
            process = forked(script.main, command)
            process.join(chance.uniform(0, seconds) if kills < KILLS else None)
            if not process.is_alive():
                break
            kill(process, whole=chance.random() < 0.5)
            kills += 1
            must_be_whole()
        assert process.exitcode == 0
        ours = made()
        assert ours.keys() == expected.keys()
        assert not [name for name in ours if ours[name] != expected[name]]
    print(f"{stage}: {kills} kills in {runs} runs")
