"""The spherical distributions against mpmath, scipy, the power_spherical package and quadrature."""

import math
from functools import lru_cache

import mpmath
import numpy as np
import power_spherical
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.distributions import PowerSpherical, VonMisesFisher
from models.distributions import von_mises_fisher as vmf
from models.distributions.sphere import log_surface_area

FAMILIES = [VonMisesFisher, PowerSpherical]
DIMS = [2, 3, 16, 17, 34, 50, 64, 512, 768, 1024, 4096]  # 17, 34, 50: the expansions at their lowest orders
KAPPAS = [float(np.float32(10.0**e)) for e in np.linspace(-3, 6, 46)]  # exact in float32, too
VALUE_ERROR = {torch.float64: 1e-14, torch.float32: 2e-6}  # of max(1, |value|)
DERIVATIVE_ERROR = {torch.float64: 5e-15, torch.float32: 5e-7}  # of max(|derivative|, 1 / dim)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dim = pytest.mark.parametrize("dim", DIMS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def orthogonal_to(mu):
    other = unit(*mu.shape)
    return F.normalize(other - (other @ mu) * mu, dim=-1)


@lru_cache
def exact(family, dim):
    """log C(kappa) - log C(0) and its derivative over KAPPAS, to 60 digits."""
    with mpmath.workdps(60):
        rows = []
        for kappa in map(mpmath.mpf, KAPPAS):
            if family is VonMisesFisher:
                half, z = mpmath.mpf(dim) / 2, kappa**2 / 4
                bessel = mpmath.hyp0f1(half, z, maxterms=10**6)
                rows.append((-mpmath.log(bessel), -kappa / dim * mpmath.hyp0f1(half + 1, z, maxterms=10**6) / bessel))
            else:
                b, g, ln2 = mpmath.mpf(dim - 1) / 2, mpmath.loggamma, mpmath.log(2)
                value = g(2 * b + kappa) - g(2 * b) - g(b + kappa) + g(b) - kappa * ln2
                rows.append((value, mpmath.digamma(2 * b + kappa) - mpmath.digamma(b + kappa) - ln2))
        return rows


def value_and_derivative(family, kappa, dim):
    value = family.log_normalizer(kappa, dim)
    return value, *torch.autograd.grad(value.sum(), kappa, create_graph=True)


@every_family
@every_dim
@every_dtype
def test_log_normalizer_is_exact(family, dim, dtype):
    kappa = torch.tensor(KAPPAS, dtype=dtype, requires_grad=True)
    value, derivative = value_and_derivative(family, kappa, dim)
    with mpmath.workdps(60):
        for k, f, df, (true_f, true_df) in zip(KAPPAS, value.tolist(), derivative.tolist(), exact(family, dim)):
            assert abs(f - true_f) <= VALUE_ERROR[dtype] * max(1, abs(true_f)), k
            assert abs(df - true_df) <= DERIVATIVE_ERROR[dtype] * max(abs(true_df), 1 / dim), k


@every_dim
def test_concentration_of_a_mean_resultant_length(dim):
    """The length of the concentration that it gives is the length; small concentrations themselves have all digits."""
    kappa = torch.tensor([0.0, *KAPPAS], dtype=torch.float64)
    length = vmf.mean_resultant_length(kappa, dim)
    back = vmf.concentration_of(length, dim)
    torch.testing.assert_close(vmf.mean_resultant_length(back, dim), length, rtol=1e-14, atol=0)
    moderate = kappa < 100 * dim
    torch.testing.assert_close(back[moderate], kappa[moderate], rtol=1e-11, atol=0)


@every_family
@every_dim
@every_dtype
def test_everything_is_finite_from_zero_on(family, dim, dtype):
    kappa = torch.tensor([0.0, 1e-30, *KAPPAS], dtype=dtype, requires_grad=True)
    value, derivative = value_and_derivative(family, kappa, dim)
    (second,) = torch.autograd.grad(derivative.sum(), kappa)
    assert abs(value[0]) <= torch.finfo(dtype).eps
    assert all(t.isfinite().all() for t in (value, derivative, second))
    assert torch.equal(derivative, family.log_normalizer_derivative(kappa, dim))
    length = family.mean_resultant_length(kappa, dim)
    assert length[0] == 0 and (length.diff() >= 0).all() and (length <= 1).all()


class _NoFloat64NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a value on the host"
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), f"{func} computes in float64"
        return out


@every_family
@pytest.mark.parametrize("dim", [3, 512])
def test_float32_needs_no_float64_and_no_synchronization(family, dim):
    kappa = torch.tensor([0.0, 3.0, 700.0], requires_grad=True)
    with _NoFloat64NoSync():
        value, _ = value_and_derivative(family, kappa, dim)
        family.mean_resultant_length(kappa, dim)
    assert value.dtype == torch.float32


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(family, dtype):
    kappa = torch.tensor([0.0, 1.5, 300.0], dtype=dtype, requires_grad=True)
    for function in (family.log_normalizer, family.log_normalizer_derivative):
        assert torch.equal(function(kappa, 512), function(kappa.float(), 512).to(dtype))
    assert value_and_derivative(family, kappa, 512)[1].dtype == dtype


@every_family
@pytest.mark.parametrize("dim", [2, 3, 16, 512])
def test_gradients_of_both_orders(family, dim):
    kappa = torch.tensor([1e-2, 0.7, 12.0, 300.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(family.log_normalizer, (kappa, dim))
    assert torch.autograd.gradgradcheck(family.log_normalizer, (kappa, dim))
    assert torch.autograd.gradcheck(family.mean_resultant_length, (kappa, dim))


def test_surface_areas():
    assert [log_surface_area(d) for d in (2, 3, 4)] == pytest.approx(
        [math.log(2 * math.pi), math.log(4 * math.pi), math.log(2 * math.pi**2)], rel=1e-15
    )


@pytest.mark.parametrize("dim, kappa", [(2, 0.3), (3, 1.0), (3, 700.0), (16, 8.0), (64, 50.0), (512, 600.0)])
def test_von_mises_fisher_is_scipys(dim, kappa):
    mu, x = unit(dim), unit(20, dim)
    ours, scipys = VonMisesFisher(mu, torch.tensor(kappa, dtype=torch.float64)), scipy.stats.vonmises_fisher(mu, kappa)
    np.testing.assert_allclose(ours.log_prob(x), scipys.logpdf(x), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(ours.entropy(), scipys.entropy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim, kappa", [(2, 0.3), (3, 1.0), (3, 700.0), (64, 50.0), (512, 12.0)])
def test_power_spherical_is_its_authors(dim, kappa):
    mu, x, kappa = unit(dim), unit(20, dim), torch.tensor(kappa, dtype=torch.float64)
    ours, theirs = PowerSpherical(mu, kappa), power_spherical.PowerSpherical(mu, kappa)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-10, atol=1e-10)


@every_family
@pytest.mark.parametrize("dim, kappa", [(3, 5.0), (512, 5.0), (512, 400.0)])
def test_density_integrates_to_one_and_entropy_is_its_expectation(family, dim, kappa):
    mu = unit(dim)
    distribution = family(mu, torch.tensor(kappa, dtype=torch.float64))
    side = orthogonal_to(mu)

    def marginal(angle):
        """Log density at an angle to mu, and the mass per radian on the parallel there."""
        log_prob = distribution.log_prob(math.cos(angle) * mu + math.sin(angle) * side).item()
        return log_prob, math.exp(log_prob + log_surface_area(dim - 1) + (dim - 2) * math.log(math.sin(angle)))

    def integral(f):
        return scipy.integrate.quad(f, 1e-9, math.pi - 1e-9, epsabs=0, epsrel=1e-9, limit=200, points=[0.8, 1.5])[0]

    assert integral(lambda a: marginal(a)[1]) == pytest.approx(1, abs=1e-7)
    expected = integral(lambda a: -marginal(a)[0] * marginal(a)[1])
    assert distribution.entropy().item() == pytest.approx(expected, rel=1e-7)


@every_family
def test_pairwise_is_the_loop(family):
    mu, kappa, points = unit(5, 64), torch.rand(5, dtype=torch.float64) * 100, unit(7, 64)
    pairwise = family(mu, kappa).pairwise_log_prob(points)
    loop = torch.stack([family(m, k).log_prob(points) for m, k in zip(mu, kappa)], dim=1)
    assert pairwise.shape == (7, 5)
    torch.testing.assert_close(pairwise, loop, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pairwise, family(mu, kappa).log_prob(points[:, None]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="points"):
        family(mu, kappa).pairwise_log_prob(points[0])
    with pytest.raises(ValueError, match="points"):
        family(mu[0], kappa[0]).pairwise_log_prob(points)


@every_family
@every_dtype
@pytest.mark.parametrize("cos", [-1.0, -1.0 - 1e-7, -1.0 - 1e-6])
def test_opposite_points_are_finite(family, dtype, cos):
    mu = torch.eye(3, dtype=dtype)[:1].requires_grad_()
    kappa = torch.tensor([30.0], dtype=dtype, requires_grad=True)
    point = torch.tensor([[cos, 0, 0]], dtype=dtype)
    distribution = family(mu, kappa)
    for log_prob in (distribution.log_prob(point), distribution.pairwise_log_prob(point)):
        gradients = torch.autograd.grad(log_prob.sum(), (mu, kappa), retain_graph=True)
        assert log_prob.isfinite().all() and all(g.isfinite().all() for g in gradients)


@every_family
@pytest.mark.parametrize("dim", [3, 64, 512])
@pytest.mark.parametrize("kappa", [1.0, 12.0, 50.0, 500.0])
def test_sample_moments(family, dim, kappa):
    mu, count = unit(dim), 8000
    kappa = torch.tensor(kappa, dtype=torch.float64)
    distribution = family(mu, kappa)
    cos = distribution.sample((count,)) @ mu
    along = distribution.mean @ mu
    assert abs(cos.mean() - along) < 4.5 * cos.std() / count**0.5
    if family is VonMisesFisher:  # the second moment: A' = 1 - A^2 - (D-1) A / kappa is the variance
        square = cos.square()
        assert abs(square.mean() - (1 - (dim - 1) * along / kappa)) < 4.5 * square.std() / count**0.5
    else:
        log = cos.log1p()
        expected = -family.log_normalizer_derivative(kappa, dim)
        assert abs(log.mean() - expected) < 4.5 * log.std() / count**0.5


@every_family
@every_dtype
@pytest.mark.parametrize("dim", [2, 3, 512])
def test_samples_lie_on_the_sphere_around_any_mean(family, dim, dtype):
    pole = torch.eye(dim, dtype=dtype)[0]
    mu = torch.stack([pole, -pole, pole.flip(0), unit(dim, dtype=dtype)]).requires_grad_()
    for kappa in (0.0, 20.0, 1e6):
        kappas = torch.full((4,), kappa, dtype=dtype, requires_grad=True)
        samples = family(mu, kappas).rsample((500,))
        assert samples.shape == (500, 4, dim) and samples.dtype == dtype
        assert (samples.norm(dim=-1) - 1).abs().max() < 8 * torch.finfo(dtype).eps
        if kappa == 1e6:
            assert ((samples * mu).sum(-1) > 0.99).all()
        gradients = torch.autograd.grad(samples.pow(3).sum(), (mu, kappas))
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dim", [2, 3, 16, 64, 512])
@pytest.mark.parametrize("kappa", [0.5, 12.0, 50.0, 500.0])
def test_implicit_gradient_moves_along_the_exact_distribution_function(dim, kappa):
    mode = math.acos(2 * kappa / ((dim - 2) + math.sqrt((dim - 2) ** 2 + 4 * kappa**2)))
    scale = (kappa * math.cos(mode) + (dim - 2) / max(math.sin(mode), 1e-3) ** 2) ** -0.5

    def density(angle, k):  # not normalized; 1 at the mode
        fall = k * (math.cos(angle) - math.cos(mode))
        return math.exp(fall + (dim - 2) * math.log(math.sin(angle) / math.sin(mode)) if dim > 2 else fall)

    def integral(low, high, k):
        low, high = max(low, mode - 14 * scale, 1e-12), min(high, mode + 14 * scale, math.pi - 1e-12)
        return scipy.integrate.quad(density, low, high, args=(k,), epsabs=0, epsrel=1e-13, limit=200)[0]

    def cdf(angle, k):
        below, above = integral(0, angle, k), integral(angle, math.pi, k)
        return below / (below + above)

    angles = [mode + z * scale for z in (-2.5, -1, -0.1, 0, 0.1, 0.5, 1, 1.5, 2.5)]
    angles = [angle for angle in angles if 0.01 < angle < math.pi - 0.01]
    assert len(angles) > 2
    ours = vmf._angle_derivative(*torch.tensor([angles, [kappa] * len(angles)], dtype=torch.float64), dim)
    for angle, derivative in zip(angles, ours.tolist()):
        h = 1e-3 * min(kappa, 10)
        near, far = (cdf(angle, kappa + step) - cdf(angle, kappa - step) for step in (h, 2 * h))
        in_angle = density(angle, kappa) / (integral(0, angle, kappa) + integral(angle, math.pi, kappa))
        assert derivative == pytest.approx(-(8 * near - far) / (12 * h) / in_angle, rel=1e-6)


@every_family
@pytest.mark.parametrize("dim", [3, 16, 512])
@pytest.mark.parametrize("kappa", [1.0, 12.0, 500.0])
def test_sample_gradient_in_kappa(family, dim, kappa):
    mu, count = unit(dim), 5000
    kappas = torch.full((count,), kappa, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad((family(mu, kappas).rsample() @ mu).sum(), kappas)
    if family is VonMisesFisher:
        length = float(family.mean_resultant_length(kappas[0].detach(), dim))
        expected = 1 - length**2 - (dim - 1) * length / kappa
    else:
        expected = (dim - 1) / (kappa + dim - 1) ** 2
    assert abs(slopes.mean() - expected) < 4.5 * slopes.std() / count**0.5 + 1e-4 * expected


@every_family
@pytest.mark.parametrize("dim", [3, 64])
def test_sample_gradient_in_the_mean_direction(family, dim):
    mu, count = unit(dim), 4000
    turn, probe = orthogonal_to(mu), unit(dim)
    mus = mu.repeat(count, 1).requires_grad_()
    distribution = family(mus, torch.tensor(15.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((distribution.rsample() @ probe).sum(), mus)
    slopes = gradient @ turn
    expected = family.mean_resultant_length(torch.tensor(15.0, dtype=torch.float64), dim) * (probe @ turn)
    assert abs(slopes.mean() - expected) < 4.5 * slopes.std() / count**0.5


@every_family
def test_shapes_expand_and_refusals(family):
    distribution = family(unit(3, 8), torch.tensor(5.0, dtype=torch.float64))
    assert distribution.batch_shape == (3,) and distribution.event_shape == (8,)
    assert distribution.mean.shape == (3, 8) and distribution.entropy().shape == (3,)
    wide = distribution.expand((4, 3))
    assert type(wide) is family and wide.batch_shape == (4, 3) and wide.sample((2,)).shape == (2, 4, 3, 8)
    torch.testing.assert_close(wide.entropy(), distribution.entropy().expand(4, 3))
    with pytest.raises(ValueError, match="do not fit"):
        family(unit(3, 8), torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="loc"):
        family(2 * unit(8), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="concentration"):
        family(unit(8), torch.tensor(-1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(2 * unit(8))


def test_rejection_ends_on_not_a_number():
    kappa = torch.tensor([5.0, math.nan], dtype=torch.float64)
    sample = VonMisesFisher(unit(2, 8), kappa, validate_args=False).sample()
    assert sample[0].isfinite().all() and sample[1].isnan().all()
