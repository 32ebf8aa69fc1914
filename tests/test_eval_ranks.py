"""Evaluation by several processes: the bytes of one, and one sentence where one of them is killed."""

import functools
import os
import signal

import numpy as np
import pytest
import torch
from conftest import forked_ranks

import eval as evaluation
import tasks.retrieval
import train
from metrics import retrieval, score_tiles

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

RUN = ["--dataset", "shapes", "--method", "asymvlm-psd", "--quiet", "--device", "cpu"]
RESULT = "results/shapes/shapes-tiny/asymvlm-psd/seed0/shapes-retrieval"


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of some 40 queries, whose scores are not kept, and few bootstrap draws."""
    for name, size in (("TILE", 2**12), ("COMPUTED", 2**12), ("ROWS", 32)):
        monkeypatch.setattr(score_tiles, name, size)
    monkeypatch.setattr(tasks.retrieval, "STORED_SCORES", 0)
    quick = functools.partial(tasks.retrieval.PairedBootstrap, draws=20)
    monkeypatch.setattr(tasks.retrieval, "PairedBootstrap", quick)


def result(world):
    return [(world / f"{RESULT}.{end}").read_bytes() for end in ("json", "npz")]


@pytest.mark.parametrize("stored", [0, tasks.STORED_SCORES])
def test_result_files_have_the_bytes_of_one_process(world, small_tiles, monkeypatch, stored):
    """Corrected for hubs, with the true matches; and a killed process leaves the whole result."""
    monkeypatch.setattr(tasks.retrieval, "STORED_SCORES", stored)
    train.main([*RUN, "--set", "train.epochs=1", "model.width=16"])
    command, computed, ranks = [*RUN, "--hubs", "nnn"], [], retrieval.ranks

    def counted(*args, **options):
        computed.append(0)
        return ranks(*args, **options)

    monkeypatch.setattr(retrieval, "ranks", counted)
    evaluation.main(command)
    alone, tiles_of_one = result(world), len(computed)
    for end in ("json", "npz"):
        (world / f"{RESULT}.{end}").unlink()

    def counting(argv):
        computed.clear()
        evaluation.main(argv)
        print("tiles", len(computed))

    results = forked_ranks(2, counting, command)
    assert [code for code, *_ in results] == [0, 0], results
    assert result(world) == alone
    counts = [int(out.split("tiles ")[1]) for _, out, _ in results]
    assert sum(counts) == tiles_of_one and min(counts) > 0.4 * tiles_of_one
    assert "retrieval.json" in results[0][1] and "retrieval.json" not in results[1][1]

    def killed(self):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return complete(self)

    complete = score_tiles.Columns.complete
    monkeypatch.setattr(score_tiles.Columns, "complete", killed)
    results = forked_ranks(2, evaluation.main, command)
    assert [code for code, *_ in results] == [2, -9], results
    assert "another of the 2 processes has ended: " in results[0][2] and results[0][2].count("\n") == 1
    assert result(world) == alone


@pytest.mark.parametrize("world", [3, 40])
def test_divided_tiles_make_the_columns_of_one_process(small_tiles, world):
    """Also where some of the processes have no tile."""
    scores = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    calls = [
        lambda: retrieval.rank(scores.__getitem__, 90, range(70), range(70)),
        lambda: [retrieval.top(scores.__getitem__, 70, 90, 3)],
    ]

    def sends(value):
        sent.append(value)
        raise InterruptedError

    for call in calls:
        expected, sent = call(), []
        for rank in range(world):
            with score_tiles.divided(rank, world, sends), pytest.raises(InterruptedError):
                call()
        for rank in (0, 2, world - 1):
            with score_tiles.divided(rank, world, lambda _, sent=sent: sent):
                for ours, theirs in zip(call(), expected, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
