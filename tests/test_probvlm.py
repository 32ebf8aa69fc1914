"""ProbVLM: parity of its `reference` preset with the public suite, its two likelihoods, and edge cases."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from golden import problem, recorded, reference

from benchmarks.published import fit_shape, residuals
from models.probvlm import LIKELIHOOD_WEIGHT, ProbVLM, exact_nll, surrogate_nll
from utils.config import load_config, make_adaptor


def test_reference_preset_equals_the_public_suite():
    golden, adaptor = recorded("probvlm"), reference("probvlm")
    image, text = problem()
    adapted_image, adapted_text = adaptor.adapt_image(image), adaptor.adapt_text(text)
    loss = adaptor.loss(image, text)
    loss.backward()
    outputs = {
        "loss": loss.item(),
        "text_uncertainty": adapted_text.uncertainty.tolist(),
        "image_uncertainty": adapted_image.uncertainty.tolist(),
        "text_mean_first8": adapted_text.mean[:, :8].tolist(),
        "score": adaptor.similarity(adapted_image, adapted_text).tolist(),
        "grad_norms": [p.grad.norm().item() for p in adaptor.parameters()],
    }
    assert outputs.keys() == golden.keys()
    for name, value in outputs.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-10, err_msg=name)


@pytest.mark.parametrize(("law", "beta"), [(scipy.stats.laplace, 1), (scipy.stats.norm, 2)])
def test_the_exact_likelihood_recovers_the_shape_and_the_variance(law, beta):
    residual = residuals(law(scale=0.3))
    inverse_alpha, fitted = fit_shape(exact_nll, residual).tolist()
    assert abs(fitted - beta) < 0.01
    variance = scipy.stats.gennorm(fitted, scale=1 / inverse_alpha).var()
    assert abs(variance / residual.square().mean() - 1) < 0.01


@pytest.mark.parametrize("law", [scipy.stats.laplace, scipy.stats.norm, scipy.stats.uniform(-1, 2), scipy.stats.t(3)])
def test_the_surrogate_prefers_one_shape_for_any_data(law):
    # Its clamp and its offsets move the optimum by about 1e-4.
    assert abs(fit_shape(surrogate_nll, residuals(law))[1] - 0.68417) < 5e-4


@pytest.mark.parametrize("preset", ["default", "reference"])
@pytest.mark.parametrize("mean", ["frozen", "residual", "learned"])
def test_loss_is_the_literal_one(preset, mean):
    """L1 and likelihood of each modality's distribution against itself and the other, by loops over the numbers."""
    torch.manual_seed(0)
    settings = [f"model.mean={mean}", "model.width=8"]
    adaptor = make_adaptor(load_config("coco", "probvlm", preset=preset, settings=settings), 5).double()
    heads = {"image": adaptor.image, "text": adaptor.text}
    for head in heads.values():
        if mean == "residual":
            torch.nn.init.normal_(head.mean.head[-1].weight)
        if mean != "learned":
            torch.nn.init.normal_(head.gap)
    image, text = torch.randn(2, 4, 5, dtype=torch.float64)
    z = {"image": image, "text": text}
    if preset == "default":
        z = {name: math.sqrt(5) * x / x.norm(dim=1, keepdim=True) for name, x in z.items()}
    means = {name: heads[name](z[name])[0] for name in z}
    literal = 0
    for name, other in (("image", "text"), ("text", "image")):
        _, inverse_alpha, beta = heads[name](z[name])
        inverse_alpha, beta = inverse_alpha + 1e-4, beta + 1e-4
        terms = [(1, z[name], means[name]), (1e-4, z[other], means[name])]
        if mean != "learned":  # a kept mean: the cross-modal term alone, beyond the modality gap
            terms = [(1, z[other], means[name].detach() + heads[name].gap)]
        for weight, target, mu in terms:
            for i in range(4):
                for d in range(5):
                    r, a, b = (target[i, d] - mu[i, d]).abs(), inverse_alpha[i, d], beta[i, d]
                    if preset == "default":
                        nll = (r * a) ** b - a.log() - torch.log(b / (2 * torch.exp(torch.lgamma(1 / b))))
                    else:
                        nll = (b * r * a).clamp(1e-4, 1e3) - a.log() + torch.lgamma(1 / b) - b.log()
                    literal = literal + weight * (r + LIKELIHOOD_WEIGHT * nll) / 20
    if mean == "residual":
        for i in range(4):
            cosines = torch.stack([F.cosine_similarity(means["image"][i], means["text"][j], dim=0) for j in range(4)])
            reverse = torch.stack([F.cosine_similarity(means["text"][i], means["image"][j], dim=0) for j in range(4)])
            literal = literal + sum(torch.logsumexp(x / 0.07, 0) - x[i] / 0.07 for x in (cosines, reverse)) / 8
    loss = adaptor.loss(image, text)
    torch.testing.assert_close(loss, literal, rtol=1e-12, atol=1e-12)
    parameters = [p for p in adaptor.parameters() if p.numel() > 1]
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(literal, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def small(**options):
    torch.manual_seed(0)
    return ProbVLM(4, width=6, **options).double()


def test_gradients():
    inputs = [x.requires_grad_() for x in torch.randn(2, 3, 4, dtype=torch.float64)]
    # The loss of a kept mean detaches it; test_loss_is_the_literal_one checks its gradients.
    assert torch.autograd.gradcheck(small(mean="learned").loss, inputs)
    assert torch.autograd.gradcheck(small().unified_loss, inputs)


def test_a_pairs_score_is_minus_its_cross_modal_term():
    adaptor = small()
    for head in (adaptor.image, adaptor.text):
        torch.nn.init.normal_(head.gap)
    image, text = torch.randn(2, 3, 4, dtype=torch.float64)
    score = adaptor.log_likelihood(adaptor.adapt_image(image), adaptor.adapt_text(text))
    z_image, z_text = (2 * F.normalize(x, dim=-1) for x in (image, text))
    for i in range(3):
        for j in range(3):
            mean, *shape = (x[j] for x in adaptor.text(z_text))
            pair = exact_nll(z_image[i], mean + adaptor.text.gap, *shape).sum()
            mean, *shape = (x[i] for x in adaptor.image(z_image))
            pair = pair + exact_nll(z_text[j], mean + adaptor.image.gap, *shape).sum()
            torch.testing.assert_close(score[i, j], -pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", ["frozen", "residual"])
def test_a_kept_mean_starts_with_the_scores_of_clip(mean):
    adaptor = small(mean=mean)
    image, text = torch.randn(2, 5, 4, dtype=torch.float64)
    score = adaptor.similarity(adaptor.adapt_image(image), adaptor.adapt_text(text))
    torch.testing.assert_close(score, F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T)


def test_one_dimension_of_huge_variance_does_not_hide_the_others():
    adaptor = small()
    text = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        adaptor.text.beta[-1].bias[0] = -40  # beta at its floor
        adaptor.text.inverse_alpha[-1].bias[0] = -20
        before = adaptor.adapt_text(text).uncertainty
        adaptor.text.inverse_alpha[-1].bias[1:] -= 1
        after = adaptor.adapt_text(text).uncertainty
    assert (after > 1.2 * before).all()


@pytest.mark.parametrize("preset", ["default", "reference", "official"])
@pytest.mark.parametrize("objective", ["loss", "unified_loss"])
def test_unit_length_and_empty_embeddings_are_finite(preset, objective):
    torch.manual_seed(0)
    adaptor = make_adaptor(load_config("coco", "probvlm", preset=preset, settings=["model.width=16"]), 32)
    image, text = F.normalize(torch.randn(2, 6, 32), dim=-1)
    image[0] = text[0] = text[1] = 0
    optimizer = torch.optim.SGD(adaptor.parameters(), lr=1e-2)
    for _ in range(5):
        loss = getattr(adaptor, objective)(image, text)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in adaptor.parameters() if p.grad is not None]
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)
        optimizer.step()
    for adapted in (adaptor.adapt_image(image), adaptor.adapt_text(text)):
        assert all(torch.isfinite(field).all() for field in adapted if field is not None)
