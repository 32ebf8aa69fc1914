"""Training: the same weights after a kill, validation, and which mistakes are refused."""

import csv
import os
import platform
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from datasets.embeddings import Pairs, hold_out
from datasets.streaming import InMemory
from models.asymvlm import AsymVLM
from models.base import best_temperature
from models.pair_loss import info_nce
from models.pcmepp import PCMEPP
from models.probvlm import ProbVLM
from utils.checkpoint import Run
from utils.config import load_config
from utils.files import locked

SHORT = ["--quiet", "--device", "cpu", "--set", "train.epochs=4", "train.batch_size=256", "model.width=32"]
COMMAND = ["--dataset", "shapes", "--method", "asymvlm-psd", *SHORT]


def read_log(folder):
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def weights(folder):
    return torch.load(folder / "adaptor.pt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(("kill_at", "fraction"), [(12, 0), (38, 0), (23, 0.1)])  # with 0.1 epoch 1 is the best
def test_a_killed_run_ends_with_the_same_weights(world, monkeypatch, kill_at, fraction):
    command = [*COMMAND, f"train.val_fraction={fraction}"]
    train.main([*command, "--tag", "whole"])
    loss, calls = AsymVLM.loss, []

    def killed(self, *args):
        calls.append(0)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return loss(self, *args)

    again = [*command, "train.save_every=0"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(AsymVLM, "loss", killed)
        train.main(again)
    folder = world / "checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0"
    assert (folder / "state.pt").is_file() and not (folder / "adaptor.pt").exists()
    train.main(again)
    whole = folder.parent.parent / "asymvlm-psd+whole/seed0"
    ours, theirs = weights(folder), weights(whole)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)  # given_scale may be NaN
    assert sorted(path.name for path in folder.iterdir()) == ["adaptor.pt", "config.yaml", "log.csv"]
    logs = [read_log(path) for path in (folder, whole)]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert [int(row["epoch"]) for row in logs[0]] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_at_the_same_step(world, monkeypatch, capsys, number):
    """PCME++ draws random numbers in every step, so these go on as well."""
    command = ["--dataset", "shapes", "--method", "pcmepp", *SHORT, "train.save_every=1000", "train.val_fraction=0"]
    train.main([*command, "--tag", "whole"])
    loss, calls = PCMEPP.loss, []

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == 13:  # the third step of the second epoch
            signal.raise_signal(number)
        return loss(self, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(PCMEPP, "loss", interrupted)
        train.main(command)
    assert stop.value.code == 130 and capsys.readouterr().err.endswith(
        "interrupted; the same command resumes from what was last saved.\n"
    )
    assert len(calls) == 13 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    folder = world / "checkpoints/shapes/shapes-tiny/pcmepp/seed0"
    assert torch.load(folder / "state.pt", weights_only=True)["inside"]["step"] == 3
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(PCMEPP, "loss", lambda self, *args: (calls.append(0), loss(self, *args))[1])
        train.main(command)
    whole = folder.parent.parent / "pcmepp+whole/seed0"
    torch.testing.assert_close(weights(folder), weights(whole), rtol=0, atol=0, equal_nan=True)
    assert [row["loss"] for row in read_log(folder)] == [row["loss"] for row in read_log(whole)]
    assert len(calls) == 40 - 13


def test_seeds_differ_and_repeat(world):
    for seed, tag in ((0, "a"), (0, "b"), (1, "a")):
        train.main([*COMMAND, "--seed", str(seed), "--tag", tag])
    base = world / "checkpoints/shapes/shapes-tiny"
    a, b, other = (
        weights(base / name) for name in ("asymvlm-psd+a/seed0", "asymvlm-psd+b/seed0", "asymvlm-psd+a/seed1")
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not (a["text.eta.0.weight"] == other["text.eta.0.weight"]).all()


def test_schedule_is_a_cosine_per_step_and_every_pair_is_seen(world, monkeypatch):
    sizes, loss = [], AsymVLM.loss
    monkeypatch.setattr(
        AsymVLM, "loss", lambda self, image, text: (sizes.append(len(text)), loss(self, image, text))[1]
    )
    train.main([*COMMAND, "optim.lr=0.5", "optim.min_lr=0.1", "train.val_fraction=0", "train.min_steps=1"])
    assert sizes == [256, 256, 256, 256, 256, 220] * 4  # 1,500 captions: nothing dropped
    log = read_log(Path("checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0"))
    expected = [0.1 + 0.4 * (1 + np.cos(np.pi * 6 * epoch / 24)) / 2 for epoch in (1, 2, 3, 4)]
    assert [float(row["lr"]) for row in log] == pytest.approx(expected)


def test_objective_and_mean_are_flags(world, capsys):
    for flags in (["--objective", "infonce"], ["--mean", "frozen"], ["--objective", "infonce", "--mean", "learned"]):
        train.main(["--dataset", "shapes", "--method", "pfe", *flags, *SHORT])
    base = world / "checkpoints/shapes/shapes-tiny"
    assert sorted(path.name for path in base.iterdir()) == ["pfe+frozen", "pfe+infonce", "pfe+infonce+learned"]
    trained = {path.name: weights(path / "seed0") for path in base.iterdir()}
    assert any("mean" in name for name in trained["pfe+infonce+learned"])
    first = "text_log_variance.0.weight"
    assert not (trained["pfe+infonce"][first] == trained["pfe+frozen"][first]).all()


def test_weight_decay_spares_scalars():
    adaptor = AsymVLM(dim=4, width=4)
    config = load_config("coco", "asymvlm-psd").optim
    groups = {
        id(p): group["weight_decay"]
        for group in train.make_optimizer(adaptor, config).param_groups
        for p in group["params"]
    }
    assert groups[id(adaptor.log_temperature)] == 0 and groups[id(adaptor.text.eta[0].bias)] == 5e-4
    assert len(groups) == len(list(adaptor.parameters()))
    config = load_config("coco", "asymvlm-psd", preset="reference").optim
    groups = {
        id(p): group["weight_decay"]
        for group in train.make_optimizer(adaptor, config).param_groups
        for p in group["params"]
    }
    assert set(groups.values()) == {5e-4} and len(groups) == len(list(adaptor.parameters()))


def test_a_run_with_another_configuration_is_refused(world, refusal, capsys):
    train.main(COMMAND)
    error = refusal(train.main, *COMMAND, "optim.lr=0.5", "train.epochs=5")
    assert "another optim.lr, train.epochs" in error and "--tag NAME" in error and "--overwrite" in error
    train.main(COMMAND)
    assert "already trained" in capsys.readouterr().out
    train.main([*COMMAND, "train.epochs=5", "--tag", "five"])
    train.main([*COMMAND, "train.epochs=5", "--overwrite"])
    assert "trained, loss" in capsys.readouterr().out


def test_embeddings_that_changed_are_noticed(world, small_world, refusal):
    train.main(COMMAND)
    (world / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", world / "embeddings")
    meta = world / "embeddings/shapes/shapes-tiny/train/meta.json"
    meta.write_text(meta.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert "holds a run with another cache of embeddings" in refusal(train.main, *COMMAND)
    train.main([*COMMAND, "--overwrite"])
    (Run(load_config("shapes", "asymvlm-psd")).folder / "config.yaml").unlink()
    assert "config.yaml is missing or damaged" in refusal(train.main, *COMMAND)


def test_a_mistake_does_not_take_the_folder(world, refusal, capsys):
    refusal(train.main, *COMMAND, "optim.name=lion")
    refusal(train.main, *COMMAND, "optim.lr=-1")
    refusal(train.main, *COMMAND, "optim.name=sgd", "optim.lr=1e30", "optim.weight_decay=0")
    train.main(COMMAND)
    assert "trained, loss" in capsys.readouterr().out


def test_two_processes_do_not_share_a_folder(world, refusal):
    with locked(Run(load_config("shapes", "asymvlm-psd")).folder):
        assert f"process {os.getpid()} on {platform.node()}, started 20" in refusal(train.main, *COMMAND)


def test_a_diverging_run_says_so(world, refusal):
    error = refusal(train.main, *COMMAND, "optim.name=sgd", "optim.lr=1e30", "optim.weight_decay=0")
    assert (
        "asymvlm-psd in checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0, step 2 of epoch 1: the loss is nan" in error
    )
    assert "first by square in models/asymvlm.py, line " in error
    assert "try a lower learning rate with --set optim.lr=" in error
    assert not list(world.glob("checkpoints/**/*.pt"))


ROW = 700  # of the caption whose figures the tests below spoil


def step_of_row(epoch, batch=150):
    """The step of an epoch, from 1, that sees the caption ROW, after the rule in train.py."""
    torch.manual_seed(epoch - 1)
    return int((torch.randperm(1500) == ROW).nonzero()) // batch + 1


def spoil(patch, change):
    """Let `change` spoil AsymVLM's kappa (B,), by a mask (B,) of the caption ROW, once a step has been taken."""
    row = torch.from_numpy(np.array(Pairs("shapes", "shapes-tiny", "train").text[ROW])).float()
    adapt = AsymVLM.adapt_text

    def spoiled(self, text):
        adapted = adapt(self, text)
        if self.log_temperature == 0:  # still as it was initialized
            return adapted
        return adapted._replace(spread=change(adapted.spread, (text == row).all(dim=1)))

    patch.setattr(AsymVLM, "adapt_text", spoiled)


def infinite(kappa, mask):
    return kappa / ~mask


def steep(kappa, mask):
    """As it is, but with a gradient of NaN for the one."""
    return kappa + 0 * torch.where(mask, kappa - kappa.detach(), 1).sqrt()


FAULTS = {
    infinite: r"the loss is nan, first by \S*div\S* in models/base.py, line \d+ \(unified_loss\)",
    steep: r"the loss is [0-9.]+, but the gradient of text.eta.0.weight and \d more is not finite",
}


@pytest.mark.parametrize("change", FAULTS)
def test_nan_stops_at_its_step_and_what_was_saved_goes_on(world, monkeypatch, refusal, capsys, change):
    command = [*COMMAND, "train.val_fraction=0", "train.save_every=0"]
    train.main([*command, "--tag", "whole"])
    folder = world / "checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0"
    epoch = 1 if step_of_row(1) > 1 else 2
    with monkeypatch.context() as patch:
        spoil(patch, change)
        error = refusal(train.main, *command)
    assert f"asymvlm-psd/seed0, step {step_of_row(epoch)} of epoch {epoch}: " in error
    assert re.search(FAULTS[change] + ".*, with row 700 of embeddings/shapes/shapes-tiny/train/text.npy", error)
    assert not list(folder.glob("*.pt"))  # the first epoch has not ended
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        write = Run.save_state
        patch.setattr(Run, "save_state", lambda *args, **state: (write(*args, **state), signal.raise_signal(2)))
        train.main(command)
    capsys.readouterr()
    saved = (folder / "state.pt").read_bytes()
    with monkeypatch.context() as patch:
        spoil(patch, change)
        error = refusal(train.main, *command)
    assert f"step {step_of_row(2)} of epoch 2: the loss is " in error
    assert "asymvlm-psd/seed0/state.pt keeps what was last saved before it): try" in error and "--overwrite." in error
    assert (folder / "state.pt").read_bytes() == saved and not (folder / "adaptor.pt").exists()
    train.main(command)
    whole = folder.parent.parent / "asymvlm-psd+whole/seed0"
    torch.testing.assert_close(weights(folder), weights(whole), rtol=0, atol=0, equal_nan=True)


def test_nothing_poisoned_is_saved_on_an_interrupt_or_at_the_end(world, monkeypatch, refusal, capsys):
    """A signal between a NaN and the end of its epoch; a gradient of NaN in the very last step."""
    folder, calls = world / "checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0", []
    command = [*COMMAND, "train.val_fraction=0"]

    def interrupted(kappa, mask):
        if mask.any():
            signal.raise_signal(signal.SIGTERM)
        return infinite(kappa, mask)

    def last(kappa, mask):
        calls.append(0)  # in training, repeated, and explained
        return steep(kappa, mask & False | (len(calls) in (39, 78, 79)))

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        spoil(patch, interrupted)
        train.main(command)
    assert not list(folder.glob("*.pt"))
    with monkeypatch.context() as patch:
        spoil(patch, last)
        capsys.readouterr()
        error = refusal(train.main, *command)
    assert "step 10 of epoch 4: the loss is " in error and "the gradient of " in error
    assert not list(folder.glob("*.pt"))


def test_a_nan_that_does_not_come_again_is_told_and_trained_past(world, monkeypatch, capsys):
    calls, command = [], [*COMMAND, "train.val_fraction=0", "train.save_every=0"]

    def once(kappa, mask):
        calls.append(0)
        return infinite(kappa, mask & False | (len(calls) == 24))

    train.main([*command, "--tag", "whole"])
    with monkeypatch.context() as patch:
        spoil(patch, once)
        train.main(command)
    assert "NaN or infinity in epoch 3 did not come again when it was repeated" in capsys.readouterr().err
    folder = world / "checkpoints/shapes/shapes-tiny"
    trained = [weights(folder / name / "seed0") for name in ("asymvlm-psd", "asymvlm-psd+whole")]
    torch.testing.assert_close(*trained, rtol=0, atol=0, equal_nan=True)


def test_an_overflow_in_the_optimizer_is_a_fault(world, monkeypatch, refusal):
    """The square of a gradient of 1e25 is infinite in float32, and AdamW then never moves that weight again."""
    loss = AsymVLM.loss
    monkeypatch.setattr(AsymVLM, "loss", lambda self, *args: loss(self, *args) + 1e25 * self.log_temperature)
    error = refusal(train.main, *COMMAND)
    assert "step 1 of epoch 1: after it the state of the optimizer is not finite" in error
    assert "try a lower learning rate" in error


def test_rows_of_a_damaged_cache_are_named(world, small_world, refusal):
    (world / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", world / "embeddings")
    for split in ("train", "val"):
        path = world / f"embeddings/shapes/shapes-tiny/{split}/text.npy"
        text = np.load(path)
        text[[7, 90, 91, 5], [0, 63, 3, 60]] = np.nan, np.inf, -np.inf, 65504
        if split == "val":
            evaluated = path, text
        else:
            np.save(path, text)
    for method in ("asymvlm-psd", "knn", "clip"):
        error = refusal(train.main, "--dataset", "shapes", "--method", method)
        assert "shapes-tiny/train/text.npy holds NaN or infinity in rows 7, 90 and 91 of 1,500: delete" in error
    assert not list(world.glob("checkpoints/**/*.pt"))
    shutil.copytree(small_world / "embeddings", world / "embeddings", dirs_exist_ok=True)
    train.main(["--dataset", "shapes", "--method", "clip"])
    np.save(*evaluated)
    error = refusal(evaluation.main, "--dataset", "shapes", "--method", "clip")
    assert "shapes-tiny/val/text.npy holds NaN or infinity in rows 7, 90 and 91 of 500: delete" in error


def test_missing_cache_and_unknown_names_are_one_sentence(world, refusal):
    assert "run `python cache_embeddings.py --dataset coco" in refusal(
        train.main, "--dataset", "coco", "--method", "clip"
    )
    assert "there is no method 'x'; there is asymvlm-psd" in refusal(train.main, "--dataset", "shapes", "--method", "x")
    assert "device 'cuda:77' does not exist" in refusal(train.main, *COMMAND[:4], "--device", "cuda:77")
    assert "optim.name must be sgd or adamw" in refusal(train.main, *COMMAND, "optim.name=lion")
    assert "has no key 'depth'" in refusal(train.main, *COMMAND, "model.depth=3")
    assert not list(world.glob("checkpoints/**/adaptor.pt"))


def test_checkpoint_that_is_damaged_is_named(world, refusal):
    train.main(COMMAND)
    path = Run(load_config("shapes", "asymvlm-psd")).folder / "adaptor.pt"
    path.write_bytes(path.read_bytes()[:1000])
    import uncertainty

    for script, rest in ((evaluation, []), (uncertainty, ["a photo"])):
        error = refusal(script.main, *COMMAND[:4], *rest)
        assert "adaptor.pt is damaged or truncated: delete" in error


def test_held_out_images_are_nobody_elses():
    rng = np.random.default_rng(0)
    image_of_text = np.concatenate([np.arange(50), rng.integers(0, 50, 150)])
    rng.shuffle(image_of_text)
    rows, blocks = hold_out(image_of_text, 0.3, seed=1, block=8)
    held_out = torch.cat(blocks)
    assert len(np.unique(image_of_text[held_out])) == 15
    assert not set(image_of_text[rows]) & set(image_of_text[held_out])
    assert len(set(rows.tolist()) | set(held_out.tolist())) == len(rows) + len(held_out)
    # The only held-out captions left out are remainders of one caption.
    assert len(rows) + len(held_out) >= 200 - image_of_text.max()
    for block in blocks:
        assert 2 <= len(block) <= 8 and len(np.unique(image_of_text[block])) == len(block)
    other = hold_out(image_of_text, 0.3, seed=2)[0]
    assert set(rows.tolist()) != set(other.tolist())
    everything, nothing = hold_out(image_of_text, 0.0, seed=1)
    assert everything.tolist() == list(range(200)) and nothing == []


def test_the_epoch_with_the_least_validation_loss_is_kept(world):
    # Means learned from nothing overfit 300 images: from about the twelfth epoch on the loss rises.
    train.main([*COMMAND, "optim.lr=0.02", "train.epochs=30", "model.mean=learned", "--seed", "3"])
    folder = world / "checkpoints/shapes/shapes-tiny/asymvlm-psd/seed3"
    losses = [float(row["val_loss"]) for row in read_log(folder)]
    adaptor, config, _ = Run(load_config("shapes", "asymvlm-psd", seed=3)).load("cpu")
    assert config.train.val_fraction == 0.1  # 1,500 captions are few
    pairs = Pairs("shapes", "shapes-tiny", "train")
    _, blocks = hold_out(pairs.image_of_text, 0.1, seed=3)
    loss, temperature = train.validate(adaptor, InMemory(*pairs.to("cpu")), blocks)
    assert loss == pytest.approx(min(losses), rel=1e-5) and loss < losses[-1]
    assert adaptor.posterior_scale == pytest.approx(temperature, rel=1e-3)


def test_training_ends_when_validation_gains_no_more(world):
    train.main([*COMMAND, "optim.lr=0.02", "train.epochs=40", "train.patience=3", "model.mean=learned"])
    losses = [float(row["val_loss"]) for row in read_log(world / "checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0")]
    assert len(losses) == np.argmin(losses) + 4 < 40


def test_the_start_is_kept_where_training_only_spoils_it(world, capsys):
    train.main([*COMMAND, "optim.lr=0.3"])
    assert "the untrained start is kept" in capsys.readouterr().out
    run = Run(load_config("shapes", "asymvlm-psd"))
    adaptor, _, _ = run.load("cpu")
    assert run.untrained and run.start_kept
    settings = ["optim.lr=9", "model.penalty=0.3", "train.val_fraction=0.1"]
    train.main(["--dataset", "shapes", "--method", "linear", *SHORT[:-1], *settings])
    linear = Run(load_config("shapes", "linear"))
    linear.load("cpu")
    assert linear.start_kept and not linear.untrained
    text = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adaptor.adapt_text(text).mean, torch.nn.functional.normalize(text, dim=-1))
    assert adaptor.posterior_scale != adaptor.temperature


def test_an_overfitted_density_of_one_pair_does_not_hide_the_others(world):
    """Differences of huge losses would cancel to any small number."""
    torch.manual_seed(0)
    score = torch.randn(30, 30) + 2 * torch.eye(30)
    usual = best_temperature([score])
    assert info_nce(usual * score) < info_nce(torch.zeros(30, 30))
    score[3, 4] = -1e30
    assert best_temperature([score]) == pytest.approx(usual, rel=0.05)


def test_validation_is_without_dropout(world):
    torch.manual_seed(0)
    pairs = Pairs("shapes", "shapes-tiny", "train")
    adaptor = ProbVLM(pairs.dim, width=16, dropout=0.5).train()
    _, blocks = hold_out(pairs.image_of_text, 0.2, seed=0)
    first, second = (train.validate(adaptor, InMemory(*pairs.to("cpu")), blocks) for _ in range(2))
    assert first == second


def test_loss_prediction_learns_few_pairs_under_validation(world):
    """Validation measures a prediction by the target of training, although the batch is another."""
    train.main(["--dataset", "shapes", "--method", "loss-prediction", "--quiet", "--device", "cpu", "--set",
                "train.epochs=10", "model.width=64"])  # fmt: skip
    losses = [
        float(row["val_loss"]) for row in read_log(world / "checkpoints/shapes/shapes-tiny/loss-prediction/seed0")
    ]
    assert np.argmin(losses) > 0 and min(losses) < 0.8 * losses[0]


def test_validation_is_off_with_many_pairs_or_by_flag(world, monkeypatch):
    for flags in ([], ["--val-fraction", "0"]):
        if not flags:
            monkeypatch.setattr("utils.config.FEW", 1000)
        train.main([*COMMAND, "--tag", f"tag{len(flags)}", *flags])
        folder = world / f"checkpoints/shapes/shapes-tiny/asymvlm-psd+tag{len(flags)}/seed0"
        assert "val_loss" not in read_log(folder)[0]
        adaptor, config, _ = Run(load_config("shapes", "asymvlm-psd", tag=f"tag{len(flags)}")).load("cpu")
        assert config.train.val_fraction == 0 and adaptor.posterior_scale == pytest.approx(adaptor.temperature.item())


def test_impossible_validation_fractions_are_refused(world, refusal):
    for fraction in ("1.5", "-0.1"):
        assert f"must lie in [0, 1), not {fraction}" in refusal(train.main, *COMMAND, "--val-fraction", fraction)
    error = refusal(train.main, *COMMAND, "--val-fraction", "0.003")
    assert "holding out 0.003 of 300 images leaves 1 to pick the epoch and 299 to train on" in error
    assert not (world / "checkpoints").exists()


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_the_best_temperature_against_a_grid(shift):
    torch.manual_seed(0)
    scores = [shift + torch.randn(n, n, dtype=torch.float64) + 2 * torch.eye(n) for n in (20, 30)]
    best = best_temperature(scores)
    grid = best * np.linspace(0.5, 2, 301)
    losses = [sum(info_nce(factor * score).item() for score in scores) for factor in grid]
    assert grid[np.argmin(losses)] == pytest.approx(best, rel=0.01)


def test_the_best_temperature_where_there_is_none():
    """Scores that rank every pair right, or that are all equal."""
    torch.manual_seed(0)
    for count in (5, 50):
        score = torch.eye(count) + 0.01 * torch.randn(count, count)
        assert info_nce(best_temperature([score]) * score).item() == pytest.approx(1 / count, rel=0.01)
    assert best_temperature([torch.ones(4, 4)]) == 1


def test_blocks_weigh_by_their_pairs():
    torch.manual_seed(0)
    large, small = torch.randn(40, 40) + 2 * torch.eye(40), torch.randn(2, 2)
    alone = best_temperature([large])
    assert best_temperature([large, small]) == pytest.approx(alone, rel=0.2)


def test_epochs_without_finite_validation_are_not_kept(world, monkeypatch, refusal):
    folder, likelihood, calls = world / "checkpoints/shapes/shapes-tiny/asymvlm-psd/seed0", AsymVLM.log_likelihood, []

    def overflows(self, image, text):
        calls.append(0)
        score = likelihood(self, image, text)
        return score if len(calls) < limit else score + torch.inf

    monkeypatch.setattr(AsymVLM, "log_likelihood", overflows)
    limit = 12  # training does not call it, validation once an epoch
    train.main(COMMAND)
    losses = [float(row["val_loss"]) for row in read_log(folder)]
    assert np.isfinite(losses[0]) and np.isinf(losses[-1])
    shutil.rmtree(folder)
    limit = 0
    assert "no epoch gives held-out pairs finite scores" in refusal(train.main, *COMMAND)
    assert not (folder / "adaptor.pt").exists()
