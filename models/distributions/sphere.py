"""Base class and helpers of distributions on the unit sphere S^{D-1} with density C_D(kappa) exp(kappa h(mu . x)).

Shapes: (...) batch, S sample shape, N points, B distributions, D the dimension of the space around the sphere.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints


class _UnitVector(constraints.Constraint):
    """Vectors of length 1, up to the rounding of normalization in half precision."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (torch.linalg.vector_norm(value, dim=-1) - 1).abs() < 1e-2


unit_vector = _UnitVector()


class ExactDerivative(torch.autograd.Function):
    """Evaluate value(kappa, dim) with the gradient derivative(kappa, dim); autograd's gradient would lose digits.

    >>> kappa = torch.tensor(3.0, requires_grad=True)
    >>> torch.autograd.grad(ExactDerivative.apply(kappa, 2, lambda k, dim: k**dim, lambda k, dim: dim * k), kappa)
    (tensor(6.),)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kappa, dim, value, derivative):
        return _in_blocks(value, kappa, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        kappa, ctx.dim, _, ctx.derivative = inputs
        ctx.save_for_backward(kappa)

    @staticmethod
    def backward(ctx, grad):
        (kappa,) = ctx.saved_tensors
        return grad * _in_blocks(ctx.derivative, kappa, ctx.dim), None, None, None


def log1p(x: Tensor) -> Tensor:
    """log(1 + x), elementwise, of finite x, without a gradient.

    The rounding of u = 1 + x is corrected to first order: log u + (x - (u - 1)) / u. torch.log1p has one rounding less,
    but is 5 times slower on Intel processors.

    >>> log1p(torch.tensor([1e-30, 1.0]))
    tensor([1.0000e-30, 6.9315e-01])
    """
    u = 1 + x
    correction = u.sub(1).sub_(x).div_(u)
    return u.log_().sub_(correction)


BLOCK = 2**15  # elements whose intermediate results fit a processor's cache


def _in_blocks(function, kappa, dim):
    """Apply an elementwise function of many steps to a CPU tensor in blocks: each step then reads from the cache."""
    if kappa.device.type != "cpu" or kappa.numel() <= BLOCK:
        return function(kappa, dim)
    blocks = [function(block, dim) for block in kappa.reshape(-1).split(BLOCK)]
    return torch.cat(blocks).view(kappa.shape)


def log_surface_area(dim: int) -> float:
    """Log of the area of S^{dim-1}, 2 pi^(dim/2) / Gamma(dim/2); -log C_dim(0) for every density of this family.

    >>> round(math.exp(log_surface_area(3)) / math.pi, 6)  # 4 pi
    4.0
    """
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def horner(coefficients, x):
    """Sum of coefficients[i] x^i, for floats and tensors.

    >>> horner([1, 2, 3], 10)
    321
    """
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def at_least_float32(kappa: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32, and keep float32 and float64 (which not every device has).

    >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return kappa.to(torch.promote_types(kappa.dtype, torch.float32))


def rotate_from_pole(x: Tensor, loc: Tensor) -> Tensor:
    """Rotate x (..., D) by the Householder reflection that maps the pole e_1 to loc (..., D), up to a sign.

    >>> rotate_from_pole(torch.tensor([1.0, 0.0]), loc=torch.tensor([0.6, 0.8]))
    tensor([0.6000, 0.8000])
    """
    # Of the two mirrors, loc + e_1 and loc - e_1, the longer one (length >= sqrt 2) is safe even at loc = +-e_1.
    sign = torch.where(loc[..., :1] < 0, -1.0, 1.0).to(loc.dtype)
    mirror = torch.cat((loc[..., :1] + sign, loc[..., 1:]), -1)
    along = (x * mirror).sum(-1, keepdim=True) / (mirror * mirror).sum(-1, keepdim=True)
    return sign * (2 * along * mirror - x)


class SphericalDistribution(Distribution):
    """Rotationally symmetric distribution around loc (..., D), a unit vector, with concentration (...), at least 0.

    A subclass defines `log_normalizer`, its derivative `log_normalizer_derivative`, `mean_resultant_length` (functions
    of kappa and dim), `log_kernel` (h of the cosine) and `_rsample_angle`. Raises ValueError on parameters outside
    their range, and if neither parameter has the batch shape, as with (B, 1) and (B,) by mistake.

    >>> from models.distributions import VonMisesFisher
    >>> VonMisesFisher(torch.eye(3), torch.zeros(3)).entropy()  # uniform: ln(4 pi)
    tensor([2.5310, 2.5310, 2.5310])
    """

    arg_constraints: ClassVar = {"loc": unit_vector, "concentration": constraints.nonnegative}
    support = unit_vector
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None):
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        if batch_shape not in (loc.shape[:-1], concentration.shape):
            raise ValueError(f"loc {tuple(loc.shape)} and concentration {tuple(concentration.shape)} do not fit")
        self.loc = loc.expand(batch_shape + loc.shape[-1:])
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(type(self), _instance)
        new.loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        new.concentration = self.concentration.expand(batch_shape)
        Distribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def dim(self) -> int:
        return self.event_shape[0]

    @property
    def mean(self) -> Tensor:
        """E[x] (..., D), a vector inside the sphere."""
        return self.mean_resultant_length(self.concentration, self.dim).unsqueeze(-1) * self.loc

    def _log_constant(self) -> Tensor:
        return self.log_normalizer(self.concentration, self.dim) - log_surface_area(self.dim)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (...) at value (..., D), with respect to the surface measure."""
        if self._validate_args:
            self._validate_sample(value)
        cos = (self.loc * value).sum(-1)
        return self.concentration * self.log_kernel(cos) + self._log_constant()

    def pairwise_log_prob(self, points: Tensor) -> Tensor:
        """Log density (N, B) of points (N, D) under each of B distributions; raises ValueError on other shapes."""
        if len(self.batch_shape) != 1 or points.dim() != 2:
            raise ValueError(f"points {tuple(points.shape)}, batch {tuple(self.batch_shape)}: not (N, D), (B,)")
        return self.concentration * self.log_kernel(points @ self.loc.T) + self._log_constant()

    def entropy(self) -> Tensor:
        """Differential entropy (...) in nats: -log C + kappa d log C / d kappa, as of any exponential family."""
        return self.concentration * self.log_normalizer_derivative(self.concentration, self.dim) - self._log_constant()

    def rsample(self, sample_shape=()) -> Tensor:
        """Draw (S, ..., D), differentiable in both parameters, in the tangent-normal form (Mardia & Jupp 2000, 9.1)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        cos, sin = self._rsample_angle(self.concentration.expand(shape[:-1]))
        direction = F.normalize(self.loc.new_empty(shape[:-1] + (self.dim - 1,)).normal_(), dim=-1)
        return rotate_from_pole(torch.cat((cos.unsqueeze(-1), sin.unsqueeze(-1) * direction), -1), self.loc)
