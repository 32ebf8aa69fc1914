"""The mixture of von Mises-Fisher densities against loops, mpmath's Bessel functions and densities that are known."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check_method import Drawn

from datasets.bank import draw
from models import vmf_mixture
from models.density import KDE, SIDES
from models.distributions import PowerSpherical, VonMisesFisher
from models.distributions.sphere import log_surface_area
from models.vmf_mixture import Mixture, VMFMixture, choose, fit, log_density, maximized

DIMS = pytest.mark.parametrize("dim", [3, 16, 64, 512])


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def example(dim, count=3):
    """A mixture, one of whose components is uniform."""
    kappa = dim * torch.linspace(0, 2, count, dtype=torch.float64)
    return Mixture(unit(count, dim), kappa, torch.arange(1.0, count + 1, dtype=torch.float64).softmax(0).log())


def drawn_from(mixture, count, seed=0):
    """Samples (N, D) of a mixture."""
    torch.manual_seed(seed)
    component = torch.multinomial(mixture.log_weight.exp(), count, replacement=True)
    return VonMisesFisher(mixture.loc[component], mixture.kappa[component]).sample()


def known(name, dim):
    """Samples of a density that is known, and its logarithm in nats above the uniform density."""
    torch.manual_seed(0)
    pole, area = unit(dim, seed=5), log_surface_area(dim)
    if name == "mixture":
        mixture = Mixture(unit(4, dim), torch.full((4,), 3.0 * dim, dtype=torch.float64), torch.full((4,), 0.25).log())
        return drawn_from(mixture, 2200), lambda x: log_density(x, mixture)
    kappa = torch.tensor(0.0 if name == "uniform" else 2.0 * dim, dtype=torch.float64)
    family = (PowerSpherical if name == "power-spherical" else VonMisesFisher)(pole, kappa)
    return family.sample((2200,)), lambda x: family.log_prob(x) + area


def slow_log_c(kappa, dim):
    """log C_D(kappa) - log C_D(0) to 40 digits."""
    with mpmath.workdps(40):
        return -mpmath.log(mpmath.hyp0f1(mpmath.mpf(dim) / 2, mpmath.mpf(kappa) ** 2 / 4, maxterms=10**6))


@DIMS
def test_log_density_is_that_of_a_loop(dim):
    mixture, x = example(dim), unit(5, dim, seed=1)
    for item, value in zip(x, log_density(3 * x, mixture), strict=True):
        total = sum(
            mpmath.exp(weight.item() + slow_log_c(kappa.item(), dim) + kappa.item() * float(item @ loc))
            for loc, kappa, weight in zip(*mixture, strict=True)
        )
        assert abs(value - float(mpmath.log(total))) < 1e-10


@DIMS
def test_a_step_is_that_of_a_loop(dim):
    """Weights, directions and concentrations of the components, item by item, with mpmath's Bessel functions."""
    x, share = drawn_from(example(dim), 40), torch.rand(40, 2, generator=torch.Generator().manual_seed(2)).double()
    share = torch.cat([share / 4, 1 - share.sum(dim=1, keepdim=True) / 4], dim=1)
    mixture = maximized(x, share)
    for k in range(3):
        count = sum(float(share[i, k]) for i in range(40))
        resultant = sum(float(share[i, k]) * x[i].numpy() for i in range(40))
        length = np.linalg.norm(resultant)
        assert mixture.log_weight[k].exp() == pytest.approx(count / 40, rel=1e-12)
        np.testing.assert_allclose(mixture.loc[k], resultant / length, atol=1e-12)
        kappa = mpmath.mpf(mixture.kappa[k].item())
        with mpmath.workdps(40):
            ratio = mpmath.besseli(mpmath.mpf(dim) / 2, kappa) / mpmath.besseli(mpmath.mpf(dim) / 2 - 1, kappa)
        assert float(ratio) == pytest.approx(length / (count + 1), rel=1e-9)


@pytest.mark.parametrize("dim", [3, 64])
def test_no_step_lowers_the_posterior(dim):
    """Log likelihood and log prior of the concentrations, through steps from a random start."""
    x = drawn_from(example(dim), 300)
    share, last = torch.rand(300, 5, generator=torch.Generator().manual_seed(0)).double(), -math.inf
    for _ in range(20):
        mixture = maximized(x, share / share.sum(dim=1, keepdim=True))
        prior = sum(float(slow_log_c(kappa.item(), dim)) for kappa in mixture.kappa)
        value = log_density(x, mixture).sum().item() + prior
        assert value >= last - 1e-8
        last = value
        share = vmf_mixture.components(x @ mixture.loc.T, mixture).softmax(dim=1)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("uniform", 3),
        ("von-mises-fisher", 512),
        ("power-spherical", 16),
        ("mixture", 16),
        ("mixture", 64),
        ("mixture", 512),
    ],
)
def test_known_densities(name, dim):
    """On samples that were not fitted: the mean error in nats, and the correlation; benchmarks/densities.py has all."""
    x, truth = known(name, dim)
    torch.manual_seed(1)
    mixture = fit(x[:1200], choose(x[:1200], np.arange(1200)))
    wanted, ours = truth(x[1200:]), log_density(x[1200:], mixture)
    # The divergence of the fit from the truth; half the parameters over the items, for what maximum likelihood costs.
    parameters = len(mixture.kappa) * (dim + 1)
    assert -0.05 < (wanted - ours).mean() < 0.1 + 0.6 * parameters / 1200
    if name != "uniform":
        assert torch.corrcoef(torch.stack([wanted, ours]))[0, 1] > 0.95
        assert len(mixture.kappa) >= (4 if name == "mixture" else 1)


def mean_over_sphere(log_density, dim, center, kappa, count=60_000):
    """The mean over the sphere of a density, by samples of half a uniform and half a von Mises-Fisher density."""
    torch.manual_seed(0)
    flat = F.normalize(torch.randn(count // 2, dim, dtype=torch.float64), dim=-1)
    rows = torch.randint(len(center), (count // 2,))
    equal = torch.full((len(center),), 1 / len(center), dtype=torch.float64).log()
    peaks = Mixture(center, torch.full_like(equal, kappa), equal)
    x = torch.cat([flat, VonMisesFisher(center[rows], peaks.kappa[rows]).sample()])
    proposal = torch.logaddexp(vmf_mixture.log_density(x, peaks), torch.zeros(len(x))) - math.log(2)
    return (log_density(x) - proposal).exp().mean().item()


@pytest.mark.parametrize("dim", [3, 16])
def test_densities_have_mean_one_over_the_sphere(dim):
    mixture = example(dim)
    assert mean_over_sphere(lambda x: log_density(x, mixture), dim, mixture.loc, dim) == pytest.approx(1, abs=0.02)
    pairs = Drawn(*(unit(6, dim, seed=seed).numpy().astype(np.float16) for seed in (0, 1)))
    kde = KDE(dim)
    kde.prepare(pairs, draw(pairs, range(6), seed=0))
    for side in SIDES:
        bank = F.normalize(kde.double().banks(side)[0].double(), dim=-1)
        value = mean_over_sphere(lambda x, side=side: kde.log_density(x, side), dim, bank, 20.0)
        assert value == pytest.approx(1, abs=0.02)


def test_equal_items_have_a_finite_density():
    """The prior bounds the concentration, at about (D - 1) (n + 1) / 2 for n equal items."""
    x = unit(1, 64).repeat(50, 1)
    mixture = fit(x, 1)
    assert mixture.kappa.item() == pytest.approx(63 * 51 / 2, rel=0.02)


def test_an_empty_component_is_uniform():
    mixture = maximized(unit(4, 8), torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64))
    assert mixture.kappa[1] == 0 and torch.isfinite(log_density(unit(3, 8), mixture)).all()


def test_groups_are_held_out_whole(monkeypatch):
    """No image that chooses the number of components has a caption among those that are fitted."""
    group, x, fitted = np.repeat(np.arange(30), 2), unit(60, 8), []
    monkeypatch.setattr(vmf_mixture, "fit", lambda rows, count: fitted.append(rows) or fit(rows, count))
    choose(x, group)
    rows = (x[:, None] == fitted[0]).all(dim=-1).any(dim=1).numpy()
    assert rows.sum() == 48 and (rows[::2] == rows[1::2]).all()


def test_a_given_number_of_components_is_kept():
    pairs = Drawn(*(np.random.default_rng(seed).standard_normal((40, 16)).astype(np.float16) for seed in (0, 1)))
    adaptor = VMFMixture(16, components=3)
    adaptor.prepare(pairs, draw(pairs, range(40), seed=0))
    assert all(adaptor.mixture(side).loc.shape == (3, 16) for side in SIDES)
    with pytest.raises(ValueError, match="components must be a whole number above 0, not 0"):
        VMFMixture(16, components=0)
