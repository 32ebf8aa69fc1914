"""Tiles of a score matrix: each is computed once, and every figure reads it.

Q queries, G gallery items, P positives: pairs of a query and an item that answers it. `score` is a function from a
slice of queries to their scores (q, G), so that only tiles of the score matrix are in memory.
"""

import contextlib
import itertools
import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

TILE, DEVICE_TILE = 2**18, 2**24  # scores that are read at once: in a CPU's cache, or with few launches on a device
COMPUTED, ROWS = 2**22, 256  # scores, and queries, that are computed at once at least: smaller products are slower
ALIGNED = 16  # numbers in a cache line; products whose rows start within one take up to half as long again
BLOCK = 64  # items of whose scores the highest is taken first to find the two highest of all
# Exponentials are powers of two: exp2 takes a quarter of exp's time on some processors (MKL's on AMD), and is as exact.
# Least logit below the top, in bits: 2^-116 adds nothing to a sum, and powers may be slow where they underflow.
LEAST = -116.0
BITS = math.log2(math.e)  # a nat in bits
_processes = 0, 1, None  # that `divided` names


@contextlib.contextmanager
def divided(rank, world, gather):
    """Divide the tiles of `read`, `top` and `at_r` in the block among `world` processes, of which this is `rank`.

    Every process computes whole tiles, so the figures of all have the bits of one. gather: function that returns the
    list of what all processes call it with.

    >>> with divided(0, 1, lambda value: [value]):
    ...     read(torch.eye(2).__getitem__, 2, [0, 1], [0, 1], lambda tile: [tile.scores.amax(dim=1)])[0][0].tolist()
    [1.0, 1.0]
    """
    global _processes
    before, _processes = _processes, (rank, world, gather)
    try:
        yield
    finally:
        _processes = before


class Positives:
    """P positives, (P,) rows of queries and of items, sorted by query.

    >>> Positives([1, 0, 1], [4, 5, 6]).among(slice(1, 2), "cpu")
    (tensor([0, 0]), tensor([4, 6]))
    """

    def __init__(self, query, item):
        query, item = (torch.as_tensor(np.array(rows)).long() for rows in (query, item))
        order = query.argsort(stable=True)
        self.query, self.item = query[order], item[order]
        self.queries = int(self.query[-1]) + 1

    def among(self, rows, device):
        """Select the positives of the queries in the slice `rows`: their rows within the slice (p,) and items (p,)."""
        first, last = torch.searchsorted(self.query, torch.tensor([rows.start, rows.stop])).tolist()
        return (self.query[first:last] - rows.start).to(device), self.item[first:last].to(device)


def even_slices(count, most):
    """Slices of about the same size, at most about `most`, that make up `count` rows; they start at cache lines.

    A product of few rows or columns may round otherwise, and equal items would no longer tie.

    >>> even_slices(100, most=60)
    [slice(0, 48, None), slice(48, 100, None)]
    """
    parts = math.ceil(count / most)
    unit = ALIGNED if count >= parts * ALIGNED else 1
    ends = [*(number * count // parts // unit * unit for number in range(parts)), count]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def tiles(score, queries, gallery, mine=False):
    """Yield slices of the Q queries with their scores (q, G), at most a tile of scores each, but one query at least.

    Scores are valid until the next slice, as `score` may reuse their memory. mine: only the slices of this process, see
    `divided`.

    >>> [(rows, len(scores)) for rows, scores in tiles(lambda rows: torch.zeros(3, 2)[rows], 3, 2)]
    [(slice(0, 3, None), 3)]
    """
    rank, world, _ = _processes if mine else (0, 1, None)
    for rows in even_slices(queries, max(COMPUTED // gallery, min(ROWS, queries)))[rank::world]:
        scores = score(rows)
        part = max(1, (TILE if scores.device.type == "cpu" else DEVICE_TILE) // gallery)
        for first in range(rows.start, rows.stop, part):
            last = min(first + part, rows.stop)
            yield slice(first, last), scores[first - rows.start : last - rows.start]


@torch.inference_mode()
def all_scores(score, queries, gallery):
    """Compute the whole score matrix (Q, G) in tiles, which bounds the memory that `score` itself needs.

    >>> all_scores(lambda rows: torch.eye(2)[rows], 2, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    whole = None
    for rows, scores in tiles(score, queries, gallery):
        if whole is None:
            whole = scores.new_empty((queries, gallery))
        whole[rows] = scores
    return whole


def two_highest(scores):
    """The two highest scores of each query and their items, (q, 2) each, of scores (q, G); G >= 2.

    `topk` of all takes ten times as long as the highest of each BLOCK of items: the two highest lie in the two blocks
    with the highest ones, or in the rest that fills no block.

    >>> two_highest(torch.tensor([[1.0, 3.0, 2.0]]))[1].tolist()
    [[1, 2]]
    """
    whole = scores.shape[1] // BLOCK * BLOCK
    if whole <= 2 * BLOCK:
        return scores.topk(2, dim=1)
    block = scores[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=2).topk(2, dim=1).indices
    of_block, rest = (torch.arange(*ends, device=scores.device) for ends in ((0, BLOCK), (whole, scores.shape[1])))
    item = torch.cat([(BLOCK * block[:, :, None] + of_block).flatten(1), rest.expand(len(scores), -1)], dim=1)
    value, place = scores.gather(1, item).topk(2, dim=1)
    return value, item.gather(1, place)


class Columns(list):
    """Arrays (Q, ...) that are filled slice by slice of the queries.

    They are allocated at full size at the first slice: small arrays that are allocated between tiles and kept would
    fragment the memory, which then grows to many times its content.

    >>> columns = Columns(2)
    >>> for row in (0, 1):
    ...     columns.put(slice(row, row + 1), torch.tensor([row + 3.0]))
    >>> columns[0].tolist()
    [3.0, 4.0]
    """

    def __init__(self, queries):
        self.queries, self.filled = queries, []

    def put(self, rows, *values):
        """Fill in tensors (q, ...) for the queries in the slice `rows`."""
        if not self:
            self.extend(np.empty((self.queries, *x.shape[1:]), x.cpu().numpy().dtype) for x in values)
        for column, value in zip(self, values, strict=True):
            column[rows] = value.cpu().numpy()
        self.filled.append(rows)

    def complete(self):
        """Fill in the slices of the other processes, see `divided`; returns itself."""
        rank, world, gather = _processes
        if world > 1:
            parts = gather([(rows, [column[rows] for column in self]) for rows in self.filled])
            for rows, values in [item for part in parts[:rank] + parts[rank + 1 :] for item in part]:
                self.put(rows, *map(torch.from_numpy, values))
        return self


class Posterior(NamedTuple):
    """Softmax of logits over the gallery."""

    score: torch.Tensor  # (q,) of the most probable item
    likelihood: torch.Tensor  # (q, G) exponentials of the logits less the highest of their query
    total: torch.Tensor  # (q,) their sums
    entropy: torch.Tensor  # (q,) in nats


def is_negative(scale):
    """Whether a posterior's scale is negative, as a free temperature may be: then the lowest score is the likeliest.

    >>> is_negative(-2.0), is_negative(torch.tensor([2.0]))
    (True, False)
    """
    return not torch.is_tensor(scale) and scale < 0


class Tile:
    """Scores (q, G) of the queries in the slice `rows`, and what several readers need of them, computed once.

    buffers: memory that tiles reuse, since to allocate it for each would cost more than to count in it.
    """

    def __init__(self, rows, scores, positives, buffers):
        self.rows, self.scores, self.positives, self.buffers = rows, scores, positives, buffers

    @cached_property
    def targets(self):
        """Positives of these queries: their rows within the slice (p,) and items (p,)."""
        return self.positives.among(self.rows, self.scores.device)

    @cached_property
    def two_highest(self):
        """The two highest scores of each query and their items, (q, 2) each."""
        return two_highest(self.scores)

    def buffer(self, name, dtype=None):
        """Memory (q, G) under a name."""
        kept, dtype = self.buffers.get(name), dtype or self.scores.dtype
        if kept is None or kept.shape != self.scores.shape or kept.dtype != dtype:
            self.buffers[name] = kept = torch.empty_like(self.scores, dtype=dtype)
        return kept

    def latest(self, name, key, compute):
        """What `compute` returned under this name for this tile and key, if that was the last call; else call it."""
        kept = self.buffers.get(name)
        if kept is None or kept[0] is not self or kept[1] is not key:
            self.buffers[name] = kept = self, key, compute()
        return kept[2]

    def less(self, constants):
        """The tile of these scores less constants (G,)."""

        def subtract():
            scores = torch.sub(self.scores, constants, out=self.buffer("scores less"))
            return Tile(self.rows, scores, self.positives, self.buffers)

        return self.latest("less", constants, subtract)

    def posterior(self, scale):
        """The Posterior of the logits scale * score. scale: a number, or one for each of all queries, (Q,)."""

        def softmax():
            factor = scale[self.rows, None].to(self.scores) if torch.is_tensor(scale) else scale
            score = self.scores.amin(dim=1) if is_negative(scale) else self.scores.amax(dim=1)
            below = torch.sub(self.scores, score[:, None], out=self.buffer("below"))
            below.mul_(BITS * factor).clamp_min_(LEAST)
            likelihood = torch.exp2(below, out=self.buffer("likelihood"))
            total = likelihood.sum(dim=1)
            entropy = total.log() - self.sum_of_products(likelihood, below) / (BITS * total)
            return Posterior(score, likelihood, total, entropy)

        return self.latest("posterior", scale, softmax)

    def most_probable(self, scale):
        """The most probable item (q,) of each query under the posterior."""
        return self.scores.argmin(dim=1) if is_negative(scale) else self.two_highest[1][:, 0]

    def count(self, compare, matrix, values):
        """Number (q,) of entries of a matrix (q, G) for which `compare`, such as torch.gt, holds with values (q,)."""
        # Sums of ones are exact in float32 up to 2^24, and much faster than sums of Booleans.
        exact = torch.promote_types(matrix.dtype, torch.float32 if matrix.shape[1] <= 2**24 else torch.float64)
        return compare(matrix, values[:, None], out=self.buffer("work", exact)).sum(dim=1).long()

    def sum_of_products(self, left, right):
        """Sums (q,) of the products of two matrices (q, G)."""
        return torch.mul(left, right, out=self.buffer("work")).sum(dim=1)


@torch.inference_mode()
def read(score, gallery, query_of_positive, item_of_positive, *readers):
    """Give every Tile to every reader: a list of the arrays (Q, ...) of each.

    query_of_positive, item_of_positive: (P,) rows, with every query 0 .. Q-1 present. reader: a function from a Tile to
    tensors (q, ...).

    >>> score, top = torch.eye(2).__getitem__, lambda tile: [tile.scores.amax(dim=1)]
    >>> read(score, 2, [0, 1], [0, 1], top)[0][0].tolist()
    [1.0, 1.0]
    """
    positives, buffers = Positives(query_of_positive, item_of_positive), {}
    columns = [Columns(positives.queries) for _ in readers]
    for rows, scores in tiles(score, positives.queries, gallery, mine=True):
        tile = Tile(rows, scores, positives, buffers)
        for reader, column in zip(readers, columns, strict=True):
            column.put(rows, *reader(tile))
    return [column.complete() for column in columns]
