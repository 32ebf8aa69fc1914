"""PFE, probabilistic face embeddings (Shi and Jain 2019, arXiv 1904.09658), for images and captions.

The score of a pair is its mutual likelihood, the log density of both embeddings being the same point, up to a constant:
-1/2 sum over D of (mu_i - mu_t)^2/(sigma_i^2 + sigma_t^2) + ln(sigma_i^2 + sigma_t^2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.base import COSINE_SCALE, Embedding
from models.gaussian import Gaussian
from models.pair_loss import PairScore
from utils.errors import one_of

# Entries of a tile of pairs x D. A small tile stays in a CPU core's cache; a large one needs few kernel launches.
CPU_TILE, DEVICE_TILE = 2**17, 2**24


class PFE(Gaussian):
    """Gaussians trained with the mutual likelihood of matched pairs, without negatives; arXiv 1904.09658.

    mean: `frozen` as in the paper, `residual`, `learned`, or `raw`, the embedding at its own length. variance: `exp` or
    `softplus` of the perceptron's output, plus the floor. isotropic: use the mean of sigma^2 over D for every
    coordinate, in loss and score; costs N x M instead of N x M x D.
    """

    def __init__(
        self,
        dim: int,
        mean: str = "frozen",
        width: int = 1024,
        hidden: int = 3,
        variance: str = "exp",
        isotropic: bool = True,
        start: float | None = 1.0,
        floor: float = 1e-6,
    ):
        super().__init__(dim, "frozen" if mean == "raw" else mean, width, hidden, start, floor)
        one_of("variance", variance, ("exp", "softplus"))
        self.trains_means = mean in ("residual", "learned")
        self.softplus, self.isotropic, self.raw = variance == "softplus", isotropic, mean == "raw"
        if self.raw:
            self.image_mean = self.text_mean = nn.Identity()

    def _input(self, x: Tensor) -> Tensor:
        return x if self.raw else super()._input(x)

    def _log_variance(self, output: Tensor) -> Tensor:
        if self.softplus:
            # Far below zero log(softplus(x)) is x; computed as written, its gradient would be 0 / 0 there.
            output = F.softplus(output.clamp_min(-40)).log() + (output + 40).clamp_max(0)
        return super()._log_variance(output)

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore | None:
        """Mutual likelihood (N, M); None unless means are unit vectors and variances isotropic."""
        if self.raw or not self.isotropic:
            return None
        kernel = IsotropicLikelihood(image.mean.shape[-1])
        variances = {"row_parameter": image.uncertainty, "column_parameter": text.uncertainty}
        return PairScore(image.mean, text.mean, kernel=kernel, **variances)

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Mutual likelihood (N, M)."""
        if self.isotropic and not self.raw:
            return super().log_likelihood(image, text)
        variances = [
            side.uncertainty[:, None].expand_as(side.mean) if self.isotropic else side.spread.exp()
            for side in (image, text)
        ]
        return MutualLikelihood.apply(image.mean, variances[0], text.mean, variances[1])

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """-2 times the mutual likelihood () of matched pairs, plus InfoNCE of the cosines where means are trained.

        The likelihood has no negatives and would collapse all means to one point.
        """
        image, text = self.adapt_image(image), self.adapt_text(text)
        contrast = PairScore(image.mean, text.mean, slope=COSINE_SCALE).info_nce() if self.trains_means else 0
        squares = (image.mean - text.mean).detach().square()
        if self.isotropic:
            variance = (image.uncertainty + text.uncertainty)[:, None]
        else:
            variance = image.spread.exp() + text.spread.exp()
        return (squares / variance + variance.log()).sum(dim=-1).mean() + contrast


class IsotropicLikelihood:
    """Mutual likelihood of unit means in `dim` dimensions from their cosine and both variances; see `PairScore`."""

    matrices = 2

    def __init__(self, dim: int):
        self.dim = dim

    def value(self, cos: Tensor, row: Tensor, column: Tensor) -> Tensor:
        variance = row + column
        return (cos - 1) / variance - self.dim / 2 * variance.log()  # the squared distance is 2 - 2 cos

    def derivatives(self, cos: Tensor, value: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = (row + column).reciprocal_()
        by_variance = inverse * ((1 - cos) * inverse - self.dim / 2)
        return inverse, by_variance, by_variance


class MutualLikelihood(torch.autograd.Function):
    """Mutual likelihood (N, M) of means and variances (N, D), (N, D), (M, D), (M, D).

    It does not separate into a matrix product. Forward and backward run over tiles of pairs, so that only the result
    and one tile are in memory.
    """

    @staticmethod
    def forward(ctx, image_mean, image_variance, text_mean, text_variance):
        ctx.save_for_backward(image_mean, image_variance, text_mean, text_variance)
        score = image_mean.new_empty(len(image_mean), len(text_mean))
        for rows, columns in tiles(score, image_mean.shape[-1]):
            difference = image_mean[rows, None] - text_mean[columns]
            variance = image_variance[rows, None] + text_variance[columns]
            score[rows, columns] = difference.square_().div_(variance).add_(variance.log_()).sum(dim=-1)
        return score.mul_(-0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image_mean, image_variance, text_mean, text_variance = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in ctx.saved_tensors]
        image_mean_grad, image_variance_grad, text_mean_grad, text_variance_grad = grads
        for rows, columns in tiles(grad, image_mean.shape[-1]):
            weight = grad[rows, columns] / 2
            inverse = (image_variance[rows, None] + text_variance[columns]).reciprocal_()
            ratio = (image_mean[rows, None] - text_mean[columns]).mul_(inverse)
            variance_slope = torch.addcmul(-inverse, ratio, ratio)
            image_variance_grad[rows] += torch.einsum("ij,ijd->id", weight, variance_slope)
            text_variance_grad[columns] += torch.einsum("ij,ijd->jd", weight, variance_slope)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:  # of the means
                image_mean_grad[rows] -= 2 * torch.einsum("ij,ijd->id", weight, ratio)
                text_mean_grad[columns] += 2 * torch.einsum("ij,ijd->jd", weight, ratio)
        return tuple(grads)


def tiles(score: Tensor, dim: int):
    """Yield slices of rows and columns that cut pairs (N, M) into tiles; tile x `dim` is the device's tile size."""
    side = max(1, int(((CPU_TILE if score.device.type == "cpu" else DEVICE_TILE) / dim) ** 0.5))
    for row in range(0, score.shape[0], side):
        for column in range(0, score.shape[1], side):
            yield slice(row, row + side), slice(column, column + side)
