"""Every method's `log_likelihood` against the density that it stands for, pair by pair, so that no factor hides.

A posterior over a gallery is the softmax of this score: a constant over the gallery changes nothing, a factor does.
Oracles come from torch.distributions and from quadrature, not from the suite's own formulas.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate

from models.distributions import PowerSpherical, VonMisesFisher
from utils.config import known, load_config, make_adaptor

DIM, IMAGES, CAPTIONS = 24, 5, 7


def of_vmf(adaptor, image, text):
    """Density of the image under the caption's distribution."""
    return VonMisesFisher(text.mean, text.spread).log_prob(image.mean)


def of_psd(adaptor, image, text):
    return PowerSpherical(text.mean, text.spread).log_prob(image.mean)


def of_two_vmf(adaptor, image, text):
    """Integral of the product of both densities over the sphere, along the axis of its own mean direction."""
    total = image.spread * image.mean + text.spread * text.mean
    length = total.norm().item()
    constants = [VonMisesFisher(side.mean, side.spread).log_prob(side.mean) - side.spread for side in (image, text)]
    # The product is exp(length cos) C C'; the circle of latitude at angle a has area S_(D-2) sin(a)^(D-2).
    area = math.log(2) + (DIM - 1) / 2 * math.log(math.pi) - math.lgamma((DIM - 1) / 2)
    value, _ = integrate.quad(lambda a: math.exp(length * (math.cos(a) - 1)) * math.sin(a) ** (DIM - 2), 0, math.pi)
    return sum(constants) + length + area + math.log(value)


def of_gaussians(adaptor, image, text):
    """Density that both embeddings are the same point: an integral of two normal densities in every coordinate."""
    variances = [side.uncertainty.expand(DIM) if adaptor.isotropic else side.spread.exp() for side in (image, text)]
    return torch.distributions.Normal(image.mean, sum(variances).sqrt()).log_prob(text.mean).sum()


def of_generalized_gaussians(adaptor, image, text):
    """log p(image | caption) + log p(caption | image), so twice as many nats as one of them."""

    def log_density(of, head, x):
        inverse_alpha, beta, _ = of.spread
        alpha, beta, residual = 1 / (inverse_alpha + 1e-4), beta + 1e-4, (x - of.mean - head.gap).abs()
        constant = torch.log(beta) - math.log(2) - torch.log(alpha) - torch.lgamma(1 / beta)
        return (constant - (residual / alpha) ** beta).sum()

    return log_density(text, adaptor.text, image.spread[2]) + log_density(image, adaptor.image, text.spread[2])


def of_matching(adaptor, image, text):
    """Log odds that the pair matches: minus a scale times the mean squared distance of samples, up to a constant."""
    distance = (image.mean - text.mean).square().sum() + (image.spread.exp() + text.spread.exp()).sum()
    slope = {"PCMEPP": 1, "ProLIP": 0.5}[type(adaptor).__name__]
    return -slope * adaptor.scale * distance


def of_cosine(adaptor, image, text):
    return F.cosine_similarity(image.mean, text.mean, dim=0)


def of_scaled_cosine(adaptor, image, text):
    return adaptor.logit_scale * of_cosine(adaptor, image, text)


ORACLES = {
    "linear": of_scaled_cosine,
    "asymvlm-vmf": of_vmf, "asymvlm-psd": of_psd, "symmetric-vmf": of_two_vmf, "pfe": of_gaussians,
    "probvlm": of_generalized_gaussians, "pcmepp": of_matching, "prolip": of_matching,
    **dict.fromkeys(("clip", "loss-prediction"), of_cosine),
    **dict.fromkeys(("knn", "kde", "typicality", "density", "vmf-mixture", "flow", "joint-flow"), of_cosine),
}  # fmt: skip
# tests/test_prob_cosine.py and tests/test_bayesvlm.py compare its logits with quadrature, draws and real factors.
ELSEWHERE = {"bayesvlm"}


def test_every_method_has_an_oracle():
    assert set(known("methods")) == ORACLES.keys() | ELSEWHERE


@pytest.mark.parametrize(
    ("method", "settings"), [*((name, []) for name in ORACLES), ("pfe", ["model.isotropic=false"])]
)
def test_the_score_is_the_log_density(method, settings):
    torch.manual_seed(0)
    adaptor = make_adaptor(load_config("coco", method, settings=settings), DIM).double().eval()
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (IMAGES, CAPTIONS))
    with torch.no_grad():
        for name, parameter in adaptor.named_parameters():
            if name.endswith("weight"):  # so that uncertainties differ
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        image, text = adaptor.adapt_image(image), adaptor.adapt_text(text)
        score = adaptor.log_likelihood(image, text)
        rows = [[ORACLES[method](adaptor, image.rows(i), text.rows(j)) for j in range(CAPTIONS)] for i in range(IMAGES)]
    oracle = torch.tensor(rows, dtype=torch.float64)
    for side in (0, 1):  # each caption over the images, and each image over the captions
        torch.testing.assert_close(score.log_softmax(side), oracle.log_softmax(side), rtol=1e-8, atol=1e-8)
    assert (score - score[:1, :1]).abs().max() > 1e-3
