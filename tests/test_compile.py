"""What a GPU needs of a training step: no break in its graph, and nothing for which it waits for the device."""

import pytest
import torch

import train
from utils.config import known, load_config, make_adaptor, presets_of

B, DIM = 24, 16


def trained():
    """Every method and preset with something to train, and the loss of each objective."""
    for method in known("methods"):
        for preset in presets_of(method):
            adaptor = make_adaptor(load_config("shapes", method, preset=preset), DIM)
            if any(p.requires_grad for p in adaptor.parameters()):
                yield from ((method, preset, loss) for loss in ("loss", "unified_loss"))


QUICK = ("asymvlm-psd", "default", "loss")  # two seconds, all together a minute
CASES = [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in trained()]


@pytest.fixture(autouse=True)
def distributions_that_check():
    """torch.compile turns the checks of all distributions off, for the rest of the process."""
    yield
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.mark.parametrize(("method", "preset", "loss"), CASES)
def test_a_loss_is_one_graph_with_the_same_gradients(method, preset, loss):
    adaptor = make_adaptor(load_config("shapes", method, preset=preset), DIM).train()
    image, text = torch.randn(2, B, DIM, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()  # the compiler gives up on a function that it has compiled for many methods
    values, grads = [], []
    for objective in (
        getattr(adaptor, loss),
        torch.compile(getattr(adaptor, loss), fullgraph=True, backend="aot_eager"),
    ):
        torch.manual_seed(0)  # of dropout
        adaptor.zero_grad()
        values.append(objective(image, text))
        values[-1].backward()
        grads.append({name: p.grad for name, p in adaptor.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


COMMAND = ["--dataset", "shapes", "--method", "pcmepp", "--quiet", "--device", "cpu"]
SHORT = ["--set", "train.epochs=2", "model.width=16", "train.val_fraction=0"]


def test_a_compiled_loss_trains_to_the_same_weights(world, monkeypatch):
    """By a compiler that changes no rounding; the last batch of an epoch, of another size, is not compiled."""
    compiler, sizes = torch.compile, set()

    def compiled(objective, mode, fullgraph):
        graph = compiler(objective, fullgraph=fullgraph, backend="eager")
        return lambda *inputs: (sizes.add(len(inputs[0])), graph(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    train.main([*COMMAND, *SHORT])
    assert not sizes
    train.main([*COMMAND, "--tag", "compiled", *SHORT, "train.compile=true"])
    assert sizes == {150}  # of 1,500 captions
    folders = (world / f"checkpoints/shapes/shapes-tiny/pcmepp{tag}/seed0/adaptor.pt" for tag in ("", "+compiled"))
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in folders)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__")


def test_no_step_waits_for_the_device(world, monkeypatch):
    """An epoch reads as many numbers from the device with 30 steps as with 10."""
    reads = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, **options):
            reads[-1] += 1
            return original(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for steps in (10, 30):
        reads.append(0)
        train.main([*COMMAND, "--tag", str(steps), *SHORT, f"train.min_steps={steps}", "train.save_every=1000"])
    assert reads[0] == reads[1] > 0
