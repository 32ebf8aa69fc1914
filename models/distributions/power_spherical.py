"""The power spherical distribution on the unit sphere S^{D-1}: density C_D(kappa) (1 + mu . x)^kappa.

De Cao & Aziz (2020), arXiv 2006.04437. Its log normalizer contains differences of log-gamma functions of nearly equal,
large numbers; they are computed inside Stirling's series (DLMF 5.11.1), where they lose no digits.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributions import Dirichlet

from models.distributions.sphere import ExactDerivative, SphericalDistribution, at_least_float32, horner


def _stirling(terms: int) -> list[float]:
    """Coefficients B_2j / (2j (2j-1)), j = 1 .. terms, of Stirling's series; Bernoulli numbers as in DLMF 24.5.3."""
    bernoulli = [Fraction(1)]
    for n in range(1, 2 * terms + 1):
        bernoulli.append(-sum(math.comb(n + 1, k) * b for k, b in enumerate(bernoulli)) / (n + 1))
    return [float(bernoulli[2 * j] / (2 * j * (2 * j - 1))) for j in range(1, terms + 1)]


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LEAST_COSINE = {dtype: 4 * torch.finfo(dtype).eps - 1 for dtype in FLOATS}
# From (D-1)/2 = 8 on, the error of a series with these terms is below the rounding of the type.
_LOWEST = 8
_STIRLING = {torch.float32: _stirling(3), torch.float64: _stirling(8)}


def _lgamma_tail(x, dtype: torch.dtype):
    """log Gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2."""
    return horner(_STIRLING[dtype], 1 / (x * x)) / x


def _digamma_tail(x, dtype: torch.dtype):
    """log x - 1 / (2x) - psi(x)."""
    return horner([c * (2 * j + 1) for j, c in enumerate(_STIRLING[dtype])], 1 / (x * x)) / (x * x)


def _steps(dim: int) -> tuple[list[float], float]:
    """Half dimensions m = (dim-1)/2, m+1, .. below the lowest for Stirling's series, and the first one above."""
    count = max(0, math.ceil(_LOWEST - (dim - 1) / 2))
    return [(dim - 1) / 2 + i for i in range(count)], (dim - 1) / 2 + count


def _value(kappa: Tensor, dim: int) -> Tensor:
    (small, m), dtype = _steps(dim), kappa.dtype
    y = kappa / m
    # (2m - 1/2) log(1 + y/2) - (m - 1/2) log(1 + y) + kappa log((1 + y/2) / (1 + y)), arranged so that little cancels.
    total = m * torch.log1p(y * (y / (1 + y)) / 4) + (kappa - 0.5) * torch.log1p(-kappa / (2 * (m + kappa)))
    total = total + _lgamma_tail(2 * m + kappa, dtype) - _lgamma_tail(m + kappa, dtype)
    total = total - (_lgamma_tail(2 * m, dtype) - _lgamma_tail(m, dtype))
    for below in small:
        total = total + torch.log1p(kappa / (2 * below + kappa)) - torch.log1p(kappa / (2 * below + 1))
    return total


def mean_resultant_length(kappa: Tensor, dim: int) -> Tensor:
    """E[mu . x] = kappa / (kappa + dim - 1), elementwise; De Cao & Aziz (2020), section 2.

    >>> mean_resultant_length(torch.tensor([0.0, 2.0, 18.0]), dim=3)
    tensor([0.0000, 0.5000, 0.9000])
    """
    return kappa / (kappa + (dim - 1))


def log_normalizer_derivative(kappa: Tensor, dim: int) -> Tensor:
    """d log C_dim / d kappa = psi(dim-1+kappa) - psi((dim-1)/2+kappa) - log 2 = -E[log(1 + mu . x)], elementwise.

    >>> log_normalizer_derivative(torch.tensor([1.0]), dim=3)  # 1 / (kappa + 1) - ln 2
    tensor([-0.1931])
    """
    k = at_least_float32(kappa)
    small, m = _steps(dim)
    total = torch.log1p(-k / (2 * (m + k))) + m / (2 * (m + k) * (2 * m + k))
    total = total + _digamma_tail(m + k, k.dtype) - _digamma_tail(2 * m + k, k.dtype)
    for below in small:
        total = total + below / ((below + k) * (2 * below + k)) - 1 / (2 * below + 1 + k)
    return total.to(kappa.dtype)


def log_normalizer(kappa: Tensor, dim: int) -> Tensor:
    """log C_dim(kappa) - log C_dim(0), elementwise; De Cao & Aziz (2020), section 2.

    The constant is left out because no softmax over distributions depends on it, and because next to it (868 at
    dim = 512) float32 would round away the dependence on kappa.

    >>> log_normalizer(torch.tensor([2.0, 3.0]), dim=3)  # ln((kappa + 1) / 2^kappa)
    tensor([-0.2877, -0.6931])
    """
    return ExactDerivative.apply(at_least_float32(kappa), dim, _value, log_normalizer_derivative).to(kappa.dtype)


class PowerSpherical(SphericalDistribution):
    """Power spherical distribution with loc (..., D) and concentration (...); De Cao & Aziz (2020).

    Its concentration has another scale than that of von Mises-Fisher (twice as large, where both are large). Raises
    what `SphericalDistribution` raises.

    >>> PowerSpherical(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(2.0)).mean
    tensor([0.0000, 0.0000, 0.5000])
    """

    log_normalizer = staticmethod(log_normalizer)
    log_normalizer_derivative = staticmethod(log_normalizer_derivative)
    mean_resultant_length = staticmethod(mean_resultant_length)

    @staticmethod
    def log_kernel(cos: Tensor) -> Tensor:
        # Rounding takes the product of opposite unit vectors to -1 and below, where the logarithm and its gradient are
        # not finite; one such pair would make a whole batch NaN. log1p is up to 20 times slower than log and adds
        # nothing: the cosine itself is rounded to eps.
        return (cos.clamp_min(LEAST_COSINE[cos.dtype]) + 1).log()

    def _rsample_angle(self, kappa: Tensor) -> tuple[Tensor, Tensor]:
        # A Dirichlet of two is a Beta that also returns 1 - z, with all digits even if z is close to 1.
        half = (self.dim - 1) / 2
        sample = Dirichlet(torch.stack((half + kappa, torch.full_like(kappa, half)), -1), validate_args=False).rsample()
        z, rest = sample.unbind(-1)
        return z - rest, 2 * (z * rest).sqrt()
