"""Whether a pair matches: the probability by its score, calibrated on held-out pairs, and thresholds for a precision.

Q queries, G gallery items, K scored pairs of both. A pair that matches is rare among all pairs, so every figure is at a
prior: the share of matches among the pairs that will be judged.
"""

from typing import NamedTuple

import numpy as np
import torch

from metrics.comparison import interval
from metrics.score_tiles import Positives, tiles
from metrics.uncertainty import bin_of

HARDEST, OTHERS = 64, 64  # wrong items of each query: those that score best, and a sample of all others
MATCHES = 64  # most items of each query that match: of more, a sample
BINS = 15  # of equal width, for ECE and reliability
STEPS = 250  # of scores, in which AUROC and AUPR of bootstrap draws are computed


class Scored(NamedTuple):
    """Scored pairs, (K,) each."""

    score: np.ndarray
    match: np.ndarray  # 1.0 for a pair that matches, else 0.0
    weight: np.ndarray  # how many pairs it stands for
    query: np.ndarray  # row of its query

    def rows(self, index):
        """Select pairs.

        >>> Scored(*np.eye(4)).rows(np.array([True, False, False, False])).score.tolist()
        [1.0]
        """
        return Scored(*(field[index] for field in self))

    @property
    def base_rate(self):
        """Share of matches among all pairs."""
        return float(self.match @ self.weight / self.weight.sum())

    def at(self, prior):
        """Weights (K,) that sum to 1 and give the matches a share of `prior`."""
        right, wrong = (self.weight * (self.match == match) for match in (1, 0))
        return prior * right / right.sum() + (1 - prior) * wrong / wrong.sum()


@torch.inference_mode()
def scored_pairs(
    score, gallery, query_of_positive, item_of_positive, scale=1.0, seed=0, hardest=HARDEST, others=OTHERS
):
    """Score pairs in tiles: those that match, the `hardest` wrong items of each query, and a sample of the others.

    Returns them, and (Q,) the log of the sum of exp(scale * score) over each query's gallery, see `log_odds`. The
    arguments are those of `retrieval.rank`. Thresholds for a high precision lie where only the hardest wrong items
    are, so these are complete; the sampled ones are weighted by how many they stand for, as are matches of a query that
    has more than MATCHES. A gallery of at most hardest + others items is scored whole. Raises FloatingPointError if a
    score is not finite.

    >>> pairs, _ = scored_pairs(lambda rows: torch.eye(3)[rows], 3, range(3), range(3))
    >>> float(pairs.match.sum()), float(pairs.weight.sum())
    (3.0, 9.0)
    """
    positives, rng = Positives(query_of_positive, item_of_positive), np.random.default_rng(seed)
    whole, parts, totals = gallery <= hardest + others, [], []
    for rows, scores in tiles(score, positives.queries, gallery):
        row, column = (index.cpu().numpy() for index in positives.among(rows, "cpu"))
        scores = scores.float().cpu()
        if not torch.isfinite(scores).all():
            raise FloatingPointError("a score is not finite")
        count = len(scores)
        totals.append((scale * scores).logsumexp(dim=1).double().numpy())
        wrong = scores.clone()
        wrong[row, column] = -torch.inf
        matches = np.bincount(row, minlength=count)
        values = scores[row, column].numpy()
        chosen, stands_for = _some_of_each(row, values, rng)
        parts.append((values[chosen], np.ones(len(chosen)), stands_for, row[chosen] + rows.start))
        value = (wrong if whole else wrong.topk(hardest, dim=1).values).numpy()
        of_query = np.repeat(np.arange(count), value.shape[1]).reshape(value.shape)
        real = np.isfinite(value)
        parts.append((value[real], np.zeros(real.sum()), np.ones(real.sum()), of_query[real] + rows.start))
        if whole:
            continue
        # Of the rest each item is as likely as any other; draws that hit a match or one of the hardest are dropped.
        item = torch.from_numpy(rng.integers(gallery, size=(count, others)))
        value = wrong.gather(1, item).numpy()
        real = np.isfinite(value) & (value < wrong.topk(hardest, dim=1).values[:, -1:].numpy())
        left = gallery - hardest - matches
        weight = np.maximum(left, 0) / np.maximum(real.sum(axis=1), 1)
        of_query = np.repeat(np.arange(count), others).reshape(value.shape)[real]
        parts.append((value[real], np.zeros(real.sum()), weight[of_query], of_query + rows.start))
    columns = zip(zip(*parts), (float, float, float, int))
    return Scored(*(np.concatenate(column).astype(kind) for column, kind in columns)), np.concatenate(totals)


def _some_of_each(row, score, rng):
    """Positions of at most MATCHES matches of each query, and how many each stands for: the best, and others at random.

    row (P,): ascending rows of the queries.
    """
    best = np.lexsort([-score, row])[np.searchsorted(row, np.unique(row))]
    key = rng.random(len(row))
    key[best] = -1
    order, first = np.lexsort([key, row]), np.searchsorted(row, row)
    place = np.empty(len(row), int)
    place[order] = np.arange(len(row)) - first[order]
    matches = np.bincount(row)[row]
    others = (matches - 1) / np.maximum(np.minimum(matches, MATCHES) - 1, 1)
    chosen = np.flatnonzero(place < MATCHES)
    return chosen, np.where(place == 0, 1.0, others)[chosen]


def log_odds(score, total, scale):
    """Log odds of each pair under the posterior over its query's gallery, the softmax of scale * score.

    score: (K,). total: (K,) the log of the sum of exp(scale * score) over the gallery. Unlike a score alone, it knows
    the rivals of the answer.

    >>> log_odds(np.array([0.0]), np.log([4.0]), scale=1.0).round(3).tolist()
    [-1.099]
    """
    log_probability = np.minimum(scale * score - total, -1e-7)  # the rounding of float32 scores
    return log_probability - np.log(-np.expm1(log_probability))


class Platt(NamedTuple):
    """P(match) is the logistic function of slope * score + intercept; Platt (1999)."""

    slope: float
    intercept: float

    def __call__(self, score):
        return 1 / (1 + np.exp(-np.clip(self.slope * np.asarray(score) + self.intercept, -700, 700)))


class Isotonic(NamedTuple):
    """P(match) rises with the score, linearly between knots (K,); Zadrozny & Elkan (KDD 2002)."""

    score: np.ndarray
    probability: np.ndarray

    def __call__(self, score):
        return np.interp(score, self.score, self.probability)


def fit_platt(scored, prior):
    """Fit a Platt to Scored pairs at a prior.

    >>> pairs = Scored(np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4), np.zeros(4, int))
    >>> round(float(fit_platt(pairs, prior=0.75)(0.0)), 3)
    0.477
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes a second to import

    mean, spread = scored.score.mean(), scored.score.std() or 1.0
    # Few matches have little weight, so the usual tolerance would stop before they count. Two more pairs, a match and
    # a wrong one, at the mean score: without them a separable sample has no maximum (Platt's targets do the same).
    feature = np.append((scored.score - mean) / spread, [0.0, 0.0])[:, None]
    matches, weight = scored.match.sum(), scored.at(prior)
    extra = np.array([prior, 1 - prior]) / (matches + 2)
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9 * prior, max_iter=200)
    model.fit(feature, np.append(scored.match, [1, 0]), np.append(weight, extra))
    slope = model.coef_[0, 0] / spread
    return Platt(float(slope), float(model.intercept_[0] - slope * mean))


def fit_isotonic(scored, prior):
    """Fit an Isotonic to Scored pairs at a prior; no probability is closer to 0 or 1 than the pairs can tell.

    >>> pairs = Scored(np.array([0.0, 0.0, 1.0, 1.0]), np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4), np.zeros(4, int))
    >>> float(fit_isotonic(pairs, prior=0.75)(0.0))
    0.5
    """
    from sklearn.isotonic import IsotonicRegression  # only here: it takes a second to import

    model = IsotonicRegression(out_of_bounds="clip").fit(scored.score, scored.match, scored.at(prior))
    matches = scored.match.sum()
    bounds = prior / (matches + 2), 1 - 1 / (matches + 2)
    return Isotonic(model.X_thresholds_.astype(float), model.y_thresholds_.astype(float).clip(*bounds))


def shifted(probability, prior, other):
    """Probabilities (K,) stated at one prior, at another: the odds of a match grow with its prior odds.

    >>> shifted(np.array([0.5]), 0.5, 0.2).round(3).tolist()
    [0.2]
    """
    probability = np.asarray(probability, dtype=np.float64)
    match, wrong = probability * other / prior, (1 - probability) * (1 - other) / (1 - prior)
    return match / (match + wrong)


def area_under_roc(scored, weight):
    """AUROC of telling matches from wrong pairs by the score; ties count half. weight: (K,).

    >>> area_under_roc(Scored(np.array([2.0, 1.0]), np.array([1.0, 0.0]), np.ones(2), np.zeros(2, int)), np.ones(2))
    1.0
    """
    return float(_areas(*(sums[None] for sums in _steps(scored, weight)))[0][0])


def area_under_precision(scored, weight):
    """Average precision of matches by falling score, tied pairs together. weight: (K,), which sets the prior.

    >>> pairs = Scored(np.array([2.0, 1.0]), np.array([0.0, 1.0]), np.ones(2), np.zeros(2, int))
    >>> area_under_precision(pairs, np.ones(2))
    0.5
    """
    return float(_areas(*(sums[None] for sums in _steps(scored, weight)))[1][0])


def _steps(scored, weight):
    """Weights of matches and of wrong pairs at each distinct score, (S,) each, from the highest score down."""
    _, step = np.unique(-scored.score, return_inverse=True)
    return [np.bincount(step, weights=weight * (scored.match == match)) for match in (1, 0)]


def _areas(match, wrong):
    """AUROC (B,) and average precision (B,) of B draws, from weights (B, S) by falling score."""
    matches, wrongs = match.cumsum(axis=1), wrong.cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        below = (wrong * (matches - match / 2)).sum(axis=1)
        roc = below / (matches[:, -1] * wrongs[:, -1])
        precision = np.nan_to_num(matches / (matches + wrongs))
        return roc, (match * precision).sum(axis=1) / matches[:, -1]


def figures(scored, probability, prior, drawn):
    """ECE, NLL, Brier score, AUROC, AUPR and the reliability of the probabilities (K,) of pairs, at a prior.

    drawn: a PairedBootstrap of the queries, for 95 % intervals; AUROC and AUPR have theirs on STEPS steps of scores.

    >>> from metrics.comparison import PairedBootstrap
    >>> pairs = Scored(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.ones(2), np.array([0, 1]))
    >>> figures(pairs, np.array([0.25, 0.75]), 0.5, PairedBootstrap([0, 1], draws=2))["ece"]
    0.25
    """
    weight, column = scored.at(prior), bin_of(probability, BINS)
    error = drawn.sums(weight * (scored.match - probability), scored.query, column, BINS)
    surprise = -np.log(np.where(scored.match > 0, probability, 1 - probability).clip(1e-300))
    kinds = np.stack([weight * surprise, weight * np.square(scored.match - probability), weight])
    pairs = np.arange(len(weight))
    nll, brier, total = drawn.sums(kinds.ravel(), np.tile(scored.query, 3), np.repeat(range(3), len(pairs)), 3).T
    edges = np.unique(np.quantile(scored.score, np.linspace(0, 1, STEPS + 1))[1:-1])
    step, steps = len(edges) - np.searchsorted(edges, scored.score, side="right"), len(edges) + 1
    sums = [drawn.sums(weight * (scored.match == match), scored.query, step, steps) for match in (1, 0)]
    roc, precision = _areas(*sums)
    statistics = {"ece": np.abs(error).sum(axis=1) / total, "nll": nll / total, "brier": brier / total}
    values = {name: float(statistic[0]) for name, statistic in statistics.items()}
    values |= {"auroc": area_under_roc(scored, weight), "aupr": area_under_precision(scored, weight)}
    intervals = {name: interval(statistic, basic=name == "ece") for name, statistic in statistics.items()}
    intervals |= {"auroc": interval(roc), "aupr": interval(precision)}
    used = np.bincount(column, weights=weight, minlength=BINS)
    bins = np.flatnonzero(used)
    means = [np.bincount(column, weights=weight * each, minlength=BINS)[bins] / used[bins]
             for each in (probability, scored.match)]  # fmt: skip
    reliability = {"count": used[bins], "confidence": means[0], "accuracy": means[1]}
    return values | {"interval": intervals, "reliability": {name: part.tolist() for name, part in reliability.items()}}


def threshold_for(scored, weight, precision):
    """The lowest score from which on this share of the pairs match, or None where no score has it. weight: (K,).

    >>> pairs = Scored(np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0]), np.ones(3), np.zeros(3, int))
    >>> threshold_for(pairs, np.ones(3), 0.6), threshold_for(pairs, np.ones(3), 0.9)
    (1.0, 3.0)
    """
    match, wrong = (part.cumsum() for part in _steps(scored, weight))
    reached = np.flatnonzero(match >= precision * (match + wrong) * (1 - 1e-12))
    return float(np.unique(scored.score)[::-1][reached[-1]]) if len(reached) else None


def beyond(scored, prior, threshold, drawn):
    """What the pairs with a score of at least `threshold` are: precision, recall, and the share of queries with one.

    threshold: a number, or (K,), one for each pair. drawn: a PairedBootstrap of all queries. Each figure has its 95 %
    interval; a draw without such a pair has no precision.

    >>> from metrics.comparison import PairedBootstrap
    >>> pairs = Scored(np.array([3.0, 2.0]), np.array([1.0, 0.0]), np.ones(2), np.array([0, 1]))
    >>> beyond(pairs, 0.5, 2.5, PairedBootstrap([0, 1], draws=2))["recall"]
    1.0
    """
    accepted, weight = scored.score >= threshold, scored.at(prior)
    first = np.unique(scored.query[accepted], return_index=True)[1]  # one accepted pair of each query that has any
    has_one = np.zeros(len(weight))
    has_one[np.flatnonzero(accepted)[first]] = 1
    queries = np.zeros(len(weight))
    queries[np.unique(scored.query, return_index=True)[1]] = 1
    kinds = np.stack([weight * accepted * scored.match, weight * accepted, weight * scored.match, has_one, queries])
    column = np.repeat(range(5), len(weight))
    right, all_accepted, matches, answered, asked = drawn.sums(kinds.ravel(), np.tile(scored.query, 5), column, 5).T
    with np.errstate(invalid="ignore", divide="ignore"):
        statistics = {"precision": right / all_accepted, "recall": right / matches, "answered": answered / asked}
    values = {}
    for name, statistic in statistics.items():
        real = statistic[1:][np.isfinite(statistic[1:])]
        known = np.isfinite(statistic[0]) and len(real)
        values[name] = float(statistic[0]) if known else None
        values[f"{name}_interval"] = interval(np.append(statistic[0], real)) if known else None
    return values
