"""Symmetric von Mises-Fisher: its kernel against integrals and mpmath, its loss against loops, and edge cases."""

import mpmath
import numpy as np
import pytest
import scipy.integrate
import torch
import torch.nn.functional as F

from models.distributions import VonMisesFisher
from models.distributions.sphere import log_surface_area
from models.distributions.von_mises_fisher import log_normalizer
from models.symmetric_vmf import ExpectedLikelihood, SymmetricVMF


def tensors(*values, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype) for value in values]


def log_kernel(cos, kappa, other, dim):
    """Log integral of the product of two densities, minus log C_dim(0), elementwise."""
    normalizers = log_normalizer(kappa, dim) + log_normalizer(other, dim)
    return normalizers + ExpectedLikelihood(dim).value(cos, kappa, other)


@pytest.mark.parametrize(("kappa", "other", "angle"), [(0, 3, 1), (2, 2, np.pi), (1, 4, 0.3), (20, 30, 1.2), (5, 5, 0)])
def test_kernel_is_the_integral_of_the_product_on_the_circle(kappa, other, angle):
    k, o = tensors(kappa, other)
    mu, nu = tensors([1.0, 0.0], [np.cos(angle), np.sin(angle)])

    def product(a):
        (point,) = tensors([np.cos(a), np.sin(a)])
        densities = (VonMisesFisher(mu, k), VonMisesFisher(nu, o))
        return torch.stack([d.log_prob(point) for d in densities]).sum().exp().item()

    integral, _ = scipy.integrate.quad(product, -np.pi, np.pi, points=[0, angle], epsabs=1e-13, limit=200)
    kernel = log_kernel(mu @ nu, k, o, 2).item() - log_surface_area(2)
    np.testing.assert_allclose(kernel, np.log(integral), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [3, 8])
def test_kernel_is_the_mean_of_one_density_under_the_other(dim):
    torch.manual_seed(0)
    mu, nu = F.normalize(torch.randn(2, dim, dtype=torch.float64), dim=-1)
    k, o = tensors(4.0, 7.0)
    sample = VonMisesFisher(mu, k).sample((400_000,))
    density = VonMisesFisher(nu, o).log_prob(sample).exp()
    error = density.std() / len(sample) ** 0.5
    kernel = (log_kernel(mu @ nu, k, o, dim) - log_surface_area(dim)).exp()
    assert abs(kernel - density.mean()) < 4 * error < 0.02 * kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel_is_exact_at_the_size_of_embeddings(dtype):
    dim, relative = 512, {torch.float64: 1e-12, torch.float32: 3e-6}[dtype]
    half = mpmath.mpf(dim) / 2
    with mpmath.workdps(50):

        def log_normalizer(k):
            return -mpmath.log(mpmath.hyp0f1(half, k**2 / 4, maxterms=10**6))

        for kappa in (0.0, 0.5, 8.0, 300.0, 5000.0):
            for other in (0.25, 8.0, 300.0):
                for cos in (-1.0, -0.875, 0.0, 0.25, 1.0):  # exact in float32, as are the kappas
                    k, o, c = (mpmath.mpf(x) for x in (kappa, other, cos))
                    both = mpmath.sqrt(k**2 + o**2 + 2 * k * o * c)
                    parts = [log_normalizer(k), log_normalizer(o), log_normalizer(both)]
                    kernel = log_kernel(*tensors(cos, kappa, other, dtype=dtype), dim).item()
                    error = abs(kernel - (parts[0] + parts[1] - parts[2]))
                    assert error <= relative * max(1, *(abs(p) for p in parts)), (kappa, other, cos)


def test_kernel_has_finite_gradients_where_the_distributions_cancel():
    # Rounding takes cosines beyond -1.
    cos = torch.tensor([2.0**-20 - 1, -1.0, 0.0, 0.0, 1.0, -1 - 1e-6], requires_grad=True)
    kappa = torch.tensor([5.0, 5.0, 0.0, 0.0, 1e5, 5.0], requires_grad=True)
    other = torch.tensor([5.0, 5.0, 0.0, 7.0, 1e5, 5.0], requires_grad=True)
    value = log_kernel(cos, kappa, other, 512)
    gradients = torch.autograd.grad(value.sum(), (cos, kappa, other))
    assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients)
    torch.testing.assert_close(value[2:4], torch.zeros(2))  # the kernel with a uniform distribution is constant
    # Towards |kappa mu + other mu'| = 0 the slope of -log C(|.|) in the square is 1 / (2 D).
    torch.testing.assert_close(gradients[0][0], torch.tensor(2 * 25 / (2 * 512.0)))


def test_kernel_gradients():
    torch.manual_seed(0)
    cos = (2 * torch.rand(6, dtype=torch.float64) - 1).requires_grad_()
    kappa, other = (10 * torch.rand(2, 6, dtype=torch.float64)).requires_grad_().unbind()
    for dim in (3, 64):
        assert torch.autograd.gradcheck(lambda c, k, o, dim=dim: log_kernel(c, k, o, dim), (cos, kappa, other))


@pytest.mark.parametrize("mean", ["learned", "residual", "frozen"])
def test_loss_is_the_literal_one(mean):
    """Two cross-entropies over temperature times log C(k) + log C(l) - log C(|k mu + l nu|), by loops over pairs."""
    torch.manual_seed(0)
    adaptor = SymmetricVMF(16, mean=mean, width=8, hidden=1).double()
    with torch.no_grad():
        adaptor.log_temperature.fill_(0.3)
        for name, parameter in adaptor.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(std=0.5)
    inputs = torch.randn(2, 4, 16, dtype=torch.float64)
    image, text = adaptor.adapt_image(inputs[0]), adaptor.adapt_text(inputs[1])
    score = torch.empty(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            eta = image.spread[i] * image.mean[i] + text.spread[j] * text.mean[j]
            parts = [VonMisesFisher.log_normalizer(k, 16) for k in (image.spread[i], text.spread[j], eta.norm())]
            score[i, j] = parts[0] + parts[1] - parts[2]
    torch.testing.assert_close(adaptor.log_likelihood(image, text), score, rtol=1e-11, atol=1e-11)
    score = torch.e**0.3 * score
    literal = 0
    for i in range(4):
        literal = literal - (score[i, i] - torch.logsumexp(score[i], 0)) / 8
        literal = literal - (score[i, i] - torch.logsumexp(score[:, i], 0)) / 8
    loss = adaptor.loss(*inputs)
    torch.testing.assert_close(loss, literal, rtol=1e-10, atol=1e-12)
    parameters = [p for p in adaptor.parameters() if p.numel() > 1]
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(literal, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mean", ["learned", "residual", "frozen"])
def test_unit_length_and_empty_embeddings_are_finite(mean):
    torch.manual_seed(0)
    adaptor = SymmetricVMF(32, mean=mean, width=8, hidden=1)
    image, text = F.normalize(torch.randn(2, 6, 32), dim=-1)
    image[0] = text[0] = text[1] = 0
    if mean == "learned":
        with torch.no_grad():
            for head in (adaptor.image.eta, adaptor.text.eta):
                head[-1].weight.zero_()
                head[-1].bias.zero_()  # kappa is 0 everywhere
    loss = adaptor.loss(image, text)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in adaptor.parameters())
    for adapted in (adaptor.adapt_image(image), adaptor.adapt_text(text)):
        assert all(torch.isfinite(field).all() for field in adapted if field is not None)


def test_both_modalities_are_uncertain_by_one_over_kappa():
    torch.manual_seed(0)
    adaptor = SymmetricVMF(16, mean="learned", width=8)
    for adapted in (adaptor.adapt_image(torch.randn(5, 16)), adaptor.adapt_text(torch.randn(5, 16))):
        torch.testing.assert_close(adapted.uncertainty, 1 / adapted.spread)
