"""Cross-modal retrieval: ranks by counting, recall, and the limit that a known ambiguity sets.

Q queries, G gallery items, P positives (pairs of a query and an item that answers it).
"""

from typing import NamedTuple

import numpy as np
import torch

TILE = 2**24  # scores held at once: 64 MB in float32


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
    query, item = torch.tensor(query_of_positive), torch.tensor(item_of_positive)
    order = query.argsort(stable=True)
    query, item = query[order], item[order]
    queries = int(query[-1]) + 1
    step = max(1, TILE // gallery)
    blocks = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        scores = score(slice(start, stop))
        (top_score, second), top = (x.T for x in scores.topk(2, dim=1))
        first, last = torch.searchsorted(query, torch.tensor([start, stop])).tolist()
        row, column = (query[first:last] - start).to(scores.device), item[first:last].to(scores.device)
        # The positives' scores are the tile's own: computed apart, rounding could set one above or below itself.
        positive = scores[row, column]
        best = scores.new_full((stop - start,), -torch.inf).scatter_reduce(0, row, positive, "amax")
        own = torch.zeros_like(best).scatter_add(0, row, (positive == best[row]).to(best.dtype))
        better = (scores > best[:, None]).sum(dim=1)
        tied = (scores == best[:, None]).sum(dim=1) - own.long()
        log_posterior = (scale * scores).log_softmax(dim=1)
        # Where the posterior underflows to 0, its logarithm stays finite for the product's sake.
        entropy = -(log_posterior.exp() * log_posterior.clamp_min(torch.finfo(scores.dtype).min)).sum(dim=1)
        if not torch.isfinite(top_score + entropy).all():
            raise FloatingPointError("a score is not finite")
        found = (better, tied, own.long(), top[0], top_score, top_score - second, entropy)
        blocks.append([x.cpu().numpy() for x in (*found, log_posterior.amax(dim=1).exp())])
    return Ranking(*(np.concatenate(column) for column in zip(*blocks, strict=True)))


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
