"""Precision: nothing computes below float32 unasked, and bfloat16 stays inside the perceptrons."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval as evaluation
import train
from models.precision import TOLERANCE, Perceptron, product_error, set_precision, train_in_bfloat16
from utils.config import load_config, make_adaptor
from utils.errors import UserError

CPU = torch.device("cpu")
RUN = ["--dataset", "shapes", "--method", "asymvlm-psd", "--quiet", "--device", "cpu"]
SHORT = ["--set", "train.epochs=2", "model.width=32", "train.val_fraction=0"]


def test_what_somebody_has_set_is_undone():
    torch.set_float32_matmul_precision("medium")  # some CPUs then compute in bfloat16
    set_precision(CPU)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert product_error(CPU) < TOLERANCE / 10


@pytest.mark.parametrize(("name", "digits"), [("TF32", 10), ("bfloat16", 7)])
def test_a_product_of_lower_precision_is_refused(monkeypatch, name, digits):
    def rounded(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2 ** (digits + 1)).round() / 2 ** (digits + 1), exponent)

    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: linear(rounded(x), rounded(weight)))
    assert product_error(CPU) > 5 * TOLERANCE
    with pytest.raises(UserError, match="remove what asks for it"):
        set_precision(CPU)


def test_a_device_without_a_precision_is_refused(world, refusal, monkeypatch):
    assert "cpu has no TF32" in refusal(train.main, *RUN, "--precision", "tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for name, sentence in (("tf32", "cuda:0 has no TF32"), ("bfloat16", "cuda:0 has no bfloat16")):
        with pytest.raises(UserError, match=sentence):
            set_precision(torch.device("cuda:0"), name)
    assert "train.precision must be float32, tf32 or bfloat16" in refusal(
        train.main, *RUN, "--set", "train.precision=half"
    )
    assert not (world / "checkpoints").exists()


def test_a_perceptron_computes_in_bfloat16_in_training_alone():
    torch.manual_seed(0)
    exact = Perceptron(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    coarse = Perceptron(*exact)
    train_in_bfloat16(coarse)
    x = torch.randn(32, 64)
    assert not exact.bfloat16 and torch.equal(exact(x), coarse.eval()(x))
    outputs = [perceptron.train()(x) for perceptron in (exact, coarse)]
    grads = [torch.autograd.grad(output.square().mean(), exact.parameters()) for output in outputs]
    for wanted, got in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        assert got.dtype == torch.float32 and not torch.equal(wanted, got)
        assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_the_loss_of_bfloat16_perceptrons_is_that_of_their_outputs():
    """Only the perceptron rounds: the loss of its outputs, rounded the same, is the same in every bit."""
    adaptor = make_adaptor(load_config("shapes", "asymvlm-psd"), 64).train()
    image, text = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    exact = adaptor.loss(image, text)
    train_in_bfloat16(adaptor)
    coarse, eta = adaptor.loss(image, text), adaptor.text.eta(text)
    adaptor.text.eta.forward = lambda x: eta
    assert torch.equal(adaptor.loss(image, text), coarse) and coarse.dtype == torch.float32
    assert 0 <= (coarse - exact).abs() < 0.01


def test_the_precision_is_recorded(world):
    for tag, flags in (("float32", []), ("bfloat16", ["--precision", "bfloat16"])):
        train.main([*RUN, "--tag", tag, *flags, *SHORT])
        evaluation.main([*RUN, "--tag", tag])
        (path,) = world.glob(f"results/**/asymvlm-psd+{tag}/seed0/*.json")
        assert json.loads(path.read_text())["config"]["train"]["precision"] == tag
    folders = [world / f"checkpoints/shapes/shapes-tiny/asymvlm-psd+{tag}/seed0" for tag in ("float32", "bfloat16")]
    one, other = (torch.load(folder / "adaptor.pt", weights_only=True)["state_dict"] for folder in folders)
    name = "text.eta.0.weight"
    assert one[name].dtype == other[name].dtype == torch.float32 and not torch.equal(one[name], other[name])


def test_deterministic_training_and_evaluation(world, refusal, monkeypatch):
    """On a CPU the bits are the same anyway: PyTorch and cuBLAS are told, and told otherwise by the next run."""
    modes, fit, check = [], train.fit, evaluation.check

    def recorded(call):
        return lambda *of: modes.append(torch.are_deterministic_algorithms_enabled()) or call(*of)

    monkeypatch.setattr(train, "fit", recorded(fit))
    monkeypatch.setattr(evaluation, "check", recorded(check))
    for tag, flags in (("exact", ["--deterministic"]), ("usual", [])):
        train.main([*RUN, "--tag", tag, *flags, *SHORT])
        evaluation.main([*RUN, "--tag", tag])
    assert modes == [True, True, False, False]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    (result,) = world.glob("results/**/asymvlm-psd+exact/seed0/*.json")
    assert json.loads(result.read_text())["config"]["train"]["deterministic"] is True

    def fails(*_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(train, "fit", fails)
    error = refusal(train.main, *RUN, "--tag", "other", "--deterministic", *SHORT)
    assert "cumsum_cuda_kernel has no deterministic form on this GPU: leave out --deterministic." in error
