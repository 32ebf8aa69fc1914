"""AsymVLM: parity of its `reference` preset with the public suite, its literal loss, and edge cases."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import problem, recorded, reference

from models.asymvlm import AsymVLM
from models.pair_loss import info_nce
from utils.config import load_config, make_adaptor


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("family", ["vmf", "psd"])
def test_reference_preset_equals_the_public_suite(family, sharp):
    golden = recorded("asymvlm")[f"sharp {family}" if sharp else family]
    adaptor = reference(f"asymvlm-{family}", last_layer=60 if sharp else 1)
    image, text = problem()
    adapted_image, adapted_text = adaptor.adapt_image(image), adaptor.adapt_text(text)
    loss = adaptor.loss(image, text)
    loss.backward()
    outputs = {
        "loss": loss.item(),
        "text_uncertainty": adapted_text.uncertainty.tolist(),
        "text_mean_first8": adapted_text.mean[:, :8].tolist(),
        "score": adaptor.log_likelihood(adapted_image, adapted_text).detach().numpy(),
        "grad_norms": [p.grad.norm().item() for p in adaptor.parameters()],
    }
    # The public code adds its constant for power spherical, too; ours leaves log C_D(0) out of every score.
    if family == "psd":
        m = (512 - 1) / 2
        zero = torch.tensor(m, dtype=torch.float64)
        constant = -(2 * m * np.log(2) + torch.lgamma(zero) - torch.lgamma(2 * zero) + m * np.log(np.pi))
        outputs["score"] = outputs["score"] + constant.item()
    for name, value in outputs.items():
        if golden[name] is not None:
            np.testing.assert_allclose(value, golden[name], rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("family", ["von-mises-fisher", "power-spherical"])
def test_eta_of_zero_and_opposite_pairs_are_finite(family):
    adaptor = AsymVLM(dim=8, family=family, mean="learned", width=4, hidden=1)
    torch.nn.init.zeros_(adaptor.text.eta[-1].weight)
    with torch.no_grad():
        adaptor.text.eta[-1].bias.zero_()
    image = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    loss = adaptor.loss(image, image)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(adaptor.adapt_text(image).uncertainty).all()
    gradient = adaptor.text.eta[-1].bias.grad
    assert torch.isfinite(gradient).all()
    # At eta = 0 the score eta . x + log C has the gradient x, so the gradient of the loss is that of plain logits.
    eta = torch.zeros(3, 8, requires_grad=True)
    info_nce(image @ eta.T).backward()
    torch.testing.assert_close(gradient, eta.grad.sum(dim=0), atol=1e-6, rtol=1e-5)

    adaptor.text.eta = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        adaptor.text.eta[0].weight.copy_(-50 * torch.eye(8))  # every caption points away from its own image
    adaptor.zero_grad()
    loss = adaptor.loss(image, image)
    loss.backward()
    assert torch.isfinite(loss) and all(
        torch.isfinite(p.grad).all() for p in adaptor.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("family", ["von-mises-fisher", "power-spherical"])
@pytest.mark.parametrize("dim", [3, 512])
def test_loss_is_the_literal_one(family, dim):
    """Two cross-entropies of temperature times log density, by loops over pairs, with gradients."""
    torch.manual_seed(0)
    adaptor = AsymVLM(dim=dim, family=family, mean="learned", width=16, hidden=2).double()
    with torch.no_grad():
        adaptor.log_temperature.fill_(0.3)
        adaptor.text.eta[-1].weight.mul_(30)
    image, text = torch.randn(2, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eta = adaptor.text.eta(text)
    score = torch.empty(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            kappa = eta[j].norm()
            point = image[i] / image[i].norm()
            score[i, j] = adaptor.family(eta[j] / kappa, kappa, validate_args=False).log_prob(point)
    score = torch.e**0.3 * score
    literal = 0
    for i in range(5):
        literal = literal - (score[i, i] - torch.logsumexp(score[i], 0)) / 10
        literal = literal - (score[i, i] - torch.logsumexp(score[:, i], 0)) / 10
    loss = adaptor.loss(image, text)
    torch.testing.assert_close(loss, literal, rtol=1e-10, atol=1e-12)
    parameters = list(adaptor.text.eta.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(literal, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_text_to_image_ranks_by_cosine_of_the_mean():
    torch.manual_seed(0)
    adaptor = AsymVLM(dim=16, width=8)
    image, text = adaptor.adapt_image(torch.randn(20, 16)), adaptor.adapt_text(torch.randn(7, 16))
    likelihood, cosine = adaptor.log_likelihood(image, text), adaptor.similarity(image, text)
    assert (likelihood.argsort(dim=0) == cosine.argsort(dim=0)).all()


@pytest.mark.parametrize("method", ["asymvlm-vmf", "asymvlm-psd"])
@pytest.mark.parametrize("mean", ["frozen", "residual"])
def test_a_kept_mean_starts_at_the_frozen_direction_and_a_useful_kappa(method, mean):
    torch.manual_seed(0)
    adaptor = make_adaptor(load_config("coco", method, settings=[f"model.mean={mean}", "model.width=32"]), 64).double()
    image, text = torch.randn(2, 6, 64, dtype=torch.float64)
    text[0] = 0  # an embedding of zeros has no direction, and does not affect the others
    adapted = adaptor.adapt_text(text)
    torch.testing.assert_close(adapted.mean, F.normalize(text, dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapted.spread[1:], torch.full((5,), 8.0, dtype=torch.float64))  # sqrt(D)
    optimizer = torch.optim.Adam(adaptor.parameters(), lr=1e-2)
    before = adaptor.loss(image, text).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss = adaptor.loss(image, text)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in adaptor.parameters())
        optimizer.step()
    assert loss.item() < before
    adapted = adaptor.adapt_text(text)
    assert (adapted.mean[1:] == F.normalize(text[1:], dim=-1)).all() == (mean == "frozen")
    assert adapted.spread.std() > 0
    torch.testing.assert_close(adapted.uncertainty, 1 / adapted.spread)


def test_kappa_of_zero_and_unit_length_embeddings_are_finite():
    adaptor = AsymVLM(dim=8, mean="frozen", width=4, hidden=1)
    with torch.no_grad():
        adaptor.text.kappa[-1].bias.fill_(-1e4)  # softplus underflows
    text = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    loss = adaptor.loss(text.flip(0), text)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(adaptor.adapt_text(text).uncertainty).all()
    assert all(torch.isfinite(p.grad).all() for p in adaptor.parameters())
