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


def cosine_mean(g: Gaussians, h: Gaussians) -> Tensor:
    """Mean of the cosine (N, C): that of the means times a factor of at most 1 from each side."""
    return _scaled(g).mean @ _scaled(h).mean.T


def cosine_variance(g: Gaussians, h: Gaussians, variance: str = "diagonal") -> Tensor:
    """Variance of the cosine (N, C).

    `diagonal`, as published: of the product of the two, coordinates of an embedding taken as independent; `kronecker`:
    with their covariances; `tangent`: less what moves an embedding along its own direction and no cosine, which the
    other two count, the more so the larger the cosine. Raises ValueError for another variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be {', '.join(VARIANCES[:-1])} or {VARIANCES[-1]}, not '{variance}'")
    (g, s_g, basis_g), (h, s_h, basis_h) = _scaled(g), _scaled(h)
    if variance == "diagonal":
        v_g, v_h = s_g @ basis_g.square().T, s_h @ basis_h.square().T
        return torch.cat([g.square() + v_g, v_g], dim=-1) @ torch.cat([v_h, h.square()], dim=-1).T
    # With Sigma = U diag(s) U^T: h^T Sigma_g h = s_g . (U_g^T h)^2 and trace(Sigma_g Sigma_h) = s_g (U_g^T U_h)^2 s_h.
    h_in_g, g_in_h = h @ basis_g, g @ basis_h
    trace = s_g @ (basis_g.T @ basis_h).square()
    full = torch.cat([s_g, g_in_h.square() + trace], dim=-1) @ torch.cat([h_in_g.square(), s_h], dim=-1).T
    if variance == "kronecker":
        return full
    # With x = g/|g|, y = h/|h| and c = x . y, y - c x stands for y in |h|^2 y^T Sigma_g y, and likewise for Sigma_h.
    # What that adds is |h|^2 (c^2 x^T Sigma_g x - 2 c x^T Sigma_g y).
    x, y = F.normalize(g, dim=-1), F.normalize(h, dim=-1)
    cos, x_in_g, y_in_h = x @ y.T, x @ basis_g, y @ basis_h
    square_g, square_h = g.square().sum(dim=-1, keepdim=True), h.square().sum(dim=-1, keepdim=True)
    left = torch.cat([s_g * x_in_g, square_g * (x @ basis_h)], dim=-1)
    mixed = left @ torch.cat([square_h * (y @ basis_g), s_h * y_in_h], dim=-1).T
    radial_g, radial_h = ((s * u.square()).sum(dim=-1, keepdim=True) for s, u in ((s_g, x_in_g), (s_h, y_in_h)))
    radial = torch.cat([radial_g, square_g], dim=-1) @ torch.cat([square_h, radial_h], dim=-1).T
    return (full + cos.square() * radial - 2 * cos * mixed).clamp_min(0)  # a difference, which rounds


def probit_factor(variance: Tensor) -> Tensor:
    """The factor 1 / sqrt(1 + pi/8 variance) on a logit of that variance, elementwise; MacKay (1992)."""
    return (1 + math.pi / 8 * variance).rsqrt()


def probabilities(
    logit: Tensor,
    variance: Tensor | None = None,
    how: str = "probit",
    draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Class probabilities (N, C) of logits with these means and variances (N, C).

    `mean`: the softmax of the means; `probit`: of the means times `probit_factor`, as published; `mc-independent`: the
    mean softmax of draws in which no logit knows of another. Joint draws are `joint_probabilities`. Raises ValueError
    for another kind.
    """
    if how == "mean":
        return logit.softmax(dim=-1)
    if how == "probit":
        return (probit_factor(variance) * logit).softmax(dim=-1)
    if how != "mc-independent":
        raise ValueError(f"probabilities of means and variances are mean, probit or mc-independent, not '{how}'")
    deviation, total = variance.sqrt(), torch.zeros_like(logit)
    device = generator.device if generator else logit.device
    for _ in range(draws):
        noise = torch.randn(logit.shape, generator=generator, dtype=logit.dtype, device=device).to(logit.device)
        total += torch.addcmul(logit, deviation, noise).softmax(dim=-1)
    return total / draws


def joint_probabilities(draws: Iterable[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Class probabilities (N, C), the mean softmax over draws of all embeddings (N, D), (C, D) under one map a side.

    draws: such as `zip(images.sample(...), texts.sample(...))` of two posteriors. Logits are scale times cosine; a bias
    common to all would cancel. Raises ValueError if there is no draw.
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
