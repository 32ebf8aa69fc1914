"""Measures of how well an uncertainty orders queries: AUROC, risk-coverage, levels and their trend, chains of prompts.

Q queries; hit (Q,) is the chance of a right answer, in [0, 1]: it is 0 or 1 unless scores tie.
"""

from typing import NamedTuple

import numpy as np
import scipy

DRAWN = 2**16  # queries drawn at once, so that their counts stay in the processor's cache


def auroc(uncertainty, hit):
    """AUROC of detecting wrong answers: the probability that a miss is more uncertain than a hit; ties count half.

    uncertainty: (Q,). hit: (Q,), the chance of a right answer, in [0, 1]. 1 is ideal, 0.5 is chance level; None if all
    queries are hits or all are misses. Area under the ROC curve, Hanley & McNeil (1982).

    >>> auroc([0.1, 0.2, 0.3, 0.4, 0.5], [1, 1, 1, 0, 1])
    0.75
    """
    _, hit, starts = _in_order(uncertainty, hit)
    [area] = _auroc(*_totals(np.ones((1, len(hit)), int), np.arange(len(hit)), _whole(hit), starts))
    return None if np.isnan(area) else float(area)


def _totals(times, columns, hit, starts):
    """Queries and hits of B draws, summed from the least uncertain query to the end of each group of ties.

    times: (B, G), how often each group of queries is drawn. columns (Q,): the groups of the queries. hit (Q,), starts
    (T,): sorted by uncertainty, as `_in_order` returns them. Returns (B, T) each.
    """
    times = np.take(times, columns, axis=1).astype(np.int64)
    queries, hits = np.cumsum(times, axis=1), np.cumsum(times * hit, axis=1)
    if len(starts) == len(hit):  # without ties
        return queries, hits
    stops = np.append(starts[1:], len(hit)) - 1
    return queries[:, stops], hits[:, stops]


def _whole(hit):
    """Hits (Q,) as integers where they are whole, as they are unless scores tie: integers sum eight times as fast."""
    whole = hit.astype(np.int64)
    return whole if (whole == hit).all() else hit


def _auroc(queries, hits):
    """AUROC (B,) from what `_totals` returns; NaN where either hits or misses sum to 0."""
    # A query outranks the hits of all lower groups, and half of those in its own: a sum of trapezoids. Hits among
    # themselves make up half of their number squared; misses are left.
    areas = np.diff(queries, axis=1), hits[:, 1:] + hits[:, :-1]
    outranked = (queries[:, 0] * hits[:, 0] + np.einsum("ij,ij->i", *areas) - hits[:, -1] ** 2) / 2
    pairs = hits[:, -1] * (queries[:, -1] - hits[:, -1])
    return np.divide(outranked, pairs, where=pairs > 0, out=np.full(len(pairs), np.nan))


def auroc_of_draws(uncertainty, hit, times, group=None):
    """AUROC (B,) of B samples of the queries; NaN for a sample that lacks hits or misses.

    uncertainty, hit: (Q,), as in `auroc`. times: (B, Q), how often each query is in each sample; with group (Q,), a
    number 0 .. G - 1 for each query, it is (B, G), how often each group is.

    >>> auroc_of_draws([0.1, 0.2, 0.3], [1, 0, 1], np.array([[1, 1, 1], [2, 1, 0]])).tolist()
    [0.5, 1.0]
    """
    order, hit, starts = _in_order(uncertainty, hit)
    columns = order if group is None else group[order]
    # Only misses are looked up among the sums of hits, where they fall: half as many sums as `_totals` takes, or fewer.
    hits, misses = np.flatnonzero(hit > 0), np.flatnonzero(hit < 1)
    tied = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(hit)))
    lower, upper = (np.searchsorted(tied[hits], tied[misses], side) for side in ("left", "right"))
    hit, aurocs = _whole(hit), np.full(len(times), np.nan)
    step = max(1, DRAWN // len(hit))
    for rows in (slice(start, start + step) for start in range(0, len(times), step)):
        drawn = times[rows].astype(hit.dtype)
        right = np.zeros((len(drawn), len(hits) + 1), hit.dtype)
        np.cumsum(np.take(drawn, columns[hits], axis=1) * hit[hits], axis=1, out=right[:, 1:])
        wrong = np.take(drawn, columns[misses], axis=1)
        wrong *= 1 - hit[misses]
        outranked = np.take(right, lower, axis=1)
        outranked += np.take(right, upper, axis=1)  # twice: ties count half
        pairs = right[:, -1] * wrong.sum(axis=1)
        np.divide(np.einsum("ij,ij->i", wrong, outranked) / 2, pairs, where=pairs > 0, out=aurocs[rows])
    return aurocs


def aupr(uncertainty, hit):
    """Average precision of detecting right answers by low uncertainty; None if all queries are misses.

    uncertainty, hit: (Q,). Sums the steps of the precision-recall curve over all thresholds, where tied queries enter
    together (Davis & Goadrich, 2006). 1 is ideal, the mean of `hit` is chance level.

    >>> aupr([0.1, 0.2, 0.3, 0.4], [1, 0, 0, 1])
    0.75
    """
    _, hit, starts = _in_order(uncertainty, hit)
    stops = np.append(starts[1:], len(hit))
    hits = np.cumsum(hit)[stops - 1]
    return float(np.diff(hits, prepend=0) @ (hits / stops) / hits[-1]) if hits[-1] > 0 else None


def _in_order(uncertainty, value):
    """Sort queries by uncertainty: the order, the sorted values, and where each group of equal uncertainty starts."""
    order = np.argsort(uncertainty, kind="stable")
    uncertainty = np.asarray(uncertainty)[order]
    starts = np.flatnonzero(np.append(True, uncertainty[1:] != uncertainty[:-1]))
    return order, np.asarray(value, dtype=np.float64)[order], starts


def tie_means(key, value):
    """Sort `value` (Q,) by ascending `key` (Q,), and replace each value by the mean over equal keys.

    This is the expectation over random orders of ties, so that no measure depends on the order of the rows.

    >>> tie_means([2, 1, 1], [5, 0, 1]).tolist()
    [0.5, 0.5, 5.0]
    """
    _, value, starts = _in_order(key, value)
    size = np.diff(starts, append=len(value))
    return np.repeat(np.add.reduceat(value, starts) / size, size)


def risk_coverage(uncertainty, hit):
    """Selective risk (Q,): the error rate of the 1, 2, ..., Q least uncertain queries, in expectation over ties.

    The coverages are (1 ... Q) / Q. El-Yaniv & Wiener (2010).

    >>> risk_coverage([0.1, 0.2, 0.3, 0.4], [1, 1, 1, 0]).tolist()
    [0.0, 0.0, 0.0, 0.25]
    """
    return np.cumsum(1 - tie_means(uncertainty, hit)) / np.arange(1, len(hit) + 1)


class Selective(NamedTuple):
    """Summary of a risk-coverage curve."""

    aurc: float  # area under the curve; 0 is ideal, and out of reach if any answer is wrong
    e_aurc: float  # excess over the area of the best order; 0 is ideal
    recall: dict  # share of right answers by percentage of queries answered, {"80": ...}
    augrc: float  # area under the generalized curve: the share of queries that are answered wrongly, over coverage
    coverage: dict  # largest share of queries answered at an error rate of so many percent, {"5": ...}


def selective(uncertainty, hit, coverages=(80, 90, 95), risks=(5,)):
    """Summarize the risk-coverage curve of queries (Q,) by areas, by recall at `coverages`, and coverage at `risks`.

    coverages, risks: in percent. AURC and E-AURC: Geifman, Uziel & El-Yaniv (ICLR 2019), arXiv 1805.08206. The area of
    the best order, hits first, is exact here, where the paper approximates it. If `hit` is the Bayes-optimal recall,
    E-AURC is what this order costs the best possible method. AUGRC: Traub et al. (NeurIPS 2024), arXiv 2407.01032; an
    AURC weighs the first mistakes far more than the last.

    >>> selective([0.1, 0.2], [0, 1], coverages=[50], risks=[50])
    Selective(aurc=0.75, e_aurc=0.5, recall={'50': 0.0}, augrc=0.5, coverage={'50': 1.0})
    """
    risk = risk_coverage(uncertainty, hit)
    best = risk_coverage(-np.asarray(hit, dtype=np.float64), hit)
    answered = {str(c): max(1, round(c * len(risk) / 100)) for c in coverages}
    recall = {c: float(1 - risk[count - 1]) for c, count in answered.items()}
    queries = np.arange(1, len(risk) + 1)
    augrc = float((risk * queries / len(risk)).mean())
    allowed = {str(r): queries[risk <= r / 100 + 1e-12] for r in risks}
    coverage = {r: float(counts.max(initial=0) / len(risk)) for r, counts in allowed.items()}
    return Selective(float(risk.mean()), float((risk - best).mean()), recall, augrc, coverage)


def false_positive_rates(uncertainty, hit, share=0.95):
    """Shares of the other kind that pass where 95 % of one kind do: (of misses, of hits); (None, None) without both.

    uncertainty, hit: (Q,). The first takes right answers as positives, as ViLU (arXiv 2507.07620) does: the share of
    misses below the uncertainty under which `share` of the hits lie. The second takes errors as positives, as Rel-U
    (arXiv 2306.01710) does: the share of hits above the one over which `share` of the misses lie. Tied queries pass
    together. 0 is ideal.

    >>> false_positive_rates([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0])
    (0.5, 0.5)
    """
    rates = []
    for key, positive in ((uncertainty, hit), (-np.asarray(uncertainty), 1 - np.asarray(hit))):
        _, positive, starts = _in_order(key, positive)
        passed = np.cumsum(np.add.reduceat(positive, starts))
        others = np.cumsum(np.add.reduceat(1 - positive, starts))
        if not (passed[-1] > 0 and others[-1] > 0):
            return None, None
        first = np.argmax(passed >= share * passed[-1] - 1e-9)
        rates.append(float(others[first] / others[-1]))
    return tuple(rates)


def regret(hit, limit):
    """Mean of the Bayes-optimal recall (Q,) minus that of the answers (Q,); 0 is ideal, and chance may give less.

    >>> regret([1, 0], limit=[1, 0.5])
    0.25
    """
    return float(np.mean(np.asarray(limit) - hit))


class Trend(NamedTuple):
    """Trend of recall over uncertainty levels (ProbVLM, arXiv 2307.00398, section 4); None if recall is constant."""

    s: float | None  # Spearman correlation of level and recall; -1 is ideal
    r2: float | None  # of the linear fit of recall on level; 1 is ideal
    minus_s_r2: float | None  # -s * r2; 1 is ideal
    spread: float  # recall of the first level minus that of the last; s and r2 ignore this size


def levels(uncertainty, count, drop_remainder=False):
    """Split queries into `count` levels from least to most uncertain: a list of index arrays.

    Every query is used, sizes differ by at most one, and ties keep the order of the rows. drop_remainder: all levels
    have the same size, and the most uncertain queries are left out, as in the public AsymVLM code. Raises ValueError
    unless 2 <= count <= number of queries.

    >>> [rows.tolist() for rows in levels([0.3, 0.1, 0.2, 0.9, 0.5], count=2)]
    [[1, 2, 0], [4, 3]]
    """
    edges = _edges(len(uncertainty), count, drop_remainder)
    return np.split(np.argsort(uncertainty, kind="stable")[: edges[-1]], edges[:-1])


def bin_of(confidence, bins=15):
    """Assign each confidence in [0, 1] to one of `bins` bins of equal width, 0 .. bins - 1.

    A bin contains its lower edge. Raises ValueError for a confidence outside of [0, 1].

    >>> bin_of([0, 0.49, 0.5, 1], bins=2).tolist()
    [0, 0, 1, 1]
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():  # rounding can lift a probability slightly above 1
        raise ValueError("a confidence is outside of [0, 1]")
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="right")


def level_means(uncertainty, value, count, drop_remainder=False):
    """Mean of `value` (Q,) in each of the `levels`, (count,), in expectation over random orders of tied queries.

    Raises ValueError as `levels` does.

    >>> level_means([0.1, 0.2, 0.3, 0.4], [1, 1, 1, 0], count=2).tolist()
    [1.0, 0.5]
    """
    edges = _edges(len(value), count, drop_remainder)
    return np.array([part.mean() for part in np.split(tie_means(uncertainty, value)[: edges[-1]], edges[:-1])])


def _edges(queries, count, drop_remainder):
    """Positions at which levels of sorted queries end, (count,), or (B, count) for B numbers of queries."""
    if not 2 <= count <= np.min(queries):
        raise ValueError(f"{np.min(queries)} queries cannot be split into {count} levels")
    size, left = np.divmod(np.asarray(queries)[..., None], count)
    level = np.arange(1, count + 1)
    return size * level + (0 if drop_remainder else np.minimum(level, left))


def spearman(a, b):
    """Spearman's rank correlation of two arrays (Q,), in [-1, 1]; 0 if one of them is constant.

    >>> round(spearman([1, 2, 3, 4], [1, 3, 2, 4]), 3)
    0.8
    """
    return float(scipy.stats.spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def kendall(a, b):
    """Kendall's tau-b of two arrays (Q,), in [-1, 1]; 0 if one of them is constant.

    >>> round(kendall([1, 2, 3, 4], [1, 3, 2, 4]), 3)
    0.667
    """
    return float(scipy.stats.kendalltau(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def label_entropy(shares):
    """Entropy (N,) in nats of human answers, (N, C) shares or counts per class: how ambiguous people find each image.

    >>> label_entropy([[10, 0], [5, 5]]).round(3).tolist()
    [0.0, 0.693]
    """
    return scipy.stats.entropy(np.asarray(shares, dtype=np.float64), axis=1)


def trend(recalls):
    """Trend of the recalls of L levels (L,), least uncertain first.

    >>> trend([0.75, 0.5, 0.25])
    Trend(s=-1.0, r2=1.0, minus_s_r2=1.0, spread=0.5)
    """
    if np.ptp(recalls) == 0:
        return Trend(None, None, None, 0.0)
    return Trend(*(float(value[0]) for value in _trends(np.asarray(recalls, dtype=np.float64)[None])))


def _trends(recalls):
    """Trend of each of B rows of recalls (B, L): a Trend of arrays (B,), 0 where recall is constant."""
    recalls = np.round(recalls, 12)  # so that recalls which differ by rounding errors tie in rank
    level = np.arange(recalls.shape[1])
    s, r2 = _correlation(level, scipy.stats.rankdata(recalls, axis=1)), _correlation(level, recalls) ** 2
    return Trend(s, r2, 0 - s * r2, recalls[:, 0] - recalls[:, -1])


def _correlation(a, rows):
    """Pearson's correlation (B,) of `a` (L,) with each of `rows` (B, L); 0 where one is constant."""
    a, centered = a - a.mean(), rows - rows.mean(axis=1, keepdims=True)
    size = np.sqrt((a**2).sum() * (centered**2).sum(axis=1))
    varies = (size > 0) & (np.ptp(rows, axis=1) > 0)
    return np.clip(np.divide(centered @ a, size, where=varies, out=np.zeros(len(rows))), -1, 1)


def times_drawn(count, draws, seed, step):
    """Yield how often each of `count` items is drawn in `count` draws with replacement: `draws` rows, `step` at a time.

    The rows depend on `count` and `seed` only, not on `step`.

    >>> [times.sum(axis=1).tolist() for times in times_drawn(4, draws=3, seed=0, step=2)]
    [[4, 4], [4]]
    """
    rng = np.random.default_rng(seed)
    for start in range(0, draws, step):
        rows = np.arange(min(step, draws - start))[:, None]
        drawn = rng.integers(count, size=(len(rows), count)) + count * rows
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)


def bootstrap(
    uncertainty, hit, count, group=None, times=None, draws=1000, seed=0, confidence=0.95, drop_remainder=False
):
    """Percentile bootstrap intervals of trend, AUROC and recall by level: a dict of [low, high] (Efron, 1979).

    uncertainty, hit: (Q,). group (Q,): queries that depend on each other, such as the captions of one image, are drawn
    together. times: (B, G), how often each draw has each group, or without groups the query of each rank, if that is
    known already; else there are `draws`, by `seed`. Every draw is split into `count` levels anew. The keys are the
    fields of `Trend`, `auroc` (None if it is undefined) and `level_recall`, a list of `count` intervals. Raises
    ValueError as `levels` does.

    >>> bootstrap([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 0, 0], count=2)["auroc"]
    [1.0, 1.0]
    """
    _edges(len(hit), count, drop_remainder)  # checks `count`
    order, hit, starts = _in_order(uncertainty, hit)
    columns = np.arange(len(hit)) if group is None else np.unique(group, return_inverse=True)[1][order]
    hit, aurocs, recalls, step = _whole(hit), [], [], max(1, DRAWN // len(hit))
    if times is None:
        parts = times_drawn(columns.max() + 1, draws, seed, step)
    else:
        parts = (times[start : start + step] for start in range(0, len(times), step))
    for drawn in parts:
        queries, hits = _totals(drawn, columns, hit, starts)
        aurocs.append(_auroc(queries, hits))
        edges = _edges(queries[:, -1].astype(int), count, drop_remainder)
        row = np.arange(len(drawn))[:, None]
        offset = (queries[:, -1].max() + 1) * row  # so that one search serves all draws
        ending = np.searchsorted((queries + offset).ravel(), edges + offset) - queries.shape[1] * row
        # A level may end within a group of ties, or within the copies of one query: they share the group's hits evenly.
        (before, stop), (hits_before, hits_stop) = (_around(total, ending) for total in (queries, hits))
        within = hits_before + (edges - before) * (hits_stop - hits_before) / (stop - before)
        recalls.append(np.diff(within, axis=1, prepend=0) / np.diff(edges, axis=1, prepend=0))
    recalls, aurocs = np.concatenate(recalls), np.concatenate(aurocs)
    aurocs = aurocs[~np.isnan(aurocs)]  # a draw may lack hits or misses by chance

    def tails(values):
        return np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).T.tolist()

    intervals = {name: tails(values) for name, values in _trends(recalls)._asdict().items()}
    return intervals | {"auroc": tails(aurocs) if len(aurocs) else None, "level_recall": tails(recalls)}


def _around(totals, place):
    """Sums (B, groups) before and after the groups `place` (B, L): (B, L) each."""
    before = np.take_along_axis(totals, np.maximum(place - 1, 0), axis=1)
    return np.where(place > 0, before, 0), np.take_along_axis(totals, place, axis=1)


def falling_chains(uncertainty, chain, depth):
    """Share of chains, and of single steps, along which uncertainty falls strictly from general to specific.

    uncertainty, chain, depth: (K,) of K prompts; depth grows from general to specific. Both shares are ideal at 1.

    >>> falling_chains([0.9, 0.5, 0.1, 0.3, 0.7, 0.6], chain=[0, 0, 0, 1, 1, 1], depth=[0, 1, 2, 0, 1, 2])
    (0.5, 0.75)
    """
    order = np.lexsort([depth, chain])
    chain, falls = np.asarray(chain)[order], np.diff(np.asarray(uncertainty)[order]) < 0
    inside = chain[1:] == chain[:-1]  # steps within a chain
    _, of_step = np.unique(chain[1:][inside], return_inverse=True)
    chain_falls = np.bincount(of_step, weights=~falls[inside]) == 0
    return float(chain_falls.mean()), float(falls[inside].mean())


class DepthCorrelation(NamedTuple):
    """Spearman's correlation of uncertainty and depth, in [-1, 1]; lower is better."""

    pooled: float  # over all prompts; even the best order stays above -1, because depths tie
    within: float  # mean over chains; -1 is ideal


def depth_correlation(uncertainty, chain, depth):
    """Correlate uncertainty with depth, which grows from general to specific prompts.

    uncertainty, chain, depth: (K,) of K prompts. Raises ValueError for a chain of one prompt.

    >>> depth_correlation([0.9, 0.5, 0.8, 0.4], chain=[0, 0, 1, 1], depth=[0, 1, 0, 1]).within
    -1.0
    """
    uncertainty, depth = np.asarray(uncertainty), np.asarray(depth)
    _, of_chain, size = np.unique(chain, return_inverse=True, return_counts=True)
    if size.min() < 2:
        raise ValueError("a chain has only one prompt")
    chains = np.split(np.argsort(of_chain, kind="stable"), np.cumsum(size)[:-1])
    rank = scipy.stats.rankdata
    within = [_correlation(rank(depth[rows]), rank(uncertainty[rows])[None])[0] for rows in chains]
    return DepthCorrelation(spearman(uncertainty, depth), float(np.mean(within)))
