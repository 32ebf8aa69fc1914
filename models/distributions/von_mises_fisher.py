"""The von Mises-Fisher distribution on the unit sphere S^{D-1}: density C_D(kappa) exp(kappa mu . x).

Its normalizer is a Bessel function that under- and overflows in the dimensions of embeddings. It is computed by Olver's
uniform expansion (DLMF 10.41.3) at order w = D/2 - 1 + n, in powers of 1/sqrt(w^2 + kappa^2) to avoid division by
kappa. n > 0 only for small D; the three-term recurrence, whose terms are all positive, leads back to order D/2 - 1.
"""

import math
from fractions import Fraction
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from models.distributions.sphere import ExactDerivative, SphericalDistribution, at_least_float32, horner, log1p

_QUADRATURE_NODES = 32
_NEWTON_STEPS = 4


def _log_debye(terms: int) -> tuple[list[list[float]], list[list[float]]]:
    """Coefficients of the logarithm of Olver's sum, log sum_j u_j(p) / w^j = sum_j v_j(p) / w^j, and of its slope.

    v_j(p) = p^j sum_i c_ji p^2i for j = 1 .. terms, and p v_j'(p) likewise. DLMF 10.41.9 for exp(sum_j v_j / w^j) gives
    v_1' = (1 - 5p^2) / 8 and v_{j+1}' = (p^2 (1 - p^2) v_j')' / 2 + p^2 (1 - p^2) / 2 sum_{a+b=j} v_a' v_b'.
    """
    slopes = [[Fraction(1, 8), Fraction(-5, 8)]]
    for j in range(1, terms):
        following = [Fraction(0)] * (j + 2)
        for i, c in enumerate(slopes[-1]):
            following[i] += c * Fraction(j + 1 + 2 * i, 2)
            following[i + 1] -= c * Fraction(j + 3 + 2 * i, 2)
        for left, right in zip(slopes[:-1], reversed(slopes[:-1])):
            for (a, x), (b, y) in product(enumerate(left), enumerate(right)):
                following[a + b] += x * y / 2
                following[a + b + 1] -= x * y / 2
        slopes.append(following)
    values = [[c / (j + 2 * i) for i, c in enumerate(row)] for j, row in enumerate(slopes, 1)]
    return [list(map(float, row)) for row in values], [list(map(float, row)) for row in slopes]


# The lowest order, and the terms with which the error of the expansion is below the rounding of the type.
_EXPANSION = {torch.float32: (16, *_log_debye(4)), torch.float64: (24, *_log_debye(11))}


def _start(dim: int, dtype: torch.dtype):
    """Coefficients, order w of the expansion and number n of recurrence steps down to dim / 2 - 1."""
    lowest, values, slopes = _EXPANSION[dtype]
    steps = max(0, math.ceil(lowest - (dim / 2 - 1)))
    return values, slopes, dim / 2 - 1 + steps, steps


def _series(rows, t, q):
    """sum_j v_j(p) / w^j, with t = p / w and q = p^2."""
    return t * horner([horner(row, q) for row in rows], t)


def _bessel_ratios(kappa: Tensor, dim: int) -> list[tuple[float, Tensor]]:
    """Orders and ratios I_{w+1}(kappa) / I_w(kappa), from the order of the expansion down to dim / 2 - 1."""
    _, slopes, order, steps = _start(dim, kappa.dtype)
    t = (kappa * kappa + order * order).rsqrt()
    # Analytic derivative of the expansion's logarithm, term by term, so that nothing cancels.
    correction = t * t * (_series(slopes, t, (order * t) ** 2) + 0.5)
    ratios = [(order, kappa * (t / (order * t + 1) - correction))]
    for _ in range(steps):
        order, ratio = ratios[-1]
        ratios.append((order - 1, kappa / (kappa * ratio + 2 * order)))
    return ratios


def _value(kappa: Tensor, dim: int) -> Tensor:
    values, _, order, steps = _start(dim, kappa.dtype)
    s = (kappa * kappa + order * order).sqrt()
    growth = kappa * kappa / (s + order)  # s - order, without the cancellation
    log_bessel = growth - order * log1p(growth / (2 * order)) - log1p(growth / order) / 2
    log_bessel = log_bessel + (_series(values, 1 / s, (order / s) ** 2) - _series(values, 1 / order, 1.0))
    if steps:
        for order, ratio in _bessel_ratios(kappa, dim)[:-1]:
            log_bessel = log_bessel + log1p(kappa * ratio / (2 * order))
    return -log_bessel


def mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """A_dim(kappa) = E[mu . x] = I_{dim/2}(kappa) / I_{dim/2-1}(kappa), elementwise; Mardia & Jupp (2000), 9.3.2.

    >>> mean_resultant_length(torch.tensor([0.0, 1.0, 10.0]), dim=3)  # coth kappa - 1 / kappa
    tensor([0.0000, 0.3130, 0.9000])
    """
    return _bessel_ratios(at_least_float32(kappa), dim)[-1][1].to(kappa.dtype)


def log_normalizer_derivative(kappa: Tensor, dim: int) -> Tensor:
    """d log C_dim / d kappa = -A_dim(kappa), elementwise.

    >>> log_normalizer_derivative(torch.tensor([1.0]), dim=3)
    tensor([-0.3130])
    """
    return -mean_resultant_length(kappa, dim)


def concentration_of(length: Tensor, dim: int) -> Tensor:
    """The kappa at which `mean_resultant_length` is `length`, elementwise, for lengths in [0, 1), without a gradient.

    The start of Banerjee et al. (2005), JMLR 6, equation 4.4, and Newton's steps; Sra (2012), equation 5.

    >>> concentration_of(torch.tensor([0.0, 0.9], dtype=torch.float64), dim=3).round(decimals=6).tolist()
    [0.0, 10.0]
    """
    length = length.detach()
    kappa = length * (dim - length**2) / (1 - length**2)
    for _ in range(_NEWTON_STEPS):
        value = mean_resultant_length(kappa, dim)
        # The slope 1 - A^2 - (D - 1) A / kappa, whose last term tends to (D - 1) / D at 0.
        share = torch.where(kappa > 0, value / kappa.clamp_min(torch.finfo(kappa.dtype).tiny), 1 / dim)
        slope = 1 - value**2 - (dim - 1) * share
        kappa = (kappa - (value - length) / slope.clamp_min(torch.finfo(kappa.dtype).eps)).clamp_min(0)
    return kappa


def log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """log C_dim(kappa) - log C_dim(0) = -log 0F1(; dim/2; kappa^2/4), elementwise; Mardia & Jupp (2000), 9.3.2.

    The constant is left out because no softmax over distributions depends on it, and because next to it (868 at
    dim = 512) float32 would round away the dependence on kappa.

    >>> log_normalizer(torch.tensor([1.0, 10.0]), dim=3)  # ln(kappa / sinh kappa)
    tensor([-0.1614, -7.0043])
    """
    return ExactDerivative.apply(at_least_float32(kappa), dim, _value, log_normalizer_derivative).to(kappa.dtype)


def _sample_angle(kappa: Tensor, dim: int) -> Tensor:
    """Angles (...) between sample and mu by rejection; Ulrich (1984), Wood (1994), algorithm VM*."""
    half = (dim - 1) / 2
    # Wood's b without a difference of nearly equal terms, so that no approximation is needed for any kappa.
    b = half / (kappa + (kappa * kappa + half * half).sqrt())
    proposal = torch.distributions.Beta(kappa.new_tensor(half), kappa.new_tensor(half), validate_args=False)
    angle, pending = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    while pending.any():
        z = proposal.sample(kappa.shape)
        # Wood's kappa w + (d-1) log(1 - x_0 w) - c becomes (d-1)(h + log(1-h)), without two large terms.
        h = (1 - b) * (0.5 - z) / (1 - z + b * z)
        # "Not less" rather than "greater or equal": a NaN in kappa gives NaN instead of an endless loop.
        accepted = pending & ~(2 * half * (h + torch.log1p(-h)) < torch.rand_like(z).log())
        # His w = (1 - (1+b) z) / (1 - (1-b) z) is the cosine of this angle, which keeps its digits near zero.
        angle = torch.where(accepted, 2 * torch.atan2((b * z).sqrt(), (1 - z).sqrt()), angle)
        pending = pending & ~accepted
    return angle


@lru_cache
def _unit_legendre() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _angle_derivative(angle: Tensor, kappa: Tensor, dim: int) -> Tensor:
    """d angle / d kappa (...) at a constant distribution function; Figurnov et al. (2018), arXiv 1805.08498.

    With the density g(a) ~ exp(kappa cos a) sin(a)^(dim-2) it is the integral of (cos a - A_dim) g(a) / g(angle) from
    the angle to either end of [0, pi]. Towards the end on the angle's side of arccos A_dim, the integrand keeps its
    sign and g falls (or has its mode nearby); the quadrature stops where g is below the rounding of the type. Float32
    rounds 1 - A_dim, hence a relative error of the order of 2e-7 kappa / sqrt(dim).
    """
    nodes, weights = angle.new_tensor(_unit_legendre()).unbind()
    eps, tiny = torch.finfo(angle.dtype).eps, torch.finfo(angle.dtype).tiny
    negligible, power = -math.log(eps), (dim - 2) / 2
    length = mean_resultant_length(kappa, dim)
    height = 2 * (angle / 2).sin() ** 2  # 1 - cos
    # -d log g / d log height, then the relative changes of height that make log g fall by `negligible`, or more:
    # log(1 + y) <= y - y^2 / (2 + 2y) gives a quadratic equation outwards, log(1 - y) <= -y - y^2 / 2 one inwards.
    slope = height * (kappa + power / (2 * (angle / 2).cos() ** 2)) - power
    steep = slope.clamp_min(0)  # a negative slope outwards of arccos A_dim is rounding
    rest = negligible - steep
    outwards = (rest + (rest**2 + 2 * (2 * steep + power) * negligible).sqrt()) / (2 * steep + power)
    inwards = 2 * negligible / ((slope**2 + 2 * power * negligible).sqrt() - slope).clamp_min(tiny)
    end_height = height * torch.where(angle.cos() < length, 1 + outwards, 1 - inwards.clamp_max(1))
    width = 2 * (end_height / 2).clamp(0, 1).sqrt().asin() - angle
    step, angle, kappa = width.unsqueeze(-1) * nodes, angle.unsqueeze(-1), kappa.unsqueeze(-1)
    sine_change = step.sin() * angle.cos() / angle.sin().clamp_min(tiny) - 2 * (step / 2).sin() ** 2
    cosine_change = -2 * (angle + step / 2).sin() * (step / 2).sin()
    log_ratio = kappa * cosine_change + (dim - 2) * torch.log1p(sine_change.clamp_min(eps - 1))
    excess = (angle + step).cos() - length.unsqueeze(-1)
    return width * (weights * excess * log_ratio.exp()).sum(-1)


class _ImplicitAngle(torch.autograd.Function):
    """Identity of a sampled angle whose gradient in kappa is `_angle_derivative`."""

    @staticmethod
    def forward(ctx, kappa, angle, dim):
        ctx.save_for_backward(kappa, angle)
        ctx.dim = dim
        return angle.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kappa, angle = ctx.saved_tensors
        return grad * _angle_derivative(angle, kappa, ctx.dim), None, None


class VonMisesFisher(SphericalDistribution):
    """Von Mises-Fisher distribution with loc (..., D) and concentration (...); Mardia & Jupp (2000), 9.3.2.

    Samples have implicit gradients, which include the accept step. Raises what `SphericalDistribution` raises.

    >>> north = torch.tensor([0.0, 0.0, 1.0])
    >>> VonMisesFisher(north, torch.tensor(0.0)).log_prob(north)  # uniform: -ln(4 pi)
    tensor(-2.5310)
    """

    log_normalizer = staticmethod(log_normalizer)
    log_normalizer_derivative = staticmethod(log_normalizer_derivative)
    mean_resultant_length = staticmethod(mean_resultant_length)

    @staticmethod
    def log_kernel(cos: Tensor) -> Tensor:
        return cos

    def _rsample_angle(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        angle = _ImplicitAngle.apply(kappa, _sample_angle(kappa.detach(), self.dim), self.dim)
        return angle.cos(), angle.sin()
