"""Cross-modal retrieval: ranks by counting, recall, lists of the best, and the limit that a known ambiguity sets.

Q queries, G gallery items, P positives (pairs of a query and an item that answers it). Scores come from a function of
a slice of queries, (q, G), and are never held but in tiles.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

TILE = 2**22  # scores held at once: 16 MB in float32, of which some stay in a processor's cache


class Positives:
    """P positives, (P,) rows of queries and of items, ordered so that those of neighboring queries lie together."""

    def __init__(self, query, item):
        query, item = torch.as_tensor(np.array(query)), torch.as_tensor(np.array(item))
        order = query.argsort(stable=True)
        self.query, self.item = query[order], item[order]
        self.queries = int(self.query[-1]) + 1

    def among(self, rows, device):
        """Give the positives of the queries in the slice `rows`: (p,) rows within it, and (p,) items."""
        first, last = torch.searchsorted(self.query, torch.tensor([rows.start, rows.stop])).tolist()
        return (self.query[first:last] - rows.start).to(device), self.item[first:last].to(device)


def tiles(score, queries, gallery, share=1):
    """Yield slices of Q queries with their scores (q, G), TILE / share of them at most, of TILE computed at once."""
    step = max(1, TILE // gallery)
    part = max(1, step // share)  # products of fewer rows would take longer, and more memory
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        scores = score(slice(start, stop))
        for first in range(start, stop, part):
            last = min(first + part, stop)
            yield slice(first, last), scores[first - start : last - start]


@torch.inference_mode()
def whole(score, queries, gallery):
    """Compute all scores (Q, G), to be held, in tiles, beside which a method needs little."""
    return torch.cat([scores for _, scores in tiles(score, queries, gallery)])


class Columns(list):
    """Arrays (Q, ...) that are filled run by run of queries.

    They are made whole before: arrays of single runs, made between tiles and kept, would stand where the next tile
    could have been, and memory would grow to many times what is held.
    """

    def __init__(self, queries):
        self.queries = queries

    def put(self, rows, *values):
        """Fill in tensors (q, ...) for the queries in the slice `rows`."""
        if not self:
            self.extend(np.empty((self.queries, *x.shape[1:]), x.cpu().numpy().dtype) for x in values)
        for column, value in zip(self, values, strict=True):
            column[rows] = value.cpu().numpy()


class Ranking(NamedTuple):
    """Where each query's best-scored positive stands among the other items, (Q,) each."""

    better: np.ndarray  # items that are no positives and score above it
    tied: np.ndarray  # items that are no positives and score the same
    own: np.ndarray  # positives that score the same, itself included
    top: np.ndarray  # the row of the best-scored item of all
    score: np.ndarray  # its score
    margin: np.ndarray  # by which it stands above the second best
    entropy: np.ndarray  # in nats, of the posterior over the gallery
    probability: np.ndarray  # of the best-scored item under that posterior


@torch.inference_mode()
def rank(score, gallery, query_of_positive, item_of_positive, scale=1.0):
    """Rank each query's positives in a gallery of G items, blockwise: in tiles of at most TILE scores.

    score: function from a slice of queries to their scores (q, G). query_of_positive, item_of_positive: (P,) rows,
    with every query 0 .. Q-1 present. scale: the posterior over the gallery is the softmax of scale * score. Counting
    needs no sorting, and serves every recall@k at once. Raises FloatingPointError where a score is not finite, and
    ValueError for a gallery of fewer than two items.
    """
    if gallery < 2:
        raise ValueError(f"a gallery of {gallery} cannot be ranked")
    positives = Positives(query_of_positive, item_of_positive)
    columns, work = Columns(positives.queries), None
    for rows, scores in tiles(score, positives.queries, gallery):
        if work is None or work.shape != scores.shape:  # new memory for every tile would cost more than the counting
            # Sums of ones are exact in float32 up to 2^24, and much faster than sums of truth values.
            exact = torch.promote_types(scores.dtype, torch.float32 if gallery <= 2**24 else torch.float64)
            work, weight = torch.empty_like(scores, dtype=exact), torch.empty_like(scores)
        (top_score, second), top = (x.T for x in scores.topk(2, dim=1))
        row, column = positives.among(rows, scores.device)
        # The positives' scores are the tile's own: computed apart, rounding could set one above or below itself.
        positive = scores[row, column]
        best = torch.full_like(top_score, -torch.inf).scatter_reduce(0, row, positive, "amax")
        own = torch.zeros_like(best).scatter_add(0, row, (positive == best[row]).to(best.dtype)).long()
        better = torch.gt(scores, best[:, None], out=work).sum(dim=1).long()
        tied = torch.eq(scores, best[:, None], out=work).sum(dim=1).long() - own
        logit = torch.mul(scores, scale, out=weight)
        # Where the posterior underflows to 0, its logarithm stays finite for the product's sake.
        logit.sub_(logit.amax(dim=1)[:, None]).clamp_min_(torch.finfo(scores.dtype).min)
        likely = torch.exp(logit, out=work)
        total = likely.sum(dim=1)
        entropy = total.log() - likely.mul_(logit).sum(dim=1) / total
        if not torch.isfinite(top_score + entropy).all():
            raise FloatingPointError("a score is not finite")
        columns.put(rows, better, tied, own, top[0], top_score, top_score - second, entropy, 1 / total)
    return Ranking(*columns)


def recall_at(ranking, k):
    """Give each query's recall@k, (Q,): 1 for a hit, 0 for a miss, and where scores tie the chance of a hit.

    Tied items stand in random order, so a constant score has the recall of a guess, not of an oracle.
    """
    slots = np.maximum(k - ranking.better, 0)  # places of the top k that the tied items fill
    miss = np.ones(len(slots))
    for filled in range(k):  # draw without replacement: no positive in any slot
        left = ranking.tied + ranking.own - filled
        drawn = np.where(left > 0, (ranking.tied - filled) / np.maximum(left, 1), 0)
        miss = np.where(filled < slots, miss * np.maximum(drawn, 0), miss)
    return np.where(ranking.own > 0, 1 - miss, 0.0)


def first_rank(ranking):
    """Give the rank of each query's first positive, (Q,), from 1 on: the expected one, tied items in random order."""
    return ranking.better + 1 + ranking.tied / (ranking.own + 1)


def rsum(*rankings, ks=(1, 5, 10)):
    """Sum recall@k over rankings and `ks`, in percent: of both ways and 1, 5, 10 it is at most 600."""
    return 100 * float(sum(recall_at(ranking, k).mean() for ranking in rankings for k in ks))


def fold_recalls(score, image_of_text, ks=(1, 5, 10), count=5):
    """Recall@k of captions and of images, {k: mean} each, averaged over `count` galleries that are tried one by one.

    A fold is a run of images with their captions, image_of_text (M,); every image has one. score: function from rows
    of images (n,) and rows of captions (m,) to their scores (n, m). Over Karpathy's 5,000 test images in the order of
    their file it is COCO 1K (Karpathy & Fei-Fei, CVPR 2015). Raises ValueError where a fold would have one image.
    """
    owner = np.asarray(image_of_text)
    if owner.max() + 1 < 2 * count:
        raise ValueError(f"{owner.max() + 1} images are too few for {count} folds")
    found = []
    for images in np.array_split(np.arange(owner.max() + 1), count):
        texts = np.flatnonzero((owner >= images[0]) & (owner <= images[-1]))
        own, row = owner[texts] - images[0], np.arange(len(texts))
        t2i = rank(lambda rows, i=images, t=texts: score(i, t[rows]).T, len(images), row, own)
        i2t = rank(lambda rows, i=images, t=texts: score(i[rows], t), len(texts), own, row)
        found.append([[recall_at(ranking, k).mean() for k in ks] for ranking in (t2i, i2t)])
    return tuple(dict(zip(ks, side, strict=True)) for side in np.mean(found, axis=0).tolist())


@torch.inference_mode()
def top(score, queries, gallery, k):
    """List the k best-scored of G items for each of Q queries, (Q, k) rows, best first; ties keep the rows' order.

    score: as in `rank`. Raises FloatingPointError where a listed score is not finite, and ValueError unless
    1 <= k <= G.
    """
    if not 1 <= k <= gallery:
        raise ValueError(f"{k} items cannot be listed of a gallery of {gallery}")
    columns = Columns(queries)
    for rows, scores in tiles(score, queries, gallery):
        value, item = scores.topk(k, dim=1)
        if not torch.isfinite(value).all():
            raise FloatingPointError("a score is not finite")
        # Of tied items topk takes any: rows in which not all of the last ones found a place are sorted as a whole.
        crowded = (scores >= value[:, -1:]).sum(dim=1) > k
        item, order = item.sort(dim=1)
        order = value.gather(1, order).argsort(dim=1, descending=True, stable=True)
        item = item.gather(1, order)
        item[crowded] = scores[crowded].argsort(dim=1, descending=True, stable=True)[:, :k]
        columns.put(rows, item)
    return columns[0]


class AtR(NamedTuple):
    """Quality of each query's R best-scored items, where R is the number of its positives, (Q,) each."""

    mean_average_precision: np.ndarray  # mAP@R: sums the precision at the rank of every positive found, over R
    r_precision: np.ndarray  # share of positives


@torch.inference_mode()
def at_r(score, matches):
    """mAP@R and R-precision of Q queries by the truth, sparse (Q, G), in expectation over random order of tied items.

    score: as in `rank`. Musgrave, Belongie & Lim (ECCV 2020), arXiv 2003.08505, section 3.2. Raises ValueError for a
    query without a positive, and FloatingPointError where a score that counts is not finite.
    """
    matches = matches.tocsr()
    if not np.diff(matches.indptr).all():
        raise ValueError("a query has no positive")
    columns = Columns(matches.shape[0])
    for rows, scores in tiles(score, *matches.shape, share=8):  # for every score some ten numbers are held
        true = torch.from_numpy(matches[rows].toarray() != 0).to(scores.device)
        positives = true.sum(dim=1, keepdim=True).cpu()
        depth = int(positives.max())
        value, item = scores.topk(depth, dim=1)
        if not torch.isfinite(value).all():
            raise FloatingPointError("a score is not finite")
        tied = scores == value[:, -1:]
        tied, tied_positives = (x.sum(dim=1, keepdim=True).cpu() for x in (tied, tied & true))
        # Few numbers are left, and not every device has float64.
        value, hit = value.cpu(), true.gather(1, item).cpu()
        place = torch.arange(depth).expand_as(hit)
        hits = F.pad(hit.cumsum(dim=1), (1, 0))  # among the first 0 .. depth places
        # Where the group of ties that a place is in starts, and the next one does.
        changes = value[:, 1:] != value[:, :-1]
        start = torch.where(F.pad(changes, (1, 0), value=True), place, 0).cummax(dim=1).values
        stop = torch.where(F.pad(changes, (0, 1), value=True), place + 1, depth)
        stop = stop.flip(1).cummin(dim=1).values.flip(1)
        before = hits.gather(1, start)
        size, own = stop - start, hits.gather(1, stop) - before
        # The last group may go on beyond the list.
        last = stop == depth
        size, own = torch.where(last, tied, size).double(), torch.where(last, tied_positives, own).double()
        # A place in the group holds a positive with odds of own : size, and then as many of the others stand above it
        # as fall there by chance.
        above = (place - start) * (own - 1) / (size - 1).clamp_min(1)
        chance = own / size * (place < positives)
        precision = (before + 1 + above) / (place + 1)
        columns.put(rows, *((x.sum(dim=1) / positives[:, 0]) for x in (chance * precision, chance)))
    return AtR(*columns)


def ambiguity(matches):
    """Log of the number of gallery images that each caption is true of, (M,), from the truth, sparse (N, M)."""
    return np.log(_count(matches, axis=0))


def bayes_optimal_text_to_image(matches):
    """Best possible R@1 of each caption, (M,), from the truth, sparse (N, M): one in the number of images it fits.

    A hit is the image that the caption was written for, and nothing tells it from the others that fit.
    """
    return 1 / _count(matches, axis=0)


def bayes_optimal_image_to_text(matches, own):
    """Best possible R@1 of each image, (N,), from the truth, sparse (N, M), and its number of own captions, (N,).

    The best answer is the caption true of the image that fits the fewest others, m - 1 of them. It belongs to the
    image with odds of 1 : m - 1 if judged alone; but exactly `own` of the captions true of the image belong to it,
    which makes membership a conditional Bernoulli design: with weights w = 1 / (m - 1) and elementary symmetric
    polynomials e, the probability is w e[own - 1] / (w e[own - 1] + e[own]), e over the other true captions.
    """
    matches, others = matches.tocsr(), _count(matches, axis=0) - 1
    fits = [np.sort(others[matches.indices[a:b]]) for a, b in zip(matches.indptr, matches.indptr[1:])]
    certain = np.array([fit[0] == 0 for fit in fits])
    # Weights relative to the best answer's, which is 1 and left out; short rows are filled with weights of zero.
    weights = np.zeros((len(fits), max(map(len, fits))))
    for row in np.flatnonzero(~certain):
        weights[row, : len(fits[row]) - 1] = fits[row][0] / fits[row][1:]
    e = np.zeros((len(fits), int(max(own)) + 1))
    e[:, 0] = 1
    for weight in weights.T:
        e[:, 1:] += weight[:, None] * e[:, :-1]
    row = np.arange(len(fits))
    with_best, without = e[row, own - 1], e[row, own]
    return np.where(certain, 1.0, with_best / np.where(certain, 1.0, with_best + without))


def _count(matches, axis):
    return np.asarray(matches.sum(axis=axis), dtype=np.float64).ravel()
