"""`linear`: its loss and gradients in float64, and what its cross-validation chooses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.bank import Bank
from models.linear import PENALTIES, Linear


def slow_loss(x, y, image_map, text_map, scale, penalty):
    """The loss by its definition."""
    image = F.normalize(F.normalize(x, dim=1) + F.normalize(x, dim=1) @ image_map.T, dim=1)
    text = F.normalize(F.normalize(y, dim=1) + F.normalize(y, dim=1) @ text_map.T, dim=1)
    score = scale * image @ text.T
    total = -(score.log_softmax(dim=1).diagonal().mean() + score.log_softmax(dim=0).diagonal().mean()) / 2
    return total + penalty * (image_map.square().sum() + text_map.square().sum())


@pytest.mark.parametrize("dim", [512, 768, 1024])
def test_loss_and_gradients_are_those_of_the_definition(dim):
    torch.manual_seed(0)
    model = Linear(dim, penalty=0.3).double()
    model.logit_scale.fill_(60)
    with torch.no_grad():
        model.image_map.normal_(std=0.01)
        model.text_map.normal_(std=0.01)
    x, y = torch.randn(20, dim).double(), torch.randn(20, dim).double()
    loss = model.loss(x, y)
    wanted = slow_loss(x, y, model.image_map, model.text_map, 60, model.penalty)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_are_the_numerical_ones():
    torch.manual_seed(0)
    model = Linear(5, penalty=0.3).double()
    model.logit_scale.fill_(10)
    x, y = torch.randn(6, 5).double(), torch.randn(6, 5).double()

    def loss(image_map, text_map):
        maps = {"image_map": image_map, "text_map": text_map}
        return torch.func.functional_call(
            _Loss(model), {f"model.{name}": value for name, value in maps.items()}, (x, y)
        )

    maps = [torch.randn(5, 5).double().mul(0.1).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(loss, maps)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model.loss(x, y)


def prepared(image, text, scale=30.0):
    torch.manual_seed(0)
    model = Linear(image.shape[1])
    bank = Bank(image.half(), text.half(), torch.arange(len(image)), "drawn", torch.arange(len(image)))
    model.prepare(SimpleNamespace(meta={"logit_scale": scale}), bank, quiet=True)
    return model


def test_cross_validation_learns_a_map_only_where_there_is_one():
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(200, 16, generator=rng)
    turned = torch.linalg.matrix_exp(0.2 * torch.randn(16, 16, generator=rng))
    noise = 0.3 * torch.randn(200, 16, generator=rng)
    with_map = prepared(image, image @ turned.T + noise)
    assert with_map.image_map.requires_grad and with_map.penalty.item() in np.float32(PENALTIES)
    unrelated = prepared(image, torch.randn(200, 16, generator=rng))
    assert not unrelated.image_map.requires_grad and not unrelated.image_map.any()
    assert with_map.given_scale > unrelated.given_scale  # whose scores say nothing


def test_few_pairs_choose_nothing():
    model = prepared(torch.eye(20), torch.eye(20))
    assert model.penalty == PENALTIES[0] and model.image_map.requires_grad and model.given_scale.isnan()
    with pytest.raises(ValueError, match="penalty must be 0 or more"):
        Linear(4, penalty=-1)


def test_refit_learns_from_the_given_pairs_alone():
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(200, 16, generator=rng)
    text = image @ torch.linalg.matrix_exp(0.2 * torch.randn(16, 16, generator=rng)).T
    model, state = prepared(image, text), torch.get_rng_state()
    frozen = F.normalize(image, dim=1), F.normalize(text, dim=1)
    untouched = model.refit(*frozen)(*frozen)  # prepared, but not trained yet
    assert all(map(torch.equal, untouched, frozen))
    model.image_map.data.fill_(1e-9)  # that of the run does not matter: the pairs teach another
    with torch.no_grad():
        moved = model.refit(frozen[0][:150], frozen[1][:150])(*frozen)
    again = model.refit(frozen[0][:150], frozen[1][:150])(*frozen)
    other = model.refit(frozen[0][50:], frozen[1][50:])(*frozen)
    assert all(map(torch.equal, moved, again)) and not torch.equal(moved[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    cosines = [(x[150:] * y[150:]).sum(dim=1).mean() for x, y in (frozen, moved)]
    assert cosines[1] > cosines[0] + 0.03 and not moved[0].requires_grad
