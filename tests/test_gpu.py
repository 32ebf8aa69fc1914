"""On CUDA: the contract of every method, training, evaluation and resuming: `make test-gpu`."""

import os
import sys

import pytest
import torch

import eval as evaluation
import train
from tests.check_method import Case, run_check
from utils.checkpoint import Run
from utils.config import known, presets_of
from utils.device import pick_device
from utils.errors import exits_cleanly
from utils.files import read_json

DEVICE = os.environ.get("TEST_DEVICE", "cuda")  # cpu: to try these tests themselves
DATA = ["--dataset", "shapes", "--quiet"]
SHORT = ["--set", "train.epochs=4", "train.batch_size=256", "model.width=32", "train.val_fraction=0"]
TRAINED = ("asymvlm-psd", "asymvlm-vmf", "symmetric-vmf", "probvlm", "pfe", "pcmepp", "prolip", "loss-prediction")


@exits_cleanly()
def main(argv=None):
    """Run the tests of this file; ends with one sentence and exit code 2 where the device does not exist."""
    pick_device(DEVICE)
    return pytest.main(["-m", "slow", "-p", "no:cacheprovider", __file__])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(refusal):
    assert "device 'cuda' does not exist here; there is cpu" in refusal(lambda argv=None: main())


@pytest.mark.slow
@pytest.mark.parametrize("method", known("methods"))
def test_every_preset_has_the_results_of_the_cpu(method):
    for preset in presets_of(method):
        verdict, why = run_check("device", Case(method, preset))
        assert verdict != "FAILED", why


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_training_and_evaluation_agree_with_the_cpu(method, world):
    """Rounding and the order of sums differ, so figures do a little."""
    figures = []
    for device, tag in (("cpu", "there"), (DEVICE, "here")):
        run = [*DATA, "--method", method, "--device", device, "--tag", tag]
        train.main([*run, *SHORT])
        evaluation.main([*run, "--score", "both"])
        [path] = (world / "results").glob(f"**/*+{tag}/seed0/*.json")
        part = read_json(path)["text_to_image"]
        figures.append([part["recall"]["10"], part["calibration"]["model"]["nll"]])
    torch.testing.assert_close(*figures, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["train.precision=bfloat16"], ["train.compile=true"]])
def test_a_killed_run_goes_on_to_the_same_weights(settings, world, monkeypatch):
    run = [*DATA, "--method", "asymvlm-psd", "--device", DEVICE, "--deterministic"]
    more = [*SHORT, "train.save_every=0", *settings]
    train.main([*run, "--tag", "whole", *more])
    save = Run.save_state

    def killed(self, **state):
        save(self, **state)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Run, "save_state", killed)
        train.main([*run, *more])
    train.main([*run, *more])
    whole, resumed = (torch.load(path, weights_only=True) for path in sorted(world.glob("checkpoints/**/adaptor.pt")))
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    sys.exit(main())
