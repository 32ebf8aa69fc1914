"""The losses of B matched pairs from their B x B scores, in tiles: the heart of a training step.

A score is slope_j h(x_i . y_j) + column_j + row_i, with unit means x and y and a kernel h, an elementwise function that
may have a parameter per image and per caption. Forward and backward compute it for a tile of rows at a time, whose
intermediate results fit a processor's cache. Of the B x B matrices, the backward pass keeps the dot products and h, and
none beyond KEPT pairs. Gradients are exact. Processes that share a step share the rows. `PairScore.dense` is the
same score as a matrix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.distributions import PowerSpherical
from models.distributions.power_spherical import LEAST_COSINE
from models.distributions.sphere import log1p
from models.shares import Share, current_share

KEPT = 4096  # pairs up to which the dot products of the forward pass are kept for the backward pass
# Scores in a tile, which stays in a CPU's cache, or needs few kernel launches on a device.
CPU_TILE, DEVICE_TILE = 2**16, 2**24
# float32 exp is 70 to 170 times slower where it underflows (performance on Xeon and EPYC); e^-80 adds nothing to a sum.
LEAST = -80.0
ALONE = Share()


class Linear:
    """h(dot) = dot, as in CLIP, von Mises-Fisher, PCME++ and ProLIP; what every kernel has."""

    @staticmethod
    def value(dot, row=None, column=None):
        """h (n, M) of dot products (n, M), parameters of rows (n, 1) and of columns (M,); differentiable."""
        return dot

    @staticmethod
    def derivatives(dot, row=None, column=None):
        """Derivatives of h in its three arguments, each (n, M); None for 1 in the first, and for 0 in the others."""
        return None, None, None


class Logarithm:
    """h(dot) = log(1 + dot): power spherical."""

    @staticmethod
    def value(dot, row=None, column=None):
        return PowerSpherical.log_kernel(dot)

    @staticmethod
    def derivatives(dot, row=None, column=None):
        # Below the least cosine, `log_kernel` is constant.
        return (dot + 1).reciprocal_().masked_fill_(dot < LEAST_COSINE[dot.dtype], 0), None, None


@dataclass
class PairScore:
    """Scores of N images and M captions: slope_j h(x_i . y_j; r_i, k_j) + column_j + row_i.

    image: x (N, D). text: y (M, D). slope, column: (M,) or a number. row: (N,) or a number. kernel: h and its
    derivatives, see Linear. row_parameter: r (N,), column_parameter: k (M,), of a kernel that has them.
    """

    image: Tensor
    text: Tensor
    slope: Tensor | float = 1.0
    column: Tensor | float = 0.0
    row: Tensor | float = 0.0
    kernel: object = Linear  # no instance, which torch.compile does not know as a default
    row_parameter: Tensor | None = None
    column_parameter: Tensor | None = None

    def scaled(self, factor: Tensor | float) -> "PairScore":
        """Return the scores times a factor ()."""
        terms = self.slope * factor, self.column * factor, self.row * factor
        return PairScore(self.image, self.text, *terms, self.kernel, self.row_parameter, self.column_parameter)

    def dense(self) -> Tensor:
        """Return the matrix of scores (N, M)."""
        image, text, slope, column, row, row_parameter, column_parameter = self._tensors()
        row_parameter = None if row_parameter is None else row_parameter[:, None]
        score = torch.addcmul(column, slope, self.kernel.value(image @ text.T, row_parameter, column_parameter))
        return score + row[:, None] if isinstance(self.row, Tensor) or self.row else score

    def losses(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy (B,) of each image over the captions, and (B,) of each caption over the images."""
        return CrossEntropies.apply(self.kernel, *self._tensors())

    def info_nce(self) -> Tensor:
        """Symmetric InfoNCE () of B pairs, see `info_nce`."""
        return mean_of(self.losses())

    def pairwise_sigmoid(self, group: Tensor) -> Tensor:
        """Sum () over all B x B pairs of the binary cross-entropy of "these match"; Zhai et al. (2023), 2303.15343.

        group: (B,) numbers; an image and a caption of the same number match.
        """
        return PairwiseSigmoid.apply(self.kernel, group, *self._tensors())

    def _tensors(self):
        def vector(x, like):
            return torch.as_tensor(x, dtype=like.dtype, device=like.device).expand(len(like))

        slope, column = vector(self.slope, self.text), vector(self.column, self.text)
        row = vector(self.row, self.image)
        return self.image, self.text, slope, column, row, self.row_parameter, self.column_parameter


class Tiles:
    """The scores of B pairs in tiles of this process's rows, and the sums of their gradients."""

    def __init__(self, share, kernel, image, text, slope, column, row, row_parameter, column_parameter):
        if len(image) != len(text):
            raise ValueError(f"{len(image):,} images and {len(text):,} captions are not matched pairs")
        self.kernel, self.image, self.text = kernel, image.contiguous(), text.contiguous()
        self.slope, self.column, self.row = slope, column, row[:, None]
        self.row_parameter = None if row_parameter is None else row_parameter[:, None]
        self.column_parameter = column_parameter
        tile = CPU_TILE if image.device.type == "cpu" else DEVICE_TILE
        count, dim = image.shape
        self.mine = share.rows(count)
        self.height = min(count, max(tile // count, self.least_rows(dim)))
        # Reused from tile to tile: a new tensor of this size is a page fault for every 4 kB.
        self.buffers = slope.new_empty(2, self.height, count)

    @staticmethod
    def least_rows(dim):
        """Return the rows with which a matrix product over `dim` is fast enough."""
        return max(1, dim // 2)

    def __iter__(self):
        for start in range(self.mine.start, self.mine.stop, self.height):
            yield slice(start, min(start + self.height, self.mine.stop))

    def parameters(self, rows):
        return None if self.row_parameter is None else self.row_parameter[rows], self.column_parameter

    def dot(self, rows):
        return self.image[rows] @ self.text.T

    def score(self, rows, value):
        """Write the scores (n, B) of a tile to the first buffer, from the values (n, B) of its kernel."""
        return torch.addcmul(self.column, value, self.slope, out=self.buffers[0, : len(value)]).add_(self.row[rows])

    def less(self, score, top):
        """Write scores (n, B) less their top score to the second buffer."""
        return torch.sub(score, top, out=self.buffers[1, : len(score)])

    def gradients(self, needed):
        """Return zero gradients of the tensors that need one, in the order of the constructor."""
        flat = None if self.row_parameter is None else self.row_parameter.squeeze(1)
        tensors = (self.image, self.text, self.slope, self.column, self.row.squeeze(1), flat, self.column_parameter)
        return [
            torch.zeros_like(x, memory_format=torch.contiguous_format) if x is not None and need else None
            for x, need in zip(tensors, needed, strict=True)
        ]

    def accumulate(self, grads, rows, dot, value, grad):
        """Add the gradients of the tile `rows`, whose scores have the gradient `grad` (n, B); overwrites `grad`."""
        of_image, of_text, of_slope, of_column, of_row, of_row_parameter, of_column_parameter = grads
        if of_column is not None:
            of_column += grad.sum(dim=0)
        if of_row is not None:
            of_row[rows] = grad.sum(dim=1)
        by_dot, by_row, by_column = self.kernel.derivatives(dot, *self.parameters(rows))
        if by_dot is None and of_text is not None:
            # h is the dot product: its sums follow from the matrix product that the captions need anyway.
            product = grad.T @ self.image[rows]
            of_text.addcmul_(product, self.slope[:, None])
            if of_slope is not None:
                of_slope += (product * self.text).sum(dim=1)
        elif of_slope is not None:
            of_slope += (grad * value).sum(dim=0)
        if of_image is None and (of_text is None or by_dot is None) and by_row is None and by_column is None:
            return
        grad *= self.slope
        if by_row is not None and of_row_parameter is not None:
            of_row_parameter[rows] = (grad * by_row).sum(dim=1)
        if by_column is not None and of_column_parameter is not None:
            of_column_parameter += (grad * by_column).sum(dim=0)
        if by_dot is not None:
            grad *= by_dot
            if of_text is not None:
                of_text.addmm_(grad.T, self.image[rows])
        if of_image is not None:
            of_image[rows] = grad @ self.text


class CrossEntropies(torch.autograd.Function):
    """Cross-entropies (B,) of rows and of columns of the scores, matches on the diagonal."""

    @staticmethod
    def forward(ctx, kernel, *tensors):
        share = current_share() or ALONE
        tiles = Tiles(share, kernel, *tensors)
        count, like = len(tiles.image), tiles.slope
        keeps = any(ctx.needs_input_grad) and count <= KEPT
        kept = like.new_empty(count, count) if keeps else None
        kept_value = like.new_empty(count, count) if keeps and kernel is not Linear else None
        # The score of each match; of rows and of columns, the top score and the sum of exp(score - top) over all but
        # the match. Those of columns grow from tile to tile.
        matched = like.new_empty(count)
        row_top, row_others = like.new_empty(2, count)
        column_top, column_others = like.new_full((count,), -torch.inf), like.new_zeros(count)
        for rows in tiles:
            dot = tiles.dot(rows) if kept is None else torch.mm(tiles.image[rows], tiles.text.T, out=kept[rows])
            value = kernel.value(dot, *tiles.parameters(rows))
            if kept_value is not None:
                kept_value[rows] = value
            score = tiles.score(rows, value)
            matched[rows] = score.diagonal(rows.start)
            row_top[rows] = score.amax(dim=1)
            row_others[rows] = without_match(tiles.less(score, row_top[rows, None]), rows).sum(dim=1)
            higher = torch.maximum(column_top, score.amax(dim=0))
            column_others *= (column_top - higher).exp_()
            column_others += without_match(score.sub_(higher), rows).sum(dim=0)
            column_top = higher
        if share.world > 1:
            of_rows = torch.stack((matched, row_top, row_others), dim=1)
            matched, row_top, row_others = share.gather(of_rows[tiles.mine], count).unbind(dim=1)
            tops, others = share.stack(torch.stack((column_top, column_others))).unbind(dim=1)
            column_top = tops.amax(dim=0)
            column_others = (others * (tops - column_top).exp_()).sum(dim=0)
        ctx.kernel, ctx.share = kernel, share
        ctx.save_for_backward(*tensors, matched, row_top, row_others, column_top, column_others, kept, kept_value)
        return loss_of(matched, row_top, row_others), loss_of(matched, column_top, column_others)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_rows, by_columns):
        *tensors, matched, row_top, row_others, column_top, column_others, kept, kept_value = ctx.saved_tensors
        kernel, tiles = ctx.kernel, Tiles(ctx.share, ctx.kernel, *tensors)
        by_rows, by_columns = ctx.share.sum(by_rows, by_columns)
        grads = tiles.gradients(ctx.needs_input_grad[1:])
        # The gradient is p of its row and p of its column, times those of the losses, and minus these for a match: of a
        # match as p - 1 = -(sum of the others), which keeps its digits where the loss is small.
        by_rows = by_rows / (row_others + (matched - row_top).exp())
        by_columns = by_columns / (column_others + (matched - column_top).exp())
        by_matched = -row_others * by_rows - column_others * by_columns
        for rows in tiles:
            dot = tiles.dot(rows) if kept is None else kept[rows]
            value = kernel.value(dot, *tiles.parameters(rows)) if kept_value is None else kept_value[rows]
            score = tiles.score(rows, value)
            of_columns = exponential(tiles.less(score, column_top))
            grad = exponential(score.sub_(row_top[rows, None])).mul_(by_rows[rows, None])
            grad.addcmul_(of_columns, by_columns)
            grad.diagonal(rows.start).copy_(by_matched[rows])
            tiles.accumulate(grads, rows, dot, value, grad)
        return None, *grads


def without_match(shifted: Tensor, rows: slice) -> Tensor:
    """e^x in place, with zeros for the matches of a tile."""
    exponential(shifted).diagonal(rows.start).zero_()
    return shifted


def loss_of(matched: Tensor, top: Tensor, others: Tensor) -> Tensor:
    """Cross-entropy (B,) of matches from their scores, the top scores and the others' sum of exp(score - top).

    As a logarithm of 1 + x, so that a small loss keeps its digits.
    """
    return top - matched + torch.log1p(others + torch.expm1(matched - top))


class PairwiseSigmoid(torch.autograd.Function):
    """Sum () of the binary cross-entropies of all pairs; the gradient comes in the same pass as the value."""

    @staticmethod
    def forward(ctx, kernel, group, *tensors):
        share = current_share() or ALONE
        tiles = Tiles(share, kernel, *tensors)
        grads = tiles.gradients(ctx.needs_input_grad[2:])
        total = tiles.slope.new_zeros(len(tiles.image))
        for rows in tiles:
            dot = tiles.dot(rows)
            value = kernel.value(dot, *tiles.parameters(rows))
            score = tiles.score(rows, value)
            match = (group[rows, None] == group).to(score.dtype)
            small = exponential(torch.abs(score, out=tiles.buffers[1, : len(score)]).neg_())
            # softplus(s) - s for a match, softplus(s) for any other pair
            total[rows] = (score.clamp_min(0) - score * match + log1p(small)).sum(dim=1)
            tiles.accumulate(grads, rows, dot, value, score.clamp_min_(LEAST).sigmoid_().sub_(match))
        ctx.save_for_backward(*grads)
        ctx.share = share
        return share.sum(total.sum())[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (grad,) = ctx.share.sum(grad)
        return None, None, *(None if x is None else x * grad for x in ctx.saved_tensors)


def exponential(x: Tensor) -> Tensor:
    """e^x in place, without underflow."""
    return x.clamp_min_(LEAST).exp_()


def cross_entropies(score: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies (B,) of the rows and (B,) of the columns of scores (B, B), matches on the diagonal."""
    target = torch.arange(len(score), device=score.device)
    return tuple(F.cross_entropy(x, target, reduction="none") for x in (score, score.T))


def mean_of(losses: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean () of the losses (B,) of both directions."""
    of_images, of_captions = losses
    return (of_images.mean() + of_captions.mean()) / 2


def info_nce(score: Tensor) -> Tensor:
    """Symmetric InfoNCE () of scores (B, B), matches on the diagonal; van den Oord et al. (2018), arXiv 1807.03748."""
    return mean_of(cross_entropies(score))
