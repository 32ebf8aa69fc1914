"""The losses of B matched pairs from their B x B scores, in tiles: the heart of a training step.

A score is slope_j h(x_i . y_j) + column_j + row_i, with unit means x and y and a kernel h, an elementwise function that
may have a parameter per image and per caption. Forward and backward compute it for a tile of rows at a time, whose
intermediate results fit a processor's cache. Of the B x B matrices, the backward pass keeps the dot products and h of
the first tiles, up to KEPT numbers, and computes the others again. Gradients are exact. Processes that share a step
share the rows. `PairScore.dense` is the same score as a matrix.

Exponentials are powers of two: torch.exp2 is as exact as torch.exp and takes a third of its time on some processors
(AMD, where torch.exp is MKL's).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.distributions.power_spherical import LEAST_COSINE
from models.distributions.sphere import log1p
from models.shares import Share, current_share

BITS = math.log2(math.e)  # a nat in bits
# Numbers that the forward pass keeps for the backward pass, per process: the dot products of all pairs of a batch of
# 4,096 where h is written over them, of half as many pairs where h lies apart.
KEPT = 2**24
# Scores in a tile, which stays in a CPU's cache, or needs few kernel launches on a device.
CPU_TILE, DEVICE_TILE = 2**16, 2**24
# In a cross-entropy, bits below which a power of 2 adds nothing to a sum, and is 0. In a sigmoid, the least bits of a
# pair: its odds are not lower. Powers of those above are not denormal in float32, nor over the size of a batch: some
# processors compute with denormal numbers 100 times more slowly.
LEAST = -100.0
MOST = 60.0  # bits from which log2(1 + 2^x) is x, to the rounding of float64
ALONE = Share()


class Linear:
    """h(dot) = dot, as in CLIP, von Mises-Fisher, PCME++ and ProLIP; what every kernel has."""

    matrices = 1  # to keep: 1 where h is the dot products or is written over them, 2 where it is not

    @staticmethod
    def value(dot, row=None, column=None):
        """h (n, M) of dot products (n, M), parameters of rows (n, 1) and of columns (M,); differentiable.

        May overwrite the dot products, if `derivatives` does not read them and `matrices` is 1.
        """
        return dot

    @staticmethod
    def derivatives(dot, value, row=None, column=None):
        """Derivatives of h in dot, row and column, each (n, M); None for 1 in the first, and for 0 in the others.

        value: h (n, M).
        """
        return None, None, None


class Logarithm:
    """h(dot) = log(1 + dot): power spherical."""

    matrices = 1

    @staticmethod
    def value(dot, row=None, column=None):
        return dot.clamp_min_(LEAST_COSINE[dot.dtype]).add_(1).log_()  # `PowerSpherical.log_kernel`, in place

    @staticmethod
    def derivatives(dot, value, row=None, column=None):
        # 1 / (1 + dot) = e^-h, but 0 up to the least cosine, where h is constant; h of the next cosine is 0.1 higher.
        least = math.log1p(LEAST_COSINE[value.dtype]) + 0.05
        return F.threshold(value, least, math.inf).mul_(-BITS).exp2_(), None, None


@dataclass
class PairScore:
    """Scores of N images and M captions: slope_j h(x_i . y_j; r_i, k_j) + column_j + row_i.

    image: x (N, D). text: y (M, D). slope, column: (M,) or a number. row: (N,) or None. kernel: h and its derivatives,
    see Linear. row_parameter: r (N,), column_parameter: k (M,), of a kernel that has them.
    """

    image: Tensor
    text: Tensor
    slope: Tensor | float = 1.0
    column: Tensor | float = 0.0
    row: Tensor | None = None
    kernel: object = Linear  # no instance, which torch.compile does not know as a default
    row_parameter: Tensor | None = None
    column_parameter: Tensor | None = None

    def scaled(self, factor: Tensor | float) -> "PairScore":
        """Return the scores times a factor ()."""
        row = None if self.row is None else self.row * factor
        terms = self.slope * factor, self.column * factor, row  # torch 2.6 compiles no dataclasses.replace
        return PairScore(self.image, self.text, *terms, self.kernel, self.row_parameter, self.column_parameter)

    def dense(self) -> Tensor:
        """Return the matrix of scores (N, M)."""
        row_parameter = None if self.row_parameter is None else self.row_parameter[:, None]
        value = self.kernel.value(self.image @ self.text.T, row_parameter, self.column_parameter)
        score = self.slope * value + self.column
        return score if self.row is None else score + self.row[:, None]

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
        """The tensors of `Tiles`."""

        def vector(x):
            return torch.as_tensor(x, dtype=self.text.dtype, device=self.text.device).expand(len(self.text))

        slope, column = vector(self.slope), vector(self.column)
        return self.image, self.text, slope, column, self.row, self.row_parameter, self.column_parameter


class Tiles:
    """The scores of B pairs in tiles of this process's rows, and the sums of their gradients."""

    def __init__(self, share, kernel, image, text, slope, column, row, row_parameter, column_parameter):
        if len(image) != len(text):
            raise ValueError(f"{len(image):,} images and {len(text):,} captions are not matched pairs")
        self.kernel, self.image, self.text = kernel, image.contiguous(), text.contiguous()
        self.slope, self.column, self.column_parameter = slope, column, column_parameter
        self.row, self.row_parameter = (None if x is None else x[:, None] for x in (row, row_parameter))
        tile = CPU_TILE if image.device.type == "cpu" else DEVICE_TILE
        count, dim = image.shape
        self.mine = share.rows(count)
        self.height = min(count, max(tile // count, self.least_rows(dim)))
        # Reused from tile to tile: a new tensor of this size is a page fault for every 4 kB.
        self.buffers = slope.new_empty(2, self.height, count)
        self.third = None  # for dot products of tiles that are not kept; made for the first of them

    @staticmethod
    def least_rows(dim):
        """Return the rows with which a matrix product over `dim` is fast enough."""
        return max(1, dim // 2)

    def __iter__(self):
        for start in range(self.mine.start, self.mine.stop, self.height):
            yield slice(start, min(start + self.height, self.mine.stop))

    def parameters(self, rows):
        return None if self.row_parameter is None else self.row_parameter[rows], self.column_parameter

    def memory(self):
        """Return memory (kernel.matrices, n, B) for each of the first tiles, as many as have up to KEPT numbers."""
        matrices, count = self.kernel.matrices, self.buffers.shape[-1]
        last = self.mine.start + KEPT // (matrices * count)
        sizes = [rows.stop - rows.start for rows in self if rows.stop <= last]
        return list(self.buffers.new_empty(matrices, sum(sizes), count).split(sizes, dim=1))

    def value(self, rows, memory=None):
        """Return the dot products (n, B) of a tile and their h, in the tile's piece of `memory` if it has one."""
        if memory is None and self.third is None:
            self.third = torch.empty_like(self.buffers[0])
        first = self.third[: rows.stop - rows.start] if memory is None else memory[0]
        dot = torch.mm(self.image[rows], self.text.T, out=first)
        value = self.kernel.value(dot, *self.parameters(rows))
        return dot, value if memory is None or len(memory) == 1 else memory[1].copy_(value)

    def score(self, rows, value):
        """Write the scores (n, B) of a tile to the first buffer, from the values (n, B) of its kernel."""
        score = torch.addcmul(self.column, value, self.slope, out=self.buffers[0, : len(value)])
        return score if self.row is None else score.add_(self.row[rows])

    def less(self, score, top):
        """Write scores (n, B) less their top score to the second buffer."""
        return torch.sub(score, top, out=self.buffers[1, : len(score)])

    def gradients(self, needed):
        """Return zero gradients of the tensors that need one, in the order of the constructor."""
        # Where h is the dot product, the gradient of the slope follows from that of the texts.
        self.slope_from_text = self.kernel is Linear and needed[1]
        row, row_parameter = (None if x is None else x.squeeze(1) for x in (self.row, self.row_parameter))
        tensors = (self.image, self.text, self.slope, self.column, row, row_parameter, self.column_parameter)
        return [
            torch.zeros_like(x, memory_format=torch.contiguous_format) if x is not None and need else None
            for x, need in zip(tensors, needed, strict=True)
        ]

    def accumulate(self, grads, rows, dot, value, grad):
        """Add the gradients of the tile `rows`, whose scores have the gradient `grad` (n, B).

        Overwrites `grad` and the second buffer. Those of texts are still without the slope, which `finish` adds.
        """
        of_image, of_text, of_slope, of_column, of_row, of_row_parameter, of_column_parameter = grads
        other = self.buffers[1, : len(grad)]
        if of_column is not None:
            of_column += grad.sum(dim=0)
        if of_row is not None:
            of_row[rows] = grad.sum(dim=1)
        if of_slope is not None and not self.slope_from_text:
            of_slope += torch.mul(grad, value, out=other).sum(dim=0)
        by_dot, by_row, by_column = self.kernel.derivatives(dot, value, *self.parameters(rows))
        if by_row is not None and of_row_parameter is not None:
            of_row_parameter[rows] = torch.mul(grad, by_row, out=other) @ self.slope
        if by_column is not None and of_column_parameter is not None:
            of_column_parameter.addcmul_(torch.mul(grad, by_column, out=other).sum(dim=0), self.slope)
        if by_dot is not None:
            grad *= by_dot
        if of_text is not None:
            of_text.addmm_(grad.T, self.image[rows])
        if of_image is not None:
            of_image[rows] = grad.mul_(self.slope) @ self.text

    def finish(self, grads):
        """Complete the sums of all tiles."""
        _, of_text, of_slope, *_ = grads
        if of_slope is not None and self.slope_from_text:
            of_slope += (of_text * self.text).sum(dim=1)
        if of_text is not None:
            of_text *= self.slope[:, None]


class CrossEntropies(torch.autograd.Function):
    """Cross-entropies (B,) of rows and of columns of the scores, matches on the diagonal."""

    @staticmethod
    def forward(ctx, kernel, *tensors):
        share = current_share() or ALONE
        tiles = Tiles(share, kernel, *tensors)
        count, like = len(tiles.image), tiles.slope
        kept = tiles.memory() if any(ctx.needs_input_grad) else []
        # The score of each match; of rows and of columns, the top score and the sum of exp(score - top) over all but
        # the match. Those of columns grow from tile to tile.
        matched = like.new_empty(count)
        row_top, row_others = like.new_empty(2, count)
        column_top, column_others = like.new_full((count,), -torch.inf), like.new_zeros(count)
        for number, rows in enumerate(tiles):
            _, value = tiles.value(rows, kept[number] if number < len(kept) else None)
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
        ctx.save_for_backward(*tensors, matched, row_top, row_others, column_top, column_others, *kept)
        return loss_of(matched, row_top, row_others), loss_of(matched, column_top, column_others)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_rows, by_columns):
        needed = ctx.needs_input_grad[1:]
        tiles = Tiles(ctx.share, ctx.kernel, *ctx.saved_tensors[: len(needed)])
        matched, row_top, row_others, column_top, column_others, *kept = ctx.saved_tensors[len(needed) :]
        by_rows, by_columns = ctx.share.sum(by_rows, by_columns)
        grads = tiles.gradients(needed)
        # The gradient is p of its row and p of its column, times those of the losses, and minus these for a match: of a
        # match as p - 1 = -(sum of the others), which keeps its digits where the loss is small.
        by_rows = by_rows / (row_others + (matched - row_top).exp())
        by_columns = by_columns / (column_others + (matched - column_top).exp())
        by_matched = -row_others * by_rows - column_others * by_columns
        for number, rows in enumerate(tiles):
            dot, value = (kept[number][0], kept[number][-1]) if number < len(kept) else tiles.value(rows)
            score = tiles.score(rows, value)
            of_columns = exponential(tiles.less(score, column_top))
            grad = exponential(score.sub_(row_top[rows, None])).mul_(by_rows[rows, None])
            grad.addcmul_(of_columns, by_columns)
            grad.diagonal(rows.start).copy_(by_matched[rows])
            tiles.accumulate(grads, rows, dot, value, grad)
        tiles.finish(grads)
        return None, *grads


def exponential(x: Tensor) -> Tensor:
    """e^x in place, and 0 below 2^LEAST."""
    return F.threshold_(x.mul_(BITS), LEAST, -math.inf).exp2_()


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
            dot, value = tiles.value(rows)
            # A match has the loss softplus(-score), any other pair softplus(score).
            sign = torch.where(group[rows, None] == group, -1.0, 1.0).to(value.dtype)
            wrong = tiles.score(rows, value).mul_(sign)
            odds = torch.mul(wrong, BITS, out=tiles.buffers[1, : len(wrong)]).clamp_(LEAST, MOST).exp2_()
            # Of s bits, softplus is log(1 + 2^min(s, MOST)) + max(s - MOST, 0) / BITS.
            beyond = wrong.sub_(MOST / BITS).clamp_min_(0)
            total[rows] = log1p(odds).add_(beyond).sum(dim=1)
            grad = torch.div(odds, 1 + odds, out=wrong).mul_(sign)
            tiles.accumulate(grads, rows, dot, value, grad)
        tiles.finish(grads)
        ctx.save_for_backward(*grads)
        ctx.share = share
        return share.sum(total.sum())[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (grad,) = ctx.share.sum(grad)
        return None, None, *(None if x is None else x * grad for x in ctx.saved_tensors)


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
