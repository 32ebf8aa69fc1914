"""Cross-modal retrieval: ranks, recall@k, top-k lists, mAP@R, and the Bayes-optimal recall under known ambiguity.

Q queries, G gallery items, P positives: pairs of a query and an item that answers it. `score` is a function from a
slice of queries to their scores (q, G), as in `metrics/score_tiles.py`.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from metrics.score_tiles import Columns, read, tiles


class Ranking(NamedTuple):
    """Rank of each query's best-scored positive, and its best-scored item, (Q,) each."""

    better: np.ndarray  # negatives that score above the best positive
    tied: np.ndarray  # negatives that score the same as it
    tied_positives: np.ndarray  # positives that score the same as it, itself included
    top: np.ndarray  # row of the best-scored item
    score: np.ndarray  # score of the best-scored item
    margin: np.ndarray  # score of the best-scored item minus that of the second best
    entropy: np.ndarray  # of the posterior over the gallery, in nats
    probability: np.ndarray  # of the best-scored item under this posterior


def ranks(tile, scale):
    """Read the fields of a Ranking off a Tile; the posterior is the softmax of scale * score.

    Ranks are counted, which needs no sorting and serves every recall@k. Raises FloatingPointError if a score is not
    finite.

    >>> Ranking(*read(torch.eye(2).__getitem__, 2, [0, 1], [0, 0], partial(ranks, scale=1.0))[0]).better.tolist()
    [0, 1]
    """
    scores, (row, column) = tile.scores, tile.targets
    (top_score, second), top = (x.T for x in tile.two_highest)
    # Scores of positives are read off the tile: computed again, they could differ by a rounding error.
    positive = scores[row, column]
    best = torch.full_like(top_score, -torch.inf).scatter_reduce(0, row, positive, "amax")
    tied_positives = torch.zeros_like(best).scatter_add(0, row, (positive == best[row]).to(best.dtype)).long()
    better, tied = tile.count(torch.gt, scores, best), tile.count(torch.eq, scores, best) - tied_positives
    posterior = tile.posterior(scale)
    if not torch.isfinite(top_score + posterior.entropy).all():
        raise FloatingPointError("a score is not finite")
    margin, probability = top_score - second, 1 / posterior.total
    return better, tied, tied_positives, top[0], top_score, margin, posterior.entropy, probability


def rank(score, gallery, query_of_positive, item_of_positive, scale=1.0):
    """Rank each query's positives in a gallery of G items.

    score: function from a slice of queries to their scores (q, G). query_of_positive, item_of_positive: (P,) rows,
    with every query 0 .. Q-1 present. scale: the posterior over the gallery is the softmax of scale * score. Raises
    FloatingPointError if a score is not finite, and ValueError for a gallery of fewer than two items.

    >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.3, 0.5]])
    >>> rank(lambda rows: scores[rows], 3, query_of_positive=[0, 1], item_of_positive=[0, 1]).better.tolist()
    [0, 2]
    """
    if gallery < 2:
        raise ValueError(f"a gallery of {gallery} cannot be ranked")
    (columns,) = read(score, gallery, query_of_positive, item_of_positive, partial(ranks, scale=scale))
    return Ranking(*columns)


def recall_at(ranking, k):
    """Recall@k of each query, (Q,): 1 for a hit, 0 for a miss, and the probability of a hit if scores tie.

    Tied items are in random order, so that a constant score has the recall of a guess, not of an oracle.

    >>> ranking = rank(lambda rows: torch.zeros(1, 4)[rows], 4, [0], [2])
    >>> recall_at(ranking, 1).tolist()
    [0.25]
    """
    slots = np.maximum(k - ranking.better, 0)  # places of the top k that tied items fill
    miss = np.ones(len(slots))
    for filled in range(k):  # draw tied items without replacement: the probability that no slot gets a positive
        left = ranking.tied + ranking.tied_positives - filled
        drawn = np.where(left > 0, (ranking.tied - filled) / np.maximum(left, 1), 0)
        miss = np.where(filled < slots, miss * np.maximum(drawn, 0), miss)
    return np.where(ranking.tied_positives > 0, 1 - miss, 0.0)


def first_rank(ranking):
    """Rank of each query's first positive, (Q,), from 1 on, in expectation over random orders of tied items.

    >>> first_rank(rank(lambda rows: torch.tensor([[0.9, 0.1, 0.5]])[rows], 3, [0], [2])).tolist()
    [2.0]
    """
    return ranking.better + 1 + ranking.tied / (ranking.tied_positives + 1)


def rsum(*rankings, ks=(1, 5, 10)):
    """Sum of recall@k over rankings and `ks`, in percent: at most 600 for both directions and k = 1, 5, 10.

    >>> rsum(rank(lambda rows: torch.eye(2)[rows], 2, [0, 1], [0, 1]))
    300.0
    """
    return 100 * float(sum(recall_at(ranking, k).mean() for ranking in rankings for k in ks))


def fold_recalls(score, image_of_text, ks=(1, 5, 10), count=5):
    """Recall@k of text-to-image and of image-to-text retrieval, {k: mean} each, averaged over `count` folds.

    A fold is a run of consecutive images with their captions. image_of_text: (M,), in which every image occurs. score:
    function from rows of images (n,) and rows of captions (m,) to their scores (n, m). On Karpathy's 5,000 test images
    in the order of their file this is COCO 1K (Karpathy & Fei-Fei, CVPR 2015). Raises ValueError if a fold would have
    fewer than two images.

    >>> fold_recalls(lambda images, texts: torch.eye(4)[images][:, texts], np.arange(4), ks=[1], count=2)
    ({1: 1.0}, {1: 1.0})
    """
    owner = np.asarray(image_of_text)
    if owner.max() + 1 < 2 * count:
        raise ValueError(f"{owner.max() + 1} images are too few for {count} folds")
    recalls = []
    for images in np.array_split(np.arange(owner.max() + 1), count):
        texts = np.flatnonzero((owner >= images[0]) & (owner <= images[-1]))
        image, caption = owner[texts] - images[0], np.arange(len(texts))
        t2i = rank(lambda rows, i=images, t=texts: score(i, t[rows]).T, len(images), caption, image)
        i2t = rank(lambda rows, i=images, t=texts: score(i[rows], t), len(texts), image, caption)
        recalls.append([[recall_at(ranking, k).mean() for k in ks] for ranking in (t2i, i2t)])
    return tuple(dict(zip(ks, side, strict=True)) for side in np.mean(recalls, axis=0).tolist())


@torch.inference_mode()
def top(score, queries, gallery, k):
    """Rows of the k best-scored of G items for each of Q queries, (Q, k), best first; ties keep the order of the rows.

    score: as in `rank`. Raises FloatingPointError if a listed score is not finite, and ValueError unless 1 <= k <= G.

    >>> top(lambda rows: torch.tensor([[0.1, 0.9, 0.5]])[rows], 1, 3, k=2).tolist()
    [[1, 2]]
    """
    if not 1 <= k <= gallery:
        raise ValueError(f"{k} items cannot be listed of a gallery of {gallery}")
    columns = Columns(queries)
    for rows, scores in tiles(score, queries, gallery, mine=True):
        value, item = scores.topk(k, dim=1)
        if not torch.isfinite(value).all():
            raise FloatingPointError("a score is not finite")
        # topk picks any of the tied items: rows in which ties go on beyond the k-th place are sorted as a whole.
        crowded = (scores >= value[:, -1:]).sum(dim=1) > k
        item, order = item.sort(dim=1)
        order = value.gather(1, order).argsort(dim=1, descending=True, stable=True)
        item = item.gather(1, order)
        item[crowded] = scores[crowded].argsort(dim=1, descending=True, stable=True)[:, :k]
        columns.put(rows, item)
    return columns.complete()[0]


class AtR(NamedTuple):
    """Precision of each query's R best-scored items, where R is the number of its positives: (Q,) each, 1 is ideal."""

    mean_average_precision: np.ndarray  # mAP@R: sum of the precisions at the ranks of retrieved positives, over R
    r_precision: np.ndarray  # share of positives among the R items


@torch.inference_mode()
def at_r(score, matches):
    """mAP@R and R-precision of Q queries, in expectation over random orders of tied items.

    score: as in `rank`. matches: sparse (Q, G), not 0 where an item answers a query. Musgrave, Belongie & Lim (ECCV
    2020), arXiv 2003.08505, section 3.2. Raises ValueError for a query without a positive, and FloatingPointError if
    one of the R best scores is not finite.

    >>> from scipy import sparse
    >>> at_r(lambda rows: torch.tensor([[0.9, 0.5, 0.1]])[rows], sparse.csr_array([[1, 0, 1]])).r_precision.tolist()
    [0.5]
    """
    matches = matches.tocsr()
    positives = np.diff(matches.indptr)
    if not positives.all():
        raise ValueError("a query has no positive")
    level = np.log2(positives).astype(int) // 2  # queries whose lists are about equally long are read together
    columns = Columns(matches.shape[0])
    for rows, scores in tiles(score, *matches.shape, mine=True):
        true = torch.from_numpy(matches[rows].toarray() != 0).to(scores.device)
        both = torch.empty(2, len(scores), dtype=torch.float64)
        for each in np.unique(level[rows]):
            chosen = torch.from_numpy(np.flatnonzero(level[rows] == each)).to(scores.device)
            both[:, chosen.cpu()] = _of_lists(scores[chosen], true[chosen])
        columns.put(rows, *both)
    return AtR(*columns.complete())


def _of_lists(scores, true):
    """mAP@R and R-precision (2, q) of queries from their scores (q, G), and which items answer them, (q, G)."""
    positives = true.sum(dim=1, keepdim=True).cpu()
    depth = int(positives.max())
    value, item = scores.topk(depth, dim=1)
    if not torch.isfinite(value).all():
        raise FloatingPointError("a score is not finite")
    tied = scores == value[:, -1:]
    tied, tied_positives = (x.sum(dim=1, keepdim=True).cpu() for x in (tied, tied & true))
    # The rest is small, and not every device has float64.
    value, hit = value.cpu(), true.gather(1, item).cpu()
    place = torch.arange(depth).expand_as(hit)
    hits = F.pad(hit.cumsum(dim=1), (1, 0))  # among the first 0 .. depth places
    # Where the group of ties around each place starts and stops.
    changes = value[:, 1:] != value[:, :-1]
    start = torch.where(F.pad(changes, (1, 0), value=True), place, 0).cummax(dim=1).values
    stop = torch.where(F.pad(changes, (0, 1), value=True), place + 1, depth)
    stop = stop.flip(1).cummin(dim=1).values.flip(1)
    before = hits.gather(1, start)
    size, tied_hits = stop - start, hits.gather(1, stop) - before
    # The last group may go on beyond the list.
    last = stop == depth
    size, tied_hits = torch.where(last, tied, size).double(), torch.where(last, tied_positives, tied_hits).double()
    # A place in the group has a positive with probability tied_hits / size. The group's other positives are spread
    # evenly over its other places, so that this many of them are expected above.
    above = (place - start) * (tied_hits - 1) / (size - 1).clamp_min(1)
    chance = tied_hits / size * (place < positives)
    precision = (before + 1 + above) / (place + 1)
    return torch.stack([x.sum(dim=1) / positives[:, 0] for x in (chance * precision, chance)])


def ambiguity(matches):
    """True ambiguity of each caption, (M,): the log of the number of gallery images that it fits.

    matches: sparse (N, M), 1 where a caption is true of an image.

    >>> from scipy import sparse
    >>> ambiguity(sparse.csr_array([[1, 1], [0, 1]])).round(3).tolist()
    [0.0, 0.693]
    """
    return np.log(_count(matches, axis=0))


def bayes_optimal_text_to_image(matches):
    """Best possible R@1 of each caption, (M,): 1 over the number of images that it fits.

    matches: sparse (N, M), 1 where a caption is true of an image. A hit is the image that the caption was written for,
    which nothing distinguishes from the other images that fit.

    >>> from scipy import sparse
    >>> bayes_optimal_text_to_image(sparse.csr_array([[1, 1], [0, 1]])).tolist()
    [1.0, 0.5]
    """
    return 1 / _count(matches, axis=0)


def bayes_optimal_image_to_text(matches, captions):
    """Best possible R@1 of each image, (N,).

    matches: sparse (N, M), 1 where a caption is true of an image. captions: (N,), the number k of captions that were
    written for each image. The best answer is the caption true of the image that fits the fewest other images, m - 1
    of them. Alone, it would be one of the image's own with odds of 1 : m - 1. But exactly k of the captions true of the
    image are its own, a conditional Bernoulli design: with weights w = 1 / (m - 1) and elementary symmetric polynomials
    e of the other true captions' weights, the probability is w e[k - 1] / (w e[k - 1] + e[k]).

    >>> from scipy import sparse
    >>> bayes_optimal_image_to_text(sparse.csr_array([[1, 1], [1, 1]]), captions=np.array([1, 1])).tolist()
    [0.5, 0.5]
    """
    matches, others = matches.tocsr(), _count(matches, axis=0) - 1
    fits = [np.sort(others[matches.indices[a:b]]) for a, b in zip(matches.indptr, matches.indptr[1:])]
    certain = np.array([fit[0] == 0 for fit in fits])
    # Weights relative to the best answer's, which is 1 and left out; short rows are padded with zeros.
    weights = np.zeros((len(fits), max(map(len, fits))))
    for row in np.flatnonzero(~certain):
        weights[row, : len(fits[row]) - 1] = fits[row][0] / fits[row][1:]
    e = np.zeros((len(fits), int(max(captions)) + 1))
    e[:, 0] = 1
    for weight in weights.T:
        e[:, 1:] += weight[:, None] * e[:, :-1]
    row = np.arange(len(fits))
    with_best, without = e[row, captions - 1], e[row, captions]
    return np.where(certain, 1.0, with_best / np.where(certain, 1.0, with_best + without))


def _count(matches, axis):
    return np.asarray(matches.sum(axis=axis), dtype=np.float64).ravel()
