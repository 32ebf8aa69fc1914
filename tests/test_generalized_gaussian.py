"""The generalized Gaussian against scipy.stats.gennorm, by moments, and pairwise against loops."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from fresh import printed
from torch.distributions import Laplace, Normal

from models.distributions import GeneralizedGaussian

BETAS = [0.3, 0.7, 1.0, 1.5, 2.0, 8.0]


def parameters(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(*shape, generator=generator, dtype=torch.float64)
    alpha, beta = (0.3 + 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x.requires_grad_() for x in (loc, alpha, beta)]


@pytest.mark.parametrize("beta", BETAS)
def test_density_entropy_and_variance_are_scipys(beta):
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    ours = GeneralizedGaussian(*torch.tensor([0.3, 0.8, beta], dtype=torch.float64))
    theirs = scipy.stats.gennorm(beta, loc=0.3, scale=0.8)
    np.testing.assert_allclose(ours.log_prob(x), theirs.logpdf(x), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ours.log_prob(ours.loc), theirs.logpdf(0.3), rtol=1e-12)
    np.testing.assert_allclose(ours.entropy(), theirs.entropy(), rtol=1e-12)
    np.testing.assert_allclose(ours.variance, theirs.var(), rtol=1e-12)
    assert ours.mean == theirs.mean()


def test_special_cases_and_batches():
    loc, alpha, _ = (x.detach() for x in parameters(3, 4))
    x = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, two = torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(GeneralizedGaussian(loc, alpha, one).log_prob(x), Laplace(loc, alpha).log_prob(x))
    normal = Normal(loc, alpha / math.sqrt(2))
    torch.testing.assert_close(GeneralizedGaussian(loc, alpha, two).log_prob(x), normal.log_prob(x))
    assert GeneralizedGaussian(loc, alpha, one).expand((2, 3, 4)).sample((6,)).shape == (6, 2, 3, 4)
    with pytest.raises(ValueError, match="alpha"):
        GeneralizedGaussian(loc, -alpha, one)
    with pytest.raises(ValueError, match="not \\(N, D\\), \\(M, D\\)"):
        GeneralizedGaussian(loc, alpha, one).pairwise_log_prob(x[0, :, :3])


def test_log_variance_is_finite_where_the_variance_overflows():
    beta = torch.tensor(0.05, requires_grad=True)
    distribution = GeneralizedGaussian(torch.zeros(()), torch.ones(()), beta)
    assert torch.isinf(distribution.variance) and torch.isfinite(distribution.log_variance)
    expected = scipy.special.gammaln(60) - scipy.special.gammaln(20)
    np.testing.assert_allclose(distribution.log_variance.item(), expected, rtol=1e-5)
    assert torch.isfinite(torch.autograd.grad(distribution.log_variance, beta)[0])


@pytest.mark.parametrize("beta", BETAS[1:])
def test_samples_have_the_distribution_and_its_gradients(beta):
    torch.manual_seed(0)
    loc, alpha = torch.tensor(1.0, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    beta = torch.tensor(beta, requires_grad=True)
    distribution = GeneralizedGaussian(loc, alpha, beta)
    sample = distribution.rsample((200_000,))
    assert scipy.stats.kstest(sample.detach()[:20_000], scipy.stats.gennorm(beta.item(), 1.0, 0.7).cdf).pvalue > 1e-3
    # E|x - loc| = alpha Gamma(2/beta) / Gamma(1/beta), and its derivatives by alpha and beta.
    gradients = torch.autograd.grad((sample - loc.detach()).abs().mean(), (loc, alpha, beta))
    exact = alpha * (torch.lgamma(2 / beta) - torch.lgamma(1 / beta)).exp()
    expected = (0.0, *torch.autograd.grad(exact, (alpha, beta)))
    for ours, theirs in zip(gradients, expected):
        assert abs(ours - theirs) < 0.03 * max(1, abs(theirs))


def test_gradients():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *p: GeneralizedGaussian(*p, validate_args=False).log_prob(x), (x, *parameters(3, 4))
    )
    assert torch.autograd.gradcheck(
        lambda x, *p: GeneralizedGaussian(*p, validate_args=False).pairwise_log_prob(x), (x, *parameters(5, 4))
    )


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_a_residual_of_zero_has_a_finite_gradient(beta):
    loc, alpha = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), 10.0, requires_grad=True)
    distribution = GeneralizedGaussian(loc, alpha, torch.tensor(beta, requires_grad=True))
    for value in (distribution.log_prob(torch.zeros(2, 3)), distribution.pairwise_log_prob(torch.zeros(4, 3))):
        gradients = torch.autograd.grad(value.sum(), (loc, alpha, distribution.beta), allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients)


def test_pairwise_equals_the_loop_and_pairs_are_independent():
    loc, alpha, beta = (x.detach() for x in parameters(5, 7))
    points = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_prob = GeneralizedGaussian(loc, alpha, beta).pairwise_log_prob(points)
    for i in range(4):
        for j in range(5):
            expected = scipy.stats.gennorm.logpdf(points[i], beta[j], loc[j], alpha[j]).sum()
            np.testing.assert_allclose(log_prob[i, j], expected, rtol=1e-12)
    part = GeneralizedGaussian(loc[1:3], alpha[1:3], beta[1:3]).pairwise_log_prob(points[2:])
    torch.testing.assert_close(part, log_prob[2:, 1:3], rtol=1e-14, atol=1e-14)


MEASURE = """
import resource, torch
from models.distributions import GeneralizedGaussian

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(n, dim):
    loc, alpha, beta, points = torch.rand(4, n, dim).requires_grad_().unbind()
    distribution = GeneralizedGaussian(loc, 1 + alpha, 1 + beta, validate_args=False)
    distribution.pairwise_log_prob(points).logsumexp(0).sum().backward()

torch.set_num_threads(1)
run(4, 256)
before = peak()
run(400, 256)
print(peak() - before)
"""


def test_pairwise_needs_no_memory_of_pairs_times_dimensions():
    """Forward and backward in a fresh process: a single tensor of 400 x 400 x 256 would be 164 MB."""
    assert int(printed(MEASURE)) < 40e6
