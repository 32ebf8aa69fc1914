"""How far probabilities can be believed: calibration errors, proper scores, and the temperature that suits best.

Q queries, G classes or gallery items, P positives: pairs of a query and an item that answers it. Probabilities are the
softmax over the G items of scale * score; scores come from a function, in tiles, as in `metrics/retrieval.py`.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch

from metrics.retrieval import Columns, Positives, tiles
from metrics.uncertainty import bin_of, tie_means


class Forecast(NamedTuple):
    """What is forecast for each query, and how well, (Q,) each."""

    confidence: np.ndarray  # that the item of the largest probability answers: the probability of its group
    hit: np.ndarray  # whether a positive has it; where several items do, the chance
    nll: np.ndarray  # negative log of the probability that one of the positives has, in nats
    brier: np.ndarray  # squared errors of the probabilities, all positives taken as one class; from 0 to 2
    entropy: np.ndarray  # of the items' probabilities, in nats


@torch.inference_mode()
def forecast(score, gallery, query_of_positive, item_of_positive, scale=1.0, group_of_item=None):
    """Judge the probabilities of each query's items, blockwise.

    score: function from a slice of queries to their scores (q, G): logits up to `scale`, or logarithms of
    probabilities. query_of_positive, item_of_positive: (P,) rows, with every query 0 .. Q-1 present; of a
    classification they are the row numbers and the labels. group_of_item (G,): items that answer the same queries, such
    as the captions of one image, among which a posterior is shared; by default each stands alone. Brier (1950), summed
    over classes. Raises FloatingPointError where a score is not finite.
    """
    members = None if group_of_item is None else _members(group_of_item)
    positives = Positives(query_of_positive, item_of_positive)
    columns = Columns(positives.queries)
    for rows, scores in tiles(score, positives.queries, gallery, share=2):
        logit = scale * scores
        log_probability = logit.log_softmax(dim=1)
        row, column = positives.among(rows, scores.device)
        own = log_probability[row, column]
        best, top = log_probability.max(dim=1)
        sure = best.exp() if members is None else _of_group(log_probability, members, top)
        # The probability of all positives, by the largest of them, which may underflow.
        largest = torch.full_like(best, -torch.inf).scatter_reduce(0, row, own, "amax")
        share = torch.zeros_like(best).scatter_add(0, row, (own - largest[row]).exp())
        nll = -(largest + share.log())
        first = logit.amax(dim=1)
        right = (logit[row, column] == first[row]).to(best.dtype)
        hit = torch.zeros_like(best).scatter_add(0, row, right) / (logit == first[:, None]).sum(dim=1)
        probability = log_probability.exp()
        squares = probability.square().sum(dim=1)
        mine = torch.zeros_like(best).scatter_add(0, row, own.exp())
        own_squares = torch.zeros_like(best).scatter_add(0, row, own.exp().square())
        brier = (1 - mine).square() + (squares - own_squares).clamp_min(0)
        # Where a probability underflows to 0, its logarithm stays finite for the product's sake.
        log_probability.clamp_min_(torch.finfo(log_probability.dtype).min)
        entropy = -probability.mul_(log_probability).sum(dim=1)
        if not torch.isfinite(nll + brier).all():
            raise FloatingPointError("a score is not finite")
        found = sure, hit, nll.clamp_min(0), brier, entropy.clamp_min(0)
        columns.put(rows, *(x.cpu().double() for x in found))
    return Forecast(*columns)


def _members(group):
    """The items (G, S) of each item's group, filled up with G."""
    _, of_group, size = np.unique(group, return_inverse=True, return_counts=True)
    order, starts = np.argsort(of_group, kind="stable"), np.cumsum(size) - size
    place = np.arange(size.max())
    rows = np.minimum(starts[:, None] + place, len(order) - 1)
    return torch.from_numpy(np.where(place < size[:, None], order[rows], len(order))[of_group])


def _of_group(log_probability, members, top):
    """The probability (q,) of the groups that the items `top` (q,) are of."""
    items = members.to(top.device)[top]
    inside = items < log_probability.shape[1]
    return (log_probability.gather(1, items.where(inside, 0)).exp() * inside).sum(dim=1)


def fit_scale(score, gallery, query_of_positive, item_of_positive):
    """Fit the scale, one over the temperature, that gives held-out queries the least mean NLL, or None.

    Takes and raises what `forecast` does. Guo et al. (ICML 2017), arXiv 1706.04599. Each of some twenty tries goes over
    all scores, but for one number a few hundred queries suffice. Where every answer is right a larger scale is always
    better, so that none is: a mean NLL below one in the number of queries is less than so many can show.
    """
    queries = Positives(query_of_positive, item_of_positive).queries
    with torch.inference_mode():
        _, scores = next(tiles(score, queries, gallery))
        scatter = scores.cpu().double().std(dim=1).mean().item()
    if not math.isfinite(scatter):
        raise FloatingPointError("a score is not finite")
    if scatter == 0:
        return 1.0

    def nll(log_scale):
        scale = math.exp(log_scale) / scatter
        return forecast(score, gallery, query_of_positive, item_of_positive, scale).nll.mean()

    # Of one positive each, NLL is convex in the scale, so that it has one minimum.
    best = scipy.optimize.minimize_scalar(nll, bounds=(-10, 10), method="bounded", options={"xatol": 1e-3})
    return None if best.fun < 1 / queries else math.exp(best.x) / scatter


def halves(group, seed=0):
    """Draw which queries (Q,) a scale is fitted on, the others being judged: True for all of about half of the groups.

    group: (Q,), such as the image that a caption describes; what belongs together stays together. Raises ValueError for
    fewer than two groups.
    """
    _, of_group = np.unique(group, return_inverse=True)
    groups = of_group.max() + 1
    if groups < 2:
        raise ValueError("a single group cannot be split")
    return (np.random.default_rng(seed).permutation(groups) < groups // 2)[of_group]


class Reliability(NamedTuple):
    """The bins of a reliability diagram that hold queries, (B,) each."""

    count: np.ndarray
    confidence: np.ndarray  # mean of the bin
    accuracy: np.ndarray  # share of hits in the bin


def reliability(confidence, hit, bins=15):
    """Bin queries, (Q,) each, by confidence in [0, 1] in `bins` bins of equal width, which hold their lower ends.

    Guo et al. (2017), Figure 1. Raises ValueError for a confidence outside [0, 1].
    """
    return _binned(bin_of(confidence, bins), np.asarray(confidence, dtype=np.float64), hit)


def adaptive_reliability(confidence, hit, bins=15):
    """Bin queries, (Q,) each, by confidence in `bins` bins of equal count; those of equal confidence share their hits.

    Nguyen & O'Connor (EMNLP 2015), arXiv 1508.05154. Raises ValueError unless 1 <= bins <= Q.
    """
    if not 1 <= bins <= len(hit):
        raise ValueError(f"{len(hit)} queries cannot be split into {bins} bins")
    confidence = np.asarray(confidence, dtype=np.float64)
    of_rank = np.repeat(np.arange(bins), [len(part) for part in np.array_split(confidence, bins)])
    return _binned(of_rank, np.sort(confidence), tie_means(confidence, hit))


def _binned(of_query, confidence, hit):
    count = np.bincount(of_query)
    held = count > 0
    means = [np.bincount(of_query, weights=x)[held] / count[held] for x in (confidence, hit)]
    return Reliability(count[held], *means)


def calibration_error(bins):
    """Expected calibration error, in [0, 1], of a `Reliability`: mean distance of confidence and accuracy.

    Naeini et al. (AAAI 2015) for bins of equal width; of bins of equal count it is the adaptive one.
    """
    return float(bins.count @ np.abs(bins.accuracy - bins.confidence) / bins.count.sum())
