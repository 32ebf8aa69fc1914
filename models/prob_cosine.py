"""ProbCosine: mean and variance of the cosine of two independent Gaussians, and class probabilities from them.

BayesVLM, arXiv 2412.06014. N items g and C items h of the other modality, D embedding size. An embedding has a mean m
(D,) and a covariance U diag(s) U^T, where all items of a side share the basis U (D, D), as in models/laplace.py.
Squared lengths |g|^2 are replaced by their expectation |m|^2 + sum s. Everything is products of (N, D) by (D, C)
matrices. This holds for image and text; two images or two texts share one random map and are not independent.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import one_of

VARIANCES = ("diagonal", "kronecker", "tangent")


class Gaussians(NamedTuple):
    """N Gaussian embeddings; functions also accept a plain tuple of the three fields."""

    mean: Tensor  # (N, D)
    spread: Tensor  # (N, D) variances along the columns of the basis
    basis: Tensor  # (D, D)


class Half(NamedTuple):
    """One side of the products, a left times a right half, that give the mean and variance of cosines."""

    mean: Tensor  # (N, D), scaled so that |g|^2 has expectation 1
    full: Tensor  # (N, 2 D)
    mixed: Tensor | None = None  # (N, 2 D), for `tangent` only, as the fields below
    radial: Tensor | None = None  # (N, 2)
    inverse_length: Tensor | None = None  # (N, 1) of the mean


def half(g: Gaussians, other_basis: Tensor, variance: str = "diagonal", right: bool = False) -> Half:
    """One side's Half for cosines with this kind of variance (see `cosine_variance`), for use in many products.

    other_basis: (D, D), of the other side. right: whether this side is the right factor of the products. Raises
    ValueError for an unknown variance.
    """
    one_of("variance", variance, VARIANCES)
    mean, spread, basis = _scaled(g)

    def joined(first, second):
        return torch.cat((second, first) if right else (first, second), dim=-1)

    if variance == "diagonal":
        v = spread @ basis.square().T
        return Half(mean, joined(mean.square(), v) if right else joined(mean.square() + v, v))
    # With Sigma = U diag(s) U^T: h^T Sigma_g h = s_g . (U_g^T h)^2 and trace(Sigma_g Sigma_h) = s_g (U_g^T U_h)^2 s_h.
    in_other = mean @ other_basis
    squares = in_other.square()
    if not right:  # the trace is counted once
        squares = squares + spread @ (basis.T @ other_basis).square()
    full = joined(spread, squares)
    if variance == "kronecker":
        return Half(mean, full)
    # With x = g/|g|, y = h/|h| and c = x . y, `tangent` replaces y by y - c x in |h|^2 y^T Sigma_g y, and likewise for
    # Sigma_h. This adds |h|^2 (c^2 x^T Sigma_g x - 2 c x^T Sigma_g y).
    square = mean.square().sum(dim=-1, keepdim=True)
    inverse = torch.where(square > 0, square.rsqrt(), 0.0)
    direction = inverse * (mean @ basis)
    mixed = joined(spread * direction, square * inverse * in_other)
    return Half(mean, full, mixed, joined((spread * direction.square()).sum(dim=-1, keepdim=True), square), inverse)


def mean_of(g: Half, h: Half) -> Tensor:
    """Mean of the cosine (N, C) from a left and a right half."""
    return g.mean @ h.mean.T


def variance_of(g: Half, h: Half) -> Tensor:
    """Variance of the cosine (N, C) from a left and a right half."""
    full = g.full @ h.full.T
    if g.mixed is None:
        return full
    cos = g.inverse_length * mean_of(g, h) * h.inverse_length.T
    radial, mixed = g.radial @ h.radial.T, g.mixed @ h.mixed.T
    return (full + cos.square() * radial - 2 * cos * mixed).clamp_min(0)  # a difference, which rounds


def cosine_mean(g: Gaussians, h: Gaussians) -> Tensor:
    """Mean of the cosine (N, C): the cosine of the means times a factor of at most 1 for each side."""
    return _scaled(g).mean @ _scaled(h).mean.T


def cosine_variance(g: Gaussians, h: Gaussians, variance: str = "diagonal") -> Tensor:
    """Variance of the cosine (N, C).

    `diagonal`, as published: of the inner product, with the coordinates of an embedding as independent; `kronecker`:
    with their covariances; `tangent`: without variance along an embedding's own direction, which moves no cosine. The
    other two include it, the more the larger the cosine. Raises ValueError for an unknown variance.
    """
    return variance_of(half(g, h[2], variance), half(h, g[2], variance, right=True))


def probit_factor(variance: Tensor) -> Tensor:
    """Probit factor 1 / sqrt(1 + pi/8 variance) on a logit of this variance, elementwise; MacKay (1992)."""
    return (1 + math.pi / 8 * variance).rsqrt()


def independent_probabilities(logit: Tensor, variance: Tensor, draws: int, seeds: list[int]) -> Tensor:
    """Class probabilities (N, C): the mean softmax over draws of logits with these means and variances (N, C).

    The logits of a draw are independent; for joint draws see `joint_probabilities`. seeds: of each item, so that its
    draws neither depend on the other items nor repeat theirs.
    """
    deviation, mean, generator = variance.sqrt(), torch.empty_like(logit), torch.Generator()
    for row, seed in enumerate(seeds):
        generator.manual_seed(seed)
        noise = torch.randn(draws, logit.shape[1], generator=generator, dtype=logit.dtype).to(logit.device)
        mean[row] = torch.addcmul(logit[row], deviation[row], noise).softmax(dim=-1).mean(dim=0)
    return mean


def joint_probabilities(draws: Iterable[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Class probabilities (N, C): the mean softmax over draws of all embeddings (N, D), (C, D) under one map per side.

    draws: such as `zip(images.samples(...), texts.samples(...))` of two posteriors. Logits are scale times cosine; a
    common bias would cancel. Raises ValueError if there is no draw.
    """
    total, count = 0.0, 0
    for g, h in draws:
        cosine = F.normalize(g, dim=-1) @ F.normalize(h, dim=-1).T
        total = total + (scale * cosine).softmax(dim=-1)
        count += 1
    if not count:
        raise ValueError("there is no draw to average")
    return total / count


def _scaled(g: Gaussians) -> Gaussians:
    """The same Gaussians (N, D) scaled so that |g|^2 has expectation 1, which changes no cosine."""
    mean, spread, basis = g
    square = mean.square().sum(dim=-1, keepdim=True) + spread.sum(dim=-1, keepdim=True)
    square = square.clamp_min(torch.finfo(mean.dtype).tiny)  # a point at 0 gets cosines of 0
    return Gaussians(mean / square.sqrt(), spread / square, basis)
