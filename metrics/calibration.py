"""Calibration of probabilities: calibration errors, proper scores and temperature scaling.

Q queries, G classes or gallery items, P positives: pairs of a query and an item that answers it. Probabilities are the
softmax over the G items of scale * score. `score` is a function from slices of queries, as in `metrics/score_tiles.py`.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy
import torch

from metrics.score_tiles import BITS, LEAST, Positives, read, tiles
from metrics.uncertainty import bin_of, tie_means


class Forecast(NamedTuple):
    """Predicted probabilities of each query and their errors, (Q,) each."""

    confidence: np.ndarray  # probability of the most probable item's group
    hit: np.ndarray  # whether the most probable item is a positive; the probability of that if several scores tie
    nll: np.ndarray  # negative log of the positives' total probability, in nats; 0 is ideal
    brier: np.ndarray  # sum of squared errors, all positives taken as one class; from 0, which is ideal, to 2
    entropy: np.ndarray  # of the probabilities, in nats


def probabilities(tile, scale, members=None):
    """Read the fields of a Forecast off a Tile; members: `members_of` items that answer the same queries.

    Raises FloatingPointError if a score is not finite.

    >>> Forecast(*read(torch.eye(2).__getitem__, 2, [0, 1], [0, 0], partial(probabilities, scale=1.0))[0]).hit.tolist()
    [1.0, 0.0]
    """
    (row, column), posterior = tile.targets, tile.posterior(scale)
    highest, likelihood, total, entropy = posterior
    factor = scale[tile.rows].to(highest)[row] if torch.is_tensor(scale) else scale
    below = tile.scores[row, column] - highest[row]
    hit = torch.zeros_like(total).scatter_add(0, row, (below == 0).to(total.dtype))
    hit = hit / tile.count(torch.eq, tile.scores, highest)
    positive = factor * below - total.log()[row]  # log probability
    confidence = (1 if members is None else _group_sum(likelihood, members, tile.most_probable(scale))) / total
    nll = _nll(positive, row, len(total))
    squares = tile.sum_of_products(likelihood, likelihood) / total.square()
    of_positives = torch.zeros_like(total).scatter_add(0, row, positive.exp())
    positive_squares = torch.zeros_like(total).scatter_add(0, row, positive.exp().square())
    brier = (1 - of_positives).square() + (squares - positive_squares).clamp_min(0)
    if not torch.isfinite(nll + brier).all():
        raise FloatingPointError("a score is not finite")
    return (field.cpu().double() for field in (confidence, hit, nll, brier, entropy.clamp_min(0)))


def forecast(score, gallery, query_of_positive, item_of_positive, scale=1.0, group_of_item=None):
    """Compute confidence, hit, NLL, Brier score and entropy of each query.

    score: function from a slice of queries to their scores (q, G): logits up to `scale`, or log probabilities.
    query_of_positive, item_of_positive: (P,) rows, with every query 0 .. Q-1 present; for classification, the row
    numbers and the labels. group_of_item (G,): items that answer the same queries, such as the captions of one image;
    the confidence is the probability of a whole group. By default every item is a group. Brier (1950), summed over
    classes. Raises FloatingPointError if a score is not finite.

    >>> logits = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log()
    >>> forecast(lambda rows: logits[rows], 2, [0, 1], [0, 1]).confidence.round(3).tolist()
    [0.9, 0.8]
    """
    reader = partial(probabilities, scale=scale, members=members_of(group_of_item))
    (columns,) = read(score, gallery, query_of_positive, item_of_positive, reader)
    return Forecast(*columns)


def _nll(positive, row, queries):
    """Negative log (q,) of the total probability of each query's positives, from their log probabilities (p,)."""
    # Log-sum-exp: the probability even of the largest may underflow.
    largest = positive.new_full((queries,), -torch.inf).scatter_reduce(0, row, positive, "amax")
    share = positive.new_zeros(queries).scatter_add(0, row, (positive - largest[row]).exp())
    return -(largest + share.log()).clamp_max(0)


def nll_of(score, row, column, scale):
    """Negative log (q,) of the total probability of each query's positives, under the softmax of scale * score (q, G).

    row, column: (P,) of the positives. scale: above 0.

    >>> nll_of(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([2]), scale=1.0).exp()
    tensor([4.])
    """
    top = score.amax(dim=1)
    total = (score - top[:, None]).mul_(BITS * scale).clamp_min_(LEAST).exp2_().sum(dim=1)
    return _nll(scale * (score[row, column] - top[row]) - total.log()[row], row, len(score))


@torch.inference_mode()
def _mean_nll(score, gallery, positives, scale):
    """The mean NLL of a `forecast`, without the rest of it."""
    parts = []
    for rows, scores in tiles(score, positives.queries, gallery):
        parts.append(nll_of(scores, *positives.among(rows, scores.device), scale).cpu().double())
    nll = torch.cat(parts).numpy()
    if not np.isfinite(nll).all():
        raise FloatingPointError("a score is not finite")
    return nll.mean()


def members_of(group):
    """Items (G, S) of each item's group (G,) of at most S, padded with G; None if each is a group of its own.

    >>> members_of([0, 0, 1])
    tensor([[0, 1],
            [0, 1],
            [2, 3]])
    """
    if group is None:
        return None
    _, of_group, size = np.unique(group, return_inverse=True, return_counts=True)
    order, starts = np.argsort(of_group, kind="stable"), np.cumsum(size) - size
    place = np.arange(size.max())
    rows = np.minimum(starts[:, None] + place, len(order) - 1)
    return torch.from_numpy(np.where(place < size[:, None], order[rows], len(order))[of_group])


def _group_sum(likelihood, members, top):
    """Sum (q,) of the likelihoods (q, G) of the groups of the items `top` (q,)."""
    items = members.to(top.device)[top]
    inside = items < likelihood.shape[1]
    return (likelihood.gather(1, items.where(inside, 0)) * inside).sum(dim=1)


def fit_scale(score, gallery, query_of_positive, item_of_positive):
    """Temperature scaling: the scale, 1 / temperature, with the lowest mean NLL of held-out queries, or None.

    The arguments and errors are those of `forecast`. Guo et al. (ICML 2017), arXiv 1706.04599. Each of some twenty
    steps reads all scores, but a few hundred queries suffice to fit one number. If every answer is right, a larger
    scale is always better: None is returned if the mean NLL falls below 1 / Q, which Q queries cannot resolve.

    >>> logits = torch.tensor([[2.0, 0.0]]).expand(4, 2)  # right in 3 of 4: the best probability is 0.75
    >>> round(fit_scale(lambda rows: logits[rows], 2, range(4), [0, 0, 0, 1]), 2)  # log(3) / 2
    0.55
    """
    positives = Positives(query_of_positive, item_of_positive)
    queries = positives.queries
    with torch.inference_mode():
        _, scores = next(tiles(score, queries, gallery))
        spread = scores.cpu().double().std(dim=1).mean().item()
    if not math.isfinite(spread):
        raise FloatingPointError("a score is not finite")
    if spread == 0:
        return 1.0

    def nll(log_scale):
        return _mean_nll(score, gallery, positives, math.exp(log_scale) / spread)

    # With one positive per query, NLL is convex in the scale and has one minimum.
    best = scipy.optimize.minimize_scalar(nll, bounds=(-10, 10), method="bounded", options={"xatol": 1e-3})
    return None if best.fun < 1 / queries else math.exp(best.x) / spread


def chance_of_hit(uncertainty, hit, group, seed=0):
    """Probability (Q,) that each answer is right, a falling function of its uncertainty alone.

    uncertainty, hit: (Q,). An isotonic regression (Barlow et al., 1972) of each half of the groups gives the
    probabilities of the other half, so that uncertainties on different scales compare, and none is judged on what it
    was fitted on. Each step of the regression counts two more queries, at the mean of all, so that a step of few
    queries is not sure; between the fitted values it is linear. None if there are not two groups.

    >>> chance_of_hit(np.arange(8.0), [1, 1, 1, 1, 0, 0, 0, 0], np.arange(8)).round(3).tolist()
    [0.75, 0.75, 0.75, 0.583, 0.417, 0.25, 0.25, 0.25]
    """
    if np.ptp(group) == 0:
        return None
    uncertainty, hit = (np.asarray(values, dtype=np.float64) for values in (uncertainty, hit))
    chance, first = np.empty(len(hit)), halves(group, seed)
    for half in (first, ~first):
        value, inverse, count = np.unique(uncertainty[half], return_inverse=True, return_counts=True)
        mean = np.bincount(inverse, weights=hit[half]) / count
        fitted = _falling(mean, count)
        _, step = np.unique(fitted, return_inverse=True)
        queries = np.bincount(step, weights=count)[step]
        fitted = _falling((queries * fitted + 2 * hit[half].mean()) / (queries + 2), count)
        chance[~half] = np.interp(uncertainty[~half], value, fitted)
    least = 1 / (len(hit) + 2)
    chance = chance.clip(least, 1 - least)  # where all are right, or all wrong
    return chance


def _falling(values, weights):
    """The falling sequence nearest to `values`, by weighted least squares."""
    return scipy.optimize.isotonic_regression(values, weights=weights, increasing=False).x


def scores_of_chance(chance, hit):
    """Log score and Brier score of the probability (Q,) that each answer is right; 0 is ideal for both.

    >>> scores_of_chance(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    {'log_score': 0.6931471805599453, 'brier_score': 0.25}
    """
    log_score = -(hit * np.log(chance) + (1 - hit) * np.log1p(-chance)).mean()
    return {"log_score": float(log_score), "brier_score": float(np.square(chance - hit).mean())}


def expected_error(confidence, bins=15, draws=500, seed=0):
    """ECE that these confidences (Q,) would have if they were perfectly calibrated: its mean and its 95 % quantile.

    The outcomes are redrawn from the confidences, each by itself. With few queries it is far from 0: a measured ECE
    below the quantile cannot be told from perfect calibration (Vaicenavicius et al., 2019, arXiv 1902.06977).
    Captions of one image depend on each other: with several of an image the quantile is too low, and an ECE above it
    proves nothing.

    >>> expected_error(np.array([0.5]))
    (0.5, 0.5)
    """
    confidence = np.clip(np.asarray(confidence, dtype=np.float64), 0, 1)
    order = np.argsort(bin_of(confidence, bins), kind="stable")
    confidence, number = confidence[order], bin_of(confidence, bins)[order]
    starts = np.flatnonzero(np.append(True, number[1:] != number[:-1]))
    rng, errors, step = np.random.default_rng(seed), [], max(1, 2**22 // len(confidence))
    for start in range(0, draws, step):
        outcome = rng.random((min(step, draws - start), len(confidence))) < confidence
        errors.append(np.abs(np.add.reduceat(outcome - confidence, starts, axis=1)).sum(axis=1) / len(confidence))
    errors = np.concatenate(errors)
    return float(errors.mean()), float(np.quantile(errors, 0.95))


def halves(group, seed=0):
    """Split queries into two random halves of whole groups: (Q,), True for those of half of the groups.

    group: (Q,), such as the image that each caption describes. A scale is fitted on one half and evaluated on the
    other. Raises ValueError for fewer than two groups.

    >>> halves([0, 0, 1, 1]).tolist()
    [True, True, False, False]
    """
    _, of_group = np.unique(group, return_inverse=True)
    groups = of_group.max() + 1
    if groups < 2:
        raise ValueError("a single group cannot be split")
    return (np.random.default_rng(seed).permutation(groups) < groups // 2)[of_group]


class Reliability(NamedTuple):
    """Non-empty bins of a reliability diagram, (B,) each."""

    count: np.ndarray  # queries
    confidence: np.ndarray  # mean confidence
    accuracy: np.ndarray  # mean hit


def reliability(confidence, hit, bins=15):
    """Reliability diagram with bins of equal width.

    confidence, hit: (Q,), in [0, 1]. A bin contains its lower edge. Guo et al. (2017), Figure 1. Raises ValueError for
    a confidence outside of [0, 1].

    >>> reliability([0.25, 0.75, 0.75], [0, 1, 0], bins=2).accuracy.tolist()
    [0.0, 0.5]
    """
    return _binned(bin_of(confidence, bins), np.asarray(confidence, dtype=np.float64), hit)


def adaptive_reliability(confidence, hit, bins=15):
    """Reliability diagram with bins of equal count, in expectation over random orders of equal confidences.

    confidence, hit: (Q,), in [0, 1]. Nguyen & O'Connor (EMNLP 2015), arXiv 1508.05154. Raises ValueError unless
    1 <= bins <= Q.

    >>> adaptive_reliability([0.25, 0.75, 0.75, 0.75], [0, 1, 0, 0.5], bins=2).accuracy.tolist()
    [0.25, 0.5]
    """
    if not 1 <= bins <= len(hit):
        raise ValueError(f"{len(hit)} queries cannot be split into {bins} bins")
    confidence = np.asarray(confidence, dtype=np.float64)
    bin_of_rank = np.repeat(np.arange(bins), [len(part) for part in np.array_split(confidence, bins)])
    return _binned(bin_of_rank, np.sort(confidence), tie_means(confidence, hit))


def _binned(bin_of_query, confidence, hit):
    count = np.bincount(bin_of_query)
    used = count > 0
    means = [np.bincount(bin_of_query, weights=values)[used] / count[used] for values in (confidence, hit)]
    return Reliability(count[used], *means)


def calibration_error(bins):
    """Expected calibration error (ECE) of a `Reliability`: the mean distance of confidence and accuracy over queries.

    In [0, 1], 0 is ideal. Naeini et al. (AAAI 2015) for bins of equal width; with bins of equal count it is the
    adaptive ECE.

    >>> calibration_error(reliability([0.25, 0.75], [0, 1]))
    0.25
    """
    return float(bins.count @ np.abs(bins.accuracy - bins.confidence) / bins.count.sum())
