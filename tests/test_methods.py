"""The contract: what every method in configs/methods keeps, with every preset."""

import re

import pytest
import torch
import yaml
from conftest import Drawn

from models.base import Embedding
from utils.config import HOME, known, load_config, make_adaptor

DIM, N, M = 24, 9, 13
# By the end of a head's name: the factor and the shift of its output that make a distribution wider.
WIDER = {
    "eta": (0.5, 0.0),
    "kappa": (1.0, -1.0),
    "inverse_alpha": (1.0, -1.0),
    "log_variance": (1.0, 1.0),
    "loss": (1.0, 1.0),
}


def presets(method):
    values = yaml.safe_load((HOME / "configs" / "methods" / f"{method}.yaml").read_text())
    return ["default", *values.get("presets", {})]


CASES = [(method, preset) for method in known("methods") for preset in presets(method)]
pytestmark = pytest.mark.parametrize(("method", "preset"), CASES)


def cached():
    generator = torch.Generator().manual_seed(0)
    return Drawn(*(3 * torch.randn(count, DIM, generator=generator).numpy() for count in (N, M)))


def unprepared(method, preset, seed=0):
    torch.manual_seed(seed)
    return make_adaptor(load_config("shapes", method, preset=preset), DIM).eval()


def build(method, preset, seed=0):
    adaptor = unprepared(method, preset, seed)
    adaptor.prepare(cached(), quiet=True)
    return adaptor


def fed(adaptor):
    """What the adaptor is fed of the images and of the captions."""
    return [torch.from_numpy(cached().fed(side, adaptor.pooled)[:]) for side in ("image", "text")]


def test_shapes_and_finiteness(method, preset):
    adaptor = build(method, preset)
    image, text = fed(adaptor)
    adapted = {"image": adaptor.adapt_image(image), "text": adaptor.adapt_text(text)}
    for side, count in (("image", N), ("text", M)):
        assert isinstance(adapted[side], Embedding)
        assert adapted[side].mean.shape == (count, DIM)
        for field in adapted[side]:
            assert field is None or (len(field) == count and torch.isfinite(field).all())
        if adapted[side].uncertainty is not None:
            assert adapted[side].uncertainty.shape == (count,)
    for score in (adaptor.similarity, adaptor.log_likelihood, adaptor.classify):
        found = score(adapted["image"], adapted["text"])
        assert found.shape == (N, M) and torch.isfinite(found).all()
    assert adaptor.loss(image, text[:N]).shape == ()


def test_a_pairs_score_does_not_depend_on_the_others(method, preset):
    adaptor = build(method, preset).double()
    image, text = (x.double() for x in fed(adaptor))
    image, text = adaptor.adapt_image(image), adaptor.adapt_text(text)
    for score in (adaptor.similarity, adaptor.log_likelihood):
        whole = score(image, text)
        part = score(image.rows(slice(2, 5)), text.rows(slice(4, 7)))
        torch.testing.assert_close(part, whole[2:5, 4:7], rtol=1e-12, atol=1e-12)


def test_save_and_load_restores_scores_exactly(method, preset, tmp_path):
    adaptor, other = build(method, preset), unprepared(method, preset, seed=1)
    torch.save(adaptor.state_dict(), tmp_path / "adaptor.pt")
    other.load_state_dict(torch.load(tmp_path / "adaptor.pt", weights_only=True))
    image, text = fed(adaptor)
    for score in ("similarity", "log_likelihood"):
        first, second = (getattr(a, score)(a.adapt_image(image), a.adapt_text(text)) for a in (adaptor, other))
        assert (first == second).all()


def widen(adaptor):
    """Give every distribution of an adaptor more spread; returns whether a head was found that says how."""
    found = False
    for name, head in adaptor.named_modules():
        if hasattr(head, "start"):  # kappa before training, which a correction is added to
            head.start /= 2
        for kind, (factor, shift) in WIDER.items():
            if re.search(rf"(^|[._]){kind}$", name):
                found = True
                with torch.no_grad():
                    head[-1].weight.mul_(factor)
                    head[-1].bias.mul_(factor).add_(shift)
    for name, buffer in adaptor.named_buffers():
        if name.endswith("precision"):  # of a prior
            found = True
            buffer /= 2
    return found


def test_a_wider_distribution_is_more_uncertain(method, preset):
    """The sign by construction; `reciprocal: true` marks the published exception, which fails it."""
    adaptor = build(method, preset)
    inputs = fed(adaptor)
    before = [adapt(x).uncertainty for adapt, x in zip((adaptor.adapt_image, adaptor.adapt_text), inputs)]
    if before == [None, None]:
        pytest.skip("no uncertainty")
    assert widen(adaptor), "no head in WIDER"
    after = [adapt(x).uncertainty for adapt, x in zip((adaptor.adapt_image, adaptor.adapt_text), inputs)]
    inverted = load_config("shapes", method, preset=preset).model.get("reciprocal", False)
    for old, new in zip(before, after):
        assert old is None or ((new > old) != inverted).all()


def test_a_few_steps_lower_the_loss_and_repeat(method, preset):
    losses = []
    for _ in range(2):
        adaptor = build(method, preset).train()
        parameters = list(adaptor.parameters())
        if not parameters:
            pytest.skip("nothing to train")
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        image, text = fed(adaptor)
        trace = []
        for _ in range(12):
            loss = adaptor.loss(image, text[:N])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]
