"""ProbCosine and its class probabilities against brute force and Monte Carlo, and on real factors if available."""

import math
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh import printed

from models.laplace import Factors, Posterior, load_published
from models.prob_cosine import (
    VARIANCES,
    Gaussians,
    cosine_mean,
    cosine_variance,
    independent_probabilities,
    joint_probabilities,
    probit_factor,
)

NORM_SQ = {"image": 63.6576, "text": 42.1238}  # of laion's ViT-B/32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def cosines(g, h):
    return F.normalize(g, dim=-1) @ F.normalize(h, dim=-1).T


def random_side(count, dim, seed, noise=0.03):
    """Gaussians whose covariances, in one random basis, have a trace of about `noise` of the squared length."""
    mean = randn(count, dim, seed=seed)
    basis = torch.linalg.qr(randn(dim, dim, seed=seed + 100)).Q
    spread = torch.rand(count, dim, generator=generator(seed + 200), dtype=torch.float64) * 2 * noise
    return Gaussians(mean, spread, basis)


def covariances(side):
    return side.basis @ torch.diag_embed(side.spread) @ side.basis.T


def test_no_covariance_is_the_cosine():
    """Without covariance, the mean is the cosine of the means, and the variance 0."""
    g, h = random_side(4, 6, 0), random_side(5, 6, 1)
    g, h = (side._replace(spread=torch.zeros_like(side.spread)) for side in (g, h))
    torch.testing.assert_close(cosine_mean(g, h), cosines(g.mean, h.mean), rtol=0, atol=1e-12)
    for variance in VARIANCES:
        assert (cosine_variance(g, h, variance) == 0).all()


def test_great_prior_precision_is_the_cosine():
    """The mean tends to the cosine, and lambda times the variance to |phi_g|^2 / |g|^2 + |phi_h|^2 / |h|^2."""
    mean, phi, factors = [], [], []
    for seed, size in ((1, 7), (2, 6)):
        mean.append(3 * randn(5, 6, seed=seed))
        phi.append(randn(5, size, seed=seed + 10))
        a, b = (randn(s, s, seed=seed + 20) for s in (size, 6))
        factors.append(Factors(100 * a @ a.T, 100 * b @ b.T, 30))
    share_g, share_h = (x.square().sum(dim=-1) / m.square().sum(dim=-1) for x, m in zip(phi, mean))
    limit, shrunk = share_g[:, None] + share_h, []
    for precision in (1e6, 1e8, 1e10, 1e12, 1e14):
        posteriors = [Posterior(x, 1.0, 4, precision=precision) for x in factors]
        g, h = (Gaussians(m, p.spread(x), p.basis) for m, x, p in zip(mean, phi, posteriors))
        if precision >= 1e10:
            assert (cosine_mean(g, h) - cosines(*mean)).abs().max() < 1e-6
        shrunk.append(precision * cosine_variance(g, h) / limit)
    assert all((less < more).all() for less, more in pairwise(shrunk))
    torch.testing.assert_close(shrunk[-1], torch.ones(5, 5, dtype=torch.float64), rtol=5e-3, atol=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_symmetry_and_scale(variance):
    """Mean and variance are symmetric, and the same for g -> 7 g, s -> 49 s."""
    g, h = random_side(4, 6, 0), random_side(5, 6, 1)
    longer = Gaussians(7 * g.mean, 49 * g.spread, g.basis)
    for value in (cosine_mean, lambda *sides: cosine_variance(*sides, variance)):
        torch.testing.assert_close(value(h, g).T, value(g, h), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(value(longer, h), value(g, h), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(value(tuple(g), tuple(h)), value(g, h), rtol=0, atol=0)


def test_mean_shrinks_by_a_factor_of_each_side():
    """Mean over cosine is a matrix of rank 1 with entries of at most 1: |m| / sqrt(|m|^2 + tr Cov) of both sides."""
    g, h = random_side(8, 6, 0, noise=0.3), random_side(9, 6, 1, noise=0.3)
    mean, plain = cosine_mean(g, h), cosines(g.mean, h.mean)
    ratio = mean / plain
    values = torch.linalg.svdvals(ratio)
    assert values[1] < 1e-10 * values[0]
    assert (mean.abs() <= plain.abs()).all()
    expected = g.mean.norm(dim=-1) / (g.mean.square().sum(dim=-1) + covariances(g).diagonal(0, 1, 2).sum(-1)).sqrt()
    np.testing.assert_allclose(ratio[:, 0] / ratio[0, 0], expected / expected[0], rtol=1e-10)


def literal_variance(g, h, variance):
    """The variance pair by pair, with covariance matrices, as BayesVLM's mathematics writes it."""
    result = torch.empty(len(g.mean), len(h.mean), dtype=torch.float64)
    for i, (m_g, c_g) in enumerate(zip(g.mean, covariances(g))):
        for j, (m_h, c_h) in enumerate(zip(h.mean, covariances(h))):
            expected = (m_g @ m_g + c_g.trace()) * (m_h @ m_h + c_h.trace())
            if variance == "diagonal":
                v_g, v_h = c_g.diag(), c_h.diag()
                result[i, j] = ((m_g**2 + v_g) * v_h + v_g * m_h**2).sum() / expected
                continue
            toward_h, toward_g = m_h, m_g
            if variance == "tangent":
                x, y = m_g / m_g.norm(), m_h / m_h.norm()
                toward_h, toward_g = m_h.norm() * (y - (x @ y) * x), m_g.norm() * (x - (x @ y) * y)
            moved = toward_h @ c_g @ toward_h + toward_g @ c_h @ toward_g + (c_g @ c_h).trace()
            result[i, j] = moved / expected
    return result


@pytest.mark.parametrize("variance", VARIANCES)
def test_variance_is_the_literal_one(variance):
    """Products of matrices equal brute force, pair by pair."""
    g, h = random_side(4, 6, 0, noise=0.3), random_side(5, 6, 1, noise=0.1)
    double = cosine_variance(g, h, variance)
    torch.testing.assert_close(double, literal_variance(g, h, variance), rtol=1e-10, atol=0)
    single = cosine_variance(*(Gaussians(*(part.float() for part in side)) for side in (g, h)), variance)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-7)


def test_damped_spread_is_one_number_per_item():
    """The Kronecker variance has the form c_i h^T B^-1 h + c_j g^T B^-1 g + c_i c_j trace(B^-1 B^-1)."""
    g, h = randn(4, 5), randn(3, 5, seed=1)
    sides, inverses, scalars = [], [], []
    for mean, seed in ((g, 2), (h, 3)):
        a, b = (root @ root.T for root in (randn(6, 6, seed=seed), randn(5, 5, seed=seed)))
        phi = randn(len(mean), 6, seed=seed + 5)
        posterior = Posterior(Factors(a, b, 30), 10.0, 4)
        sides.append(Gaussians(mean, posterior.spread(phi), posterior.basis))
        a, b = (2 * x + posterior.precision**0.5 * torch.eye(len(x), dtype=x.dtype) for x in (a, b))
        scalars.append((phi @ a.inverse() * phi).sum(dim=-1))
        inverses.append(b.inverse())
    (c_g, c_h), (b_g, b_h) = scalars, inverses
    numerator = c_g[:, None] * ((h @ b_g) * h).sum(dim=-1) + ((g @ b_h) * g).sum(dim=-1)[:, None] * c_h
    numerator = numerator + c_g[:, None] * c_h * (b_g @ b_h).trace()
    squares = [x.square().sum(dim=-1) + c * b.trace() for x, c, b in ((g, c_g, b_g), (h, c_h, b_h))]
    expected = numerator / (squares[0][:, None] * squares[1])
    torch.testing.assert_close(cosine_variance(*sides, "kronecker"), expected, rtol=1e-10, atol=0)


def sampled(side, row, draws, seed, diagonal=False):
    """Samples (draws, D) of one Gaussian; diagonal: without the covariances of its coordinates."""
    noise = randn(draws, side.mean.shape[1], seed=seed)
    if diagonal:
        return side.mean[row] + noise * covariances(side._replace(spread=side.spread[row : row + 1]))[0].diag().sqrt()
    return side.mean[row] + (noise * side.spread[row].sqrt()) @ side.basis.T


@pytest.mark.parametrize(("variance", "diagonal"), [("diagonal", True), ("kronecker", False)])
def test_product_has_this_variance(variance, diagonal):
    """By Monte Carlo, it is exact for the inner product of independent Gaussians that are not normalized."""
    g, h = random_side(1, 16, 0, noise=0.3), random_side(1, 16, 1, noise=0.3)
    squares = [side.mean.square().sum() + side.spread.sum() for side in (g, h)]
    expected = cosine_variance(g, h, variance) * squares[0] * squares[1]
    product = (sampled(g, 0, 100_000, 7, diagonal) * sampled(h, 0, 100_000, 8, diagonal)).sum(dim=-1)
    np.testing.assert_allclose(expected.item(), product.var().item(), rtol=3e-2)


def pair_at(cosine, dim, noise):
    """Two single Gaussians whose means have this cosine and whose covariances have the trace noise |mean|^2."""
    x, y = F.normalize(randn(2, dim, seed=dim), dim=-1)
    y = F.normalize(y - (x @ y) * x, dim=0)
    sides = []
    for mean, seed in ((8 * x, 1), (5 * (cosine * x + (1 - cosine**2) ** 0.5 * y), 2)):
        side = random_side(1, dim, seed)
        spread = side.spread / side.spread.sum() * noise * mean.square().sum()
        sides.append(Gaussians(mean[None], spread, side.basis))
    return sides


@pytest.mark.parametrize(("dim", "tolerance"), [(8, 5e-3), (32, 2e-3), (128, 5e-4), (512, 5e-4)])
@pytest.mark.parametrize("cosine", [0.2, 0.6])
def test_mean_by_monte_carlo(dim, tolerance, cosine):
    """The mean of the cosine is within a small absolute error at a noise of 3 %."""
    g, h = pair_at(cosine, dim, 0.03)
    draws = 40_000 if dim < 512 else 10_000
    drawn = F.cosine_similarity(sampled(g, 0, draws, 7), sampled(h, 0, draws, 8))
    assert abs(cosine_mean(g, h).item() - drawn.mean().item()) < tolerance


@pytest.mark.parametrize("cosine", [0.24, 0.47, 0.6, 0.74, 0.81])
@pytest.mark.parametrize("noise", [0.03, 0.05])
def test_tangent_variance_by_monte_carlo(cosine, noise):
    """The tangent variance is right; the other two, which include radial noise, are too large at large cosines."""
    g, h = pair_at(cosine, 32, noise)
    drawn = F.cosine_similarity(sampled(g, 0, 20_000, 7), sampled(h, 0, 20_000, 8)).var().item()
    np.testing.assert_allclose(cosine_variance(g, h, "tangent").item(), drawn, rtol=0.1)
    if cosine > 0.7:
        assert cosine_variance(g, h, "diagonal").item() > 1.5 * drawn
        assert cosine_variance(g, h, "kronecker").item() > 1.5 * drawn


MEMORY = """
import torch
from benchmarks.measure import resident
from models.laplace import curvature
from models.prob_cosine import VARIANCES, cosine_mean, cosine_variance

torch.set_num_threads(1)
g, h = ((torch.randn(1024, 512), torch.rand(1024, 512), torch.eye(512)) for _ in range(2))
target = torch.randn(4096, 512)
for size in (4, 1024):
    before = resident("VmRSS")
    for variance in VARIANCES:
        cosine_mean(g, h), cosine_variance([x[:size] for x in g[:2]] + [g[2]], h, variance)
    curvature(g[0][:size], target, 100.0)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_tensor_is_pairs_by_dimensions():
    """Extra MB at 1,024 x 1,024 pairs and 1,024 x 4,096 items and candidates, D = 512: one such tensor has 2,147 MB."""
    assert float(printed(MEMORY)) < 150


def test_points_of_no_length_are_finite():
    g = Gaussians(torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(4))
    h = Gaussians(torch.randn(3, 4), torch.rand(3, 4), torch.eye(4))
    some = g._replace(spread=torch.rand(2, 4))
    for side in (g, some):
        assert (cosine_mean(side, h) == 0).all()
        for variance in VARIANCES:
            assert cosine_variance(side, h, variance).isfinite().all()
            assert cosine_variance(h, side, variance).isfinite().all()
    with pytest.raises(ValueError, match="variance must be diagonal, kronecker or tangent"):
        cosine_variance(g, h, "full")


def test_independent_probabilities_are_those_of_quadrature():
    logit, variance = 3 * randn(3, 4), 2 * torch.rand(3, 4, generator=generator(1), dtype=torch.float64)
    np.testing.assert_allclose(probit_factor(variance)[0, 0], (1 + math.pi * variance[0, 0] / 8) ** -0.5)
    probability = independent_probabilities(logit, variance, 4000, range(len(logit)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    grid = torch.tensor(np.stack(np.meshgrid(*[nodes] * 4, indexing="ij"), axis=-1).reshape(-1, 4))
    weight = torch.tensor(np.prod(np.meshgrid(*[weights] * 4, indexing="ij"), axis=0).ravel())
    quadrature = [(weight / weight.sum()) @ (z + v.sqrt() * grid).softmax(dim=-1) for z, v in zip(logit, variance)]
    np.testing.assert_allclose(probability, torch.stack(quadrature), atol=1e-2)


def test_joint_probabilities_are_means_over_draws():
    g, h = randn(5, 3, 4), randn(5, 6, 4, seed=1)
    expected = sum((20 * cosines(x, y)).softmax(dim=-1) for x, y in zip(g, h)) / 5
    torch.testing.assert_close(joint_probabilities(zip(g, h), 20.0), expected)
    with pytest.raises(ValueError, match="no draw"):
        joint_probabilities([], 20.0)


@pytest.fixture
def real(shared):
    """Three images and 101 prompts under the published ViT-B/32 factors at n = 4."""
    return read_real(shared / "data" / "bayesvlm_vitb32laion.npz")


@lru_cache
def read_real(path):
    arrays, published, towers = np.load(path), load_published(path), {}
    for tower, name in (("image", "img"), ("text", "text")):
        mean, phi = (torch.as_tensor(arrays[f"food101_{name}_{part}"]) for part in ("embed", "activation"))
        towers[tower] = mean, phi, Posterior(published[tower], NORM_SQ[tower], 4)
    return towers


def gaussians(real):
    return [Gaussians(mean, posterior.spread(phi), posterior.basis) for mean, phi, posterior in real.values()]


def test_probabilities_of_real_images(real):
    """The largest probability of each of three images among 101 prompts; the last two kinds from few draws."""
    g, h = gaussians(real)
    logit, variance = 100 * cosine_mean(g, h), 1e4 * cosine_variance(g, h)
    probabilities = {
        "map": (100 * cosines(g.mean, h.mean)).softmax(dim=-1),
        "mean": logit.softmax(dim=-1),
        "probit": (probit_factor(variance) * logit).softmax(dim=-1),
        "independent": independent_probabilities(logit, variance, 2000, range(len(logit))),
    }
    draws = [p.samples(phi, mean, generator(seed), 150) for seed, (mean, phi, p) in enumerate(real.values())]
    probabilities["joint"] = joint_probabilities(zip(*draws), 100.0)
    for kind, expected, tolerance in [
        ("map", (0.897, 0.990, 0.992), 2e-3),
        ("mean", (0.899, 0.989, 0.988), 2e-3),
        ("probit", (0.877, 0.978, 0.932), 2e-3),
        ("independent", (0.815, 0.973, 0.963), 1e-2),
        ("joint", (0.870, 0.986, 0.982), 2e-2),
    ]:
        np.testing.assert_allclose(probabilities[kind].max(dim=-1).values, expected, atol=tolerance, err_msg=kind)
    factor = probit_factor(variance)
    np.testing.assert_allclose([factor.mean(), variance.mean().sqrt()], [0.826, 1.09], atol=5e-3)


def test_sizes_of_real_uncertainty(real):
    """tr Cov / |g|^2 is 3.8 % and 3.3 %; c is from 0.56 to 0.74 and from 0.34 to 0.48."""
    noise, ends = [], []
    for mean, phi, posterior in real.values():
        spread = posterior.spread(phi)
        noise.append((spread.sum(dim=-1) / mean.square().sum(dim=-1)).mean().item())
        c = spread[:, 0] * (2 * posterior.spectrum.b[0] + posterior.precision**0.5)
        ends += [c.min().item(), c.max().item()]
    np.testing.assert_allclose(noise, [0.038, 0.033], atol=5e-4)
    np.testing.assert_allclose(ends, [0.56, 0.74, 0.34, 0.48], atol=6e-3)


def test_variances_of_real_pairs_by_monte_carlo(real):
    """Variances over those of draws, for images and their nearest prompts, at cosines of about 0.24.

    Under the posterior itself, whose coordinates are correlated, the diagonal variance is 1.25 to 1.65 times too large.
    """
    g, h = (Gaussians(*(part.double() for part in side)) for side in gaussians(real))
    near = cosines(g.mean, h.mean).topk(4).indices
    ratio = {"diagonal": [], "diagonal, correlated": [], "kronecker": [], "tangent": []}
    variances = {variance: cosine_variance(g, h, variance) for variance in VARIANCES}
    for i in range(3):
        images = [sampled(g, i, 4000, 3 * i + d, diagonal=bool(d)) for d in (0, 1)]
        for j in near[i].tolist():
            drawn = [
                F.cosine_similarity(image, sampled(h, j, 4000, 1000 + 3 * j + d, diagonal=bool(d))).var()
                for d, image in enumerate(images)
            ]
            ratio["diagonal"].append(variances["diagonal"][i, j] / drawn[1])
            ratio["diagonal, correlated"].append(variances["diagonal"][i, j] / drawn[0])
            for variance in ("kronecker", "tangent"):
                ratio[variance].append(variances[variance][i, j] / drawn[0])
    ratio = {name: np.array(values) for name, values in ratio.items()}
    assert (ratio["diagonal"] > 0.95).all() and (ratio["diagonal"] < 1.2).all()
    assert 1.35 < ratio["diagonal, correlated"].mean() < 1.57
    np.testing.assert_allclose(ratio["kronecker"].mean(), 1.057, atol=0.03)
    np.testing.assert_allclose(ratio["tangent"], 1, atol=0.1)
    np.testing.assert_allclose(ratio["tangent"].mean(), 1, atol=0.03)
