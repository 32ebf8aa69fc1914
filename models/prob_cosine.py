"""ProbCosine: mean and variance of the cosine of two independent Gaussians, and what becomes of a softmax over them.

BayesVLM, arXiv 2412.06014. N items g and C items h of the other modality, D embedding size. An item's embedding has a
mean m (D,) and a covariance U diag(s) U^T, whose basis U (D, D) is one for all of a side, as models/laplace.py gives
them. Squared lengths |g|^2 are replaced by what is expected of them, |m|^2 + sum s. Everything is products of (N, D) by
(D, C) matrices. Right for image and text; two images or two texts are under one map and not independent.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCES = ("diagonal", "kronecker", "tangent")


class Gaussians(NamedTuple):
    """N Gaussian embeddings; a plain tuple of the three will do wherever one is asked for."""

    mean: Tensor  # (N, D)
    spread: Tensor  # (N, D) variances along the columns of the basis
    basis: Tensor  # (D, D)


class Half(NamedTuple):
    """What mean and variance of cosines need of one side's N items: they are products of a left and a right half."""

    mean: Tensor  # (N, D), such that |g|^2 is expected to be 1
    full: Tensor  # (N, 2 D)
    mixed: Tensor | None = None  # (N, 2 D), of `tangent`, as what follows
    radial: Tensor | None = None  # (N, 2)
    inverse_length: Tensor | None = None  # (N, 1) of the mean


def half(g: Gaussians, basis: Tensor, variance: str = "diagonal", right: bool = False) -> Half:
    """What cosines of variance `variance` (see `cosine_variance`) need of one side, so that it need not be found anew.

    basis: (D, D), the other side's. right: whether this side stands on the right of the products. Raises ValueError for
    another variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be {', '.join(VARIANCES[:-1])} or {VARIANCES[-1]}, not '{variance}'")
    mean, spread, own = _scaled(g)

    def joined(*parts):
        return torch.cat(parts[::-1] if right else parts, dim=-1)

    if variance == "diagonal":
        v = spread @ own.square().T
        return Half(mean, joined(mean.square(), v) if right else joined(mean.square() + v, v))
    # With Sigma = U diag(s) U^T: h^T Sigma_g h = s_g . (U_g^T h)^2 and trace(Sigma_g Sigma_h) = s_g (U_g^T U_h)^2 s_h.
    in_other = mean @ basis
    seen = in_other.square()
    if not right:  # the trace stands on one side
        seen = seen + spread @ (own.T @ basis).square()
    full = joined(spread, seen)
    if variance == "kronecker":
        return Half(mean, full)
    # With x = g/|g|, y = h/|h| and c = x . y, y - c x stands for y in |h|^2 y^T Sigma_g y, and likewise for Sigma_h.
    # What that adds is |h|^2 (c^2 x^T Sigma_g x - 2 c x^T Sigma_g y).
    square = mean.square().sum(dim=-1, keepdim=True)
    inverse = torch.where(square > 0, square.rsqrt(), 0.0)
    in_own = inverse * (mean @ own)
    mixed = joined(spread * in_own, square * inverse * in_other)
    return Half(mean, full, mixed, joined((spread * in_own.square()).sum(dim=-1, keepdim=True), square), inverse)


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
    """Mean of the cosine (N, C): that of the means times a factor of at most 1 from each side."""
    return _scaled(g).mean @ _scaled(h).mean.T


def cosine_variance(g: Gaussians, h: Gaussians, variance: str = "diagonal") -> Tensor:
    """Variance of the cosine (N, C).

    `diagonal`, as published: of the product of the two, coordinates of an embedding taken as independent; `kronecker`:
    with their covariances; `tangent`: less what moves an embedding along its own direction and no cosine, which the
    other two count, the more so the larger the cosine. Raises ValueError for another variance.
    """
    return variance_of(half(g, h[2], variance), half(h, g[2], variance, right=True))


def probit_factor(variance: Tensor) -> Tensor:
    """The factor 1 / sqrt(1 + pi/8 variance) on a logit of that variance, elementwise; MacKay (1992)."""
    return (1 + math.pi / 8 * variance).rsqrt()


def independent_probabilities(logit: Tensor, variance: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Class probabilities (N, C), the mean softmax over draws of logits with these means and variances (N, C).

    No logit of a draw knows of another; joint draws are `joint_probabilities`.
    """
    deviation, total = variance.sqrt(), torch.zeros_like(logit)
    for _ in range(draws):
        noise = torch.randn(logit.shape, generator=generator, dtype=logit.dtype, device=generator.device)
        total += torch.addcmul(logit, deviation, noise.to(logit.device)).softmax(dim=-1)
    return total / draws


def joint_probabilities(draws: Iterable[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Class probabilities (N, C), the mean softmax over draws of all embeddings (N, D), (C, D) under one map a side.

    draws: such as `zip(images.samples(...), texts.samples(...))` of two posteriors. Logits are scale times cosine; a
    bias common to all would cancel. Raises ValueError if there is no draw.
    """
    total, count = 0.0, 0
    for g, h in draws:
        cosine = F.normalize(g, dim=-1) @ F.normalize(h, dim=-1).T
        total = total + (scale * cosine).softmax(dim=-1)
        count += 1
    if not count:
        raise ValueError("there is no draw to take the mean of")
    return total / count


def _scaled(g: Gaussians) -> Gaussians:
    """The same Gaussians (N, D) with lengths such that |g|^2 is expected to be 1, which changes no cosine."""
    mean, spread, basis = g
    square = mean.square().sum(dim=-1, keepdim=True) + spread.sum(dim=-1, keepdim=True)
    square = square.clamp_min(torch.finfo(mean.dtype).tiny)  # a point at 0 has cosines of 0
    return Gaussians(mean / square.sqrt(), spread / square, basis)
