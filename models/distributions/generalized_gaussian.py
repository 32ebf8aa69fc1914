"""The generalized Gaussian: density beta / (2 alpha Gamma(1/beta)) exp(-(|x - loc| / alpha)^beta) on the real line.

Nadarajah (2005), A generalized normal distribution; beta = 1 is Laplace, beta = 2 Gaussian. For the small beta that
networks predict, Gamma(3/beta) overflows, so the variance is computed in logarithms.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, constraints
from torch.distributions.utils import broadcast_all


def _log_ratio(distance: Tensor, alpha: Tensor) -> Tensor:
    """log(distance / alpha), elementwise; at a distance of 0 it is finite, with a gradient of 0."""
    return distance.clamp_min(torch.finfo(distance.dtype).tiny).log() - alpha.log()


class _PairwisePower(torch.autograd.Function):
    """Sum over D of (|points - loc| / alpha)^beta (N, M), from (N, D) and three (M, D).

    Both passes loop over dimensions, so that only a few tensors (N, M) are in memory.
    """

    @staticmethod
    def forward(ctx, points, loc, alpha, beta):
        ctx.save_for_backward(points, loc, alpha, beta)
        total = points.new_zeros(len(points), len(loc))
        for p, mu, a, b in zip(*(x.unbind(dim=1) for x in (points, loc, alpha, beta)), strict=True):
            total += (b * _log_ratio((p[:, None] - mu).abs(), a)).exp()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        columns = (x.unbind(dim=1) for x in (*inputs, *grads))
        for p, mu, a, b, grad_p, grad_mu, grad_a, grad_b in zip(*columns, strict=True):
            residual = p[:, None] - mu
            log_ratio = _log_ratio(residual.abs(), a)
            power = grad * (b * log_ratio).exp()
            # At a residual of 0, where beta < 1 has a cusp, the slope is 0, as that of the L1 distance.
            slope = torch.where(residual == 0, 0.0, b * power / residual)
            grad_p.copy_(slope.sum(dim=1))
            grad_mu.copy_(-slope.sum(dim=0))
            grad_a.copy_(-power.sum(dim=0) * b / a)
            grad_b.copy_((power * log_ratio).sum(dim=0))
        return tuple(grads)


class GeneralizedGaussian(Distribution):
    """Generalized Gaussian with loc, scale alpha > 0 and shape beta > 0, all (...); Nadarajah (2005).

    Raises ValueError on parameters outside their range.

    >>> GeneralizedGaussian(torch.zeros(1), torch.ones(1), torch.ones(1)).log_prob(torch.ones(1))  # Laplace: -1 - ln 2
    tensor([-1.6931])
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "alpha": constraints.positive, "beta": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, alpha: Tensor, beta: Tensor, validate_args: bool | None = None):
        self.loc, self.alpha, self.beta = broadcast_all(loc, alpha, beta)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(GeneralizedGaussian, _instance)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def log_variance(self) -> Tensor:
        """2 log alpha + log Gamma(3/beta) - log Gamma(1/beta) (...), finite even where the variance overflows."""
        return 2 * self.alpha.log() + torch.lgamma(3 / self.beta) - torch.lgamma(1 / self.beta)

    @property
    def variance(self) -> Tensor:
        return self.log_variance.exp()

    def _log_constant(self) -> Tensor:
        return self.beta.log() - math.log(2) - self.alpha.log() - torch.lgamma(1 / self.beta)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (...) at value (...)."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_constant() - (self.beta * _log_ratio((value - self.loc).abs(), self.alpha)).exp()

    def pairwise_log_prob(self, points: Tensor) -> Tensor:
        """Log density (N, M), summed over D, of points (N, D) under each of M distributions (M, D); else ValueError."""
        if len(self.batch_shape) != 2 or points.dim() != 2 or points.shape[1] != self.batch_shape[1]:
            raise ValueError(f"points {tuple(points.shape)}, batch {tuple(self.batch_shape)}: not (N, D), (M, D)")
        power = _PairwisePower.apply(points, self.loc, self.alpha, self.beta)
        return self._log_constant().sum(dim=1) - power

    def entropy(self) -> Tensor:
        """Differential entropy (...) in nats."""
        return 1 / self.beta - self._log_constant()

    def rsample(self, sample_shape=()) -> Tensor:
        """Draw (S, ...), differentiable in all parameters: (|x - loc| / alpha)^beta is Gamma(1/beta, 1)."""
        shape = self._extended_shape(sample_shape)
        power = Gamma((1 / self.beta).expand(shape), torch.ones_like(self.beta), validate_args=False).rsample()
        sign = torch.empty_like(power).bernoulli_(0.5) * 2 - 1
        return self.loc + sign * self.alpha * power.pow(1 / self.beta)
