"""Processes that share training steps: the losses and weights of one process, one report, and nobody waits for ever."""

import csv
import os
import signal
import time

import pytest
import torch
from conftest import forked_ranks
from test_compile import trained

import train
from datasets import ranks
from datasets.ranks import Ranks
from models.shares import Share
from utils.config import load_config, make_adaptor

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

DIM = 16
SIZES = [23, 7, 1]  # pairs of a step: two shares are uneven, or one is empty
CASES = list(trained())
QUICK = [
    ("asymvlm-psd", "default", "loss"),  # InfoNCE in tiles
    ("pcmepp", "official", "loss"),  # pairwise sigmoid, positives by their scores
    ("pfe", "official", "unified_loss"),  # scores without a closed form
    ("probvlm", "official", "loss"),  # dropout
]
# The published likelihood of ProbVLM has cusps: trainings that differ in a rounding part, tenfold every third step.
PARTS = ("probvlm", "reference", "unified_loss")


def steps(case, share, count):
    """Take `count` steps of a case, (method, preset, loss), in float64: each loss, and the weights at the end."""
    method, preset, loss = case
    narrow = [] if method == "linear" else ["model.width=24"]
    config = load_config("shapes", method, preset=preset, settings=narrow)
    torch.manual_seed(0)
    adaptor = make_adaptor(config, DIM).double().train()
    optimizer, objective = train.make_optimizer(adaptor, config.optim), share.of(getattr(adaptor, loss))
    losses = []
    for step in range(10 if case == PARTS else count):
        image, text = torch.randn(2, SIZES[step % 3], DIM, dtype=torch.float64)
        image[1:3] = image[0]  # captions of one image
        value = objective(image, text)
        optimizer.zero_grad()
        value.backward()
        share.sum_gradients(adaptor)
        optimizer.step()
        losses.append(value.detach())
    return {"losses": torch.stack(losses)} | adaptor.state_dict()


def shared_steps(cases, count):
    with Ranks() as processes:
        share = processes.share(torch.device("cpu"))
        torch.save([steps(case, share, count) for case in cases], f"{processes.rank}.pt")


PARTED = [pytest.param(CASES[part::6], 3, 50, id=f"all-{part}", marks=pytest.mark.slow) for part in range(6)]


@pytest.mark.parametrize(("cases", "world", "count"), [pytest.param(QUICK, 2, 9, id="some"), *PARTED])
def test_steps_are_those_of_one_process(tmp_path, monkeypatch, cases, world, count):
    monkeypatch.chdir(tmp_path)
    expected = [steps(case, Share(), count) for case in cases]  # first, as it loads torch's compiler for all
    results = forked_ranks(world, shared_steps, cases, count)
    assert [code for code, *_ in results] == [0] * world, results
    first, *others = (torch.load(f"{rank}.pt", weights_only=True) for rank in range(world))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)
    for case, ours, theirs in zip(cases, first, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True, msg=str(case))


COMMAND = ["--dataset", "shapes", "--method", "pcmepp", "--quiet", "--device", "cpu"]
COMMAND += ["--set", "train.epochs=5", "model.width=16", "train.save_every=0"]  # ten steps an epoch
FOLDER = "checkpoints/shapes/shapes-tiny/pcmepp{}/seed0"


@pytest.fixture
def alone(world):
    train.main(COMMAND)
    return world


def shared_run():
    """Train by two processes; see `forked_ranks`."""
    return forked_ranks(2, train.main, [*COMMAND[:7], "--tag", "shared", *COMMAND[7:]])


def must_equal_alone(world):
    """The run of two processes has the weights, figures and files of one, up to the rounding of float32."""
    of_one, of_two = (world / FOLDER.format(tag) for tag in ("", "+shared"))
    ours, theirs = (torch.load(folder / "adaptor.pt", weights_only=True) for folder in (of_two, of_one))
    scales = [run["state_dict"].pop("given_scale").item() for run in (ours, theirs)]
    assert scales[0] == pytest.approx(scales[1], rel=2e-3)  # to which the search for it is exact
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=1e-6)
    assert torch.equal(ours["bank"]["text"], theirs["bank"]["text"])
    assert sorted(path.name for path in of_two.iterdir()) == sorted(path.name for path in of_one.iterdir())
    logs = [list(csv.DictReader((folder / "log.csv").read_text().splitlines())) for folder in (of_two, of_one)]
    assert len(logs[0]) == len(logs[1]) == 5
    for row, expected in zip(*logs, strict=True):
        for name in ("epoch", "loss", "lr", "val_loss"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-6), name


def at_step(monkeypatch, number, call):
    """Let rank 1 call `call()` in its step `number`, counted from 1."""
    original, taken = Share.sum_gradients, []

    def counted(self, model):
        taken.append(None)
        if self.rank == 1 and len(taken) == number:
            call()
        original(self, model)

    monkeypatch.setattr(Share, "sum_gradients", counted)


def test_a_run_of_two_is_that_of_one_and_goes_on_after_sigterm(alone, monkeypatch):
    """Held-out choice, files, one print; SIGTERM to one of the two ends both at one step, where two or one go on."""
    with monkeypatch.context() as patch:
        # Twice, as by a cluster and by torchrun.
        at_step(patch, 23, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
        results = shared_run()
    assert [code for code, *_ in results] == [130, 130], results
    errors = "".join(error for *_, error in results)
    assert errors.count("interrupted; the same command resumes") == errors.count("\n") == 1
    state = torch.load(FOLDER.format("+shared") + "/state.pt", weights_only=True)
    assert 10 * len(state["log"]) + state["inside"]["step"] == 23
    results = shared_run()
    assert [code for code, *_ in results] == [0, 0], results
    assert results[0][1].count("trained, loss") == 1 and not results[1][1] + results[0][2] + results[1][2]
    must_equal_alone(alone)
    results = shared_run()
    assert "already trained" in results[0][1] and not results[1][1]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(8)


def full_disk():
    raise OSError(28, "No space left on device", "a file")


@pytest.mark.parametrize(
    ("ending", "codes", "reason"),
    [
        (killed, [2, -9], "another of the 2 processes has ended: "),
        (full_disk, [1, 2], "a file: No space left on device."),
        pytest.param(hangs, [2, 1], "another of the 2 processes has not answered for 3 s; ", marks=pytest.mark.slow),
    ],
)
def test_a_failed_process_ends_all_with_one_sentence(alone, monkeypatch, ending, codes, reason):
    monkeypatch.setattr(ranks, "STEP", 3 if ending is hangs else 50)
    with monkeypatch.context() as patch:
        at_step(patch, 12, ending)
        results = shared_run()
    assert [code for code, *_ in results] == codes, results
    errors = "".join(error for *_, error in results)
    assert reason in errors and errors.count("\n") == 1, errors
    # What was saved is enough for one process to go on.
    train.main([*COMMAND[:7], "--tag", "shared", *COMMAND[7:]])
    must_equal_alone(alone)


def test_an_error_of_all_is_reported_once(world, monkeypatch):
    results = forked_ranks(2, train.main, [*COMMAND, "train.compile=true"])
    errors = "".join(error for *_, error in results)
    assert sorted(code for code, *_ in results) == [1, 2]
    assert "train.compile=true is for one process" in errors and errors.count("\n") == 1


def test_processes_that_see_other_embeddings_are_refused(world, monkeypatch):
    original = Ranks.must_agree

    def differs(self, value, what):
        original(self, (*value, self.rank), what)

    monkeypatch.setattr(Ranks, "must_agree", differs)
    errors = "".join(error for *_, error in forked_ranks(2, train.main, COMMAND))
    assert "process 1 of 2 has another configuration or other embeddings than the first" in errors
