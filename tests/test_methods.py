"""The contract: what every method in configs/methods keeps, with every preset."""

import pytest
import torch
import yaml

from models.base import Embedding
from utils.config import HOME, known, load_config, make_adaptor

DIM, N, M = 24, 9, 13


def presets(method):
    values = yaml.safe_load((HOME / "configs" / "methods" / f"{method}.yaml").read_text())
    return ["default", *values.get("presets", {})]


CASES = [(method, preset) for method in known("methods") for preset in presets(method)]
pytestmark = pytest.mark.parametrize(("method", "preset"), CASES)


def build(method, preset, seed=0):
    torch.manual_seed(seed)
    return make_adaptor(load_config("shapes", method, preset=preset), DIM)


def embeddings(seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = 3 * torch.randn(N, DIM, generator=generator)
    return image, 3 * torch.randn(M, DIM, generator=generator)


def test_shapes_and_finiteness(method, preset):
    adaptor = build(method, preset)
    image, text = embeddings()
    adapted = {"image": adaptor.adapt_image(image), "text": adaptor.adapt_text(text)}
    for side, count in (("image", N), ("text", M)):
        assert isinstance(adapted[side], Embedding)
        assert adapted[side].mean.shape == (count, DIM)
        for field in adapted[side]:
            assert field is None or (len(field) == count and torch.isfinite(field).all())
        if adapted[side].uncertainty is not None:
            assert adapted[side].uncertainty.shape == (count,)
    for score in (adaptor.similarity, adaptor.log_likelihood):
        found = score(adapted["image"], adapted["text"])
        assert found.shape == (N, M) and torch.isfinite(found).all()
    assert adaptor.loss(image, text[:N]).shape == ()


def test_a_pairs_score_does_not_depend_on_the_others(method, preset):
    adaptor = build(method, preset).double()
    image, text = (x.double() for x in embeddings())
    image, text = adaptor.adapt_image(image), adaptor.adapt_text(text)
    for score in (adaptor.similarity, adaptor.log_likelihood):
        whole = score(image, text)
        part = score(image.rows(slice(2, 5)), text.rows(slice(4, 7)))
        torch.testing.assert_close(part, whole[2:5, 4:7], rtol=1e-12, atol=1e-12)


def test_save_and_load_restores_scores_exactly(method, preset, tmp_path):
    adaptor, other = build(method, preset), build(method, preset, seed=1)
    torch.save(adaptor.state_dict(), tmp_path / "adaptor.pt")
    other.load_state_dict(torch.load(tmp_path / "adaptor.pt", weights_only=True))
    image, text = embeddings()
    for score in ("similarity", "log_likelihood"):
        first, second = (getattr(a, score)(a.adapt_image(image), a.adapt_text(text)) for a in (adaptor, other))
        assert (first == second).all()


def test_lower_kappa_is_more_uncertain(method, preset):
    """The sign by construction: shrinking what the method itself calls concentration raises its uncertainty."""
    adaptor = build(method, preset)
    if not hasattr(adaptor, "eta"):
        pytest.skip("no concentration of its own")
    _, text = embeddings()
    before = adaptor.adapt_text(text).uncertainty
    with torch.no_grad():
        adaptor.eta[-1].weight.mul_(0.5)
        adaptor.eta[-1].bias.mul_(0.5)
    assert (adaptor.adapt_text(text).uncertainty > before).all()


def test_a_few_steps_lower_the_loss_and_repeat(method, preset):
    losses = []
    for _ in range(2):
        adaptor = build(method, preset)
        parameters = list(adaptor.parameters())
        if not parameters:
            pytest.skip("nothing to train")
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        image, text = embeddings()
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
