"""How well an uncertainty orders queries: right before wrong, levels and their trend, general before specific.

Q queries; hit (Q,) is the chance of a right answer, in [0, 1], which is 0 or 1 unless scores tie.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats


def auroc(uncertainty, hit):
    """Probability that a query answered wrongly is more uncertain than one answered rightly; ties count half.

    uncertainty: (Q,). hit: (Q,), the chance of a right answer, in [0, 1]. 0.5 is a guess, 1 ideal; None where
    all queries are hits or all are misses. Area under the ROC curve, Hanley & McNeil (1982).
    """
    _, hit, starts = _in_order(uncertainty, hit)
    found = _auroc(np.add.reduceat(hit, starts), np.add.reduceat(1 - hit, starts))
    return None if np.isnan(found) else float(found)


def _auroc(hits, misses):
    """AUROC (...,) of hits and misses (..., groups) by ascending uncertainty; NaN where either is lacking."""
    # A miss outranks the hits below its group, and half of those in it.
    outranked = np.cumsum(hits, axis=-1) - hits / 2
    pairs = hits.sum(axis=-1) * misses.sum(axis=-1)
    return np.divide((misses * outranked).sum(axis=-1), pairs, where=pairs > 0, out=np.full(np.shape(pairs), np.nan))


def aupr(uncertainty, hit):
    """Average precision of finding what is answered rightly by lowest uncertainty; None where all queries are misses.

    uncertainty, hit: (Q,). The steps of the precision-recall curve at every threshold, so that tied queries come in at
    once (Davis & Goadrich, 2006); a guess has the share of hits, 1 is ideal.
    """
    _, hit, starts = _in_order(uncertainty, hit)
    stops = np.append(starts[1:], len(hit))
    found = np.cumsum(hit)[stops - 1]
    return float(np.diff(found, prepend=0) @ (found / stops) / found[-1]) if found[-1] > 0 else None


def _in_order(uncertainty, value):
    """Sort queries by uncertainty: the order, the values in it, and where groups of equal uncertainty start."""
    order = np.argsort(uncertainty, kind="stable")
    uncertainty = np.asarray(uncertainty)[order]
    starts = np.flatnonzero(np.append(True, uncertainty[1:] != uncertainty[:-1]))
    return order, np.asarray(value, dtype=np.float64)[order], starts


def tie_means(key, value):
    """Sort `value` (Q,) by ascending `key` (Q,), and give every value as the mean of those whose keys are the same.

    That is the expectation under random order of ties, so that nothing depends on the order of the rows.
    """
    _, value, starts = _in_order(key, value)
    size = np.diff(starts, append=len(value))
    return np.repeat(np.add.reduceat(value, starts) / size, size)


def risk_coverage(uncertainty, hit):
    """Selective risk (Q,): the share of wrong answers among the 1, 2, ..., Q least uncertain queries; ties as expected.

    El-Yaniv & Wiener (2010); coverage is (1 ... Q) / Q.
    """
    return np.cumsum(1 - tie_means(uncertainty, hit)) / np.arange(1, len(hit) + 1)


class Selective(NamedTuple):
    """What is gained by leaving the most uncertain queries unanswered."""

    aurc: float  # area under the risk-coverage curve; 0 is ideal, but out of reach where answers are wrong
    e_aurc: float  # its excess over that of the best order; 0 is ideal
    recall: dict  # share of right answers by percentage of queries answered, {"80": ...}


def selective(uncertainty, hit, coverages=(80, 90, 95)):
    """Summarize the risk-coverage curve of queries (Q,): AURC, E-AURC and recall at `coverages`, in percent.

    Geifman, Uziel & El-Yaniv (ICLR 2019), arXiv 1805.08206. The best order is the oracle's itself, hits first, and not
    their approximation of its area. With `hit` the Bayes-optimal recall, E-AURC is what trusting this order costs the
    best method.
    """
    risk = risk_coverage(uncertainty, hit)
    best = risk_coverage(-np.asarray(hit, dtype=np.float64), hit)
    answered = {str(c): max(1, round(c * len(risk) / 100)) for c in coverages}
    recall = {c: float(1 - risk[count - 1]) for c, count in answered.items()}
    return Selective(float(risk.mean()), float((risk - best).mean()), recall)


def regret(hit, limit):
    """Mean recall by which answers (Q,) fall short of the Bayes-optimal recall (Q,); chance can bring it below 0."""
    return float(np.mean(np.asarray(limit) - hit))


class Trend(NamedTuple):
    """Trend of recall over uncertainty levels (ProbVLM, arXiv 2307.00398, section 4); None where recall is constant."""

    s: float | None  # Spearman correlation of level and recall; -1 is ideal
    r2: float | None  # of the linear fit of recall on level; 1 is ideal
    minus_s_r2: float | None  # -s * r2; 1 is ideal
    spread: float  # recall of the first level less that of the last, to which the others are blind


def levels(uncertainty, count, drop_remainder=False):
    """Split queries into `count` levels from least to most uncertain: list of index arrays.

    Every query is used, sizes differ by at most one, and ties keep the order of the rows. drop_remainder: give every
    level the same size instead and leave out the most uncertain, as the public AsymVLM code does. Raises ValueError
    unless 2 <= count <= number of queries.
    """
    edges = _edges(len(uncertainty), count, drop_remainder)
    return np.split(np.argsort(uncertainty, kind="stable")[: edges[-1]], edges[:-1])


def bin_of(confidence, bins=15):
    """The bin of equal width, 0 .. bins - 1, of each confidence in [0, 1]; raises ValueError for one outside."""
    confidence = np.asarray(confidence, dtype=np.float64)
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():  # rounding may give a sure one a little over 1
        raise ValueError("a confidence is outside of [0, 1]")
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="right")


def level_means(uncertainty, value, count, drop_remainder=False):
    """Mean of `value` (Q,) in each of the `levels`, (count,), tied queries standing in random order as everywhere."""
    edges = _edges(len(value), count, drop_remainder)
    return np.array([part.mean() for part in np.split(tie_means(uncertainty, value)[: edges[-1]], edges[:-1])])


def _edges(queries, count, drop_remainder):
    """Where levels end among sorted queries, (count,), or (B, count) of B numbers of queries."""
    if not 2 <= count <= np.min(queries):
        raise ValueError(f"{np.min(queries)} queries cannot be split into {count} levels")
    size, left = np.divmod(np.asarray(queries)[..., None], count)
    level = np.arange(1, count + 1)
    return size * level + (0 if drop_remainder else np.minimum(level, left))


def spearman(a, b):
    """Spearman's rank correlation of two arrays (Q,); 0 where one of them is constant."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def kendall(a, b):
    """Kendall's tau-b of two arrays (Q,); 0 where one of them is constant."""
    return float(stats.kendalltau(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def label_entropy(shares):
    """Entropy (N,) in nats of what people answered, (N, C) shares or counts: how ambiguous they find an image."""
    return stats.entropy(np.asarray(shares, dtype=np.float64), axis=1)


def trend(recalls):
    """Trend over levels of their recalls, (L,), least uncertain first."""
    if np.ptp(recalls) == 0:
        return Trend(None, None, None, 0.0)
    return Trend(*(float(value[0]) for value in _trends(np.asarray(recalls, dtype=np.float64)[None])))


def _trends(recalls):
    """Trends of many rows of recalls (B, L) at once: a Trend of arrays (B,), 0 where recall is constant."""
    recalls = np.round(recalls, 12)  # ranks must not tell apart what rounding does
    level = np.arange(recalls.shape[1])
    s, r2 = _correlation(level, stats.rankdata(recalls, axis=1)), _correlation(level, recalls) ** 2
    return Trend(s, r2, 0 - s * r2, recalls[:, 0] - recalls[:, -1])


def _correlation(a, rows):
    """Pearson's correlation of `a` (L,) with each of `rows` (B, L); 0 where one is constant."""
    a, centered = a - a.mean(), rows - rows.mean(axis=1, keepdims=True)
    size = np.sqrt((a**2).sum() * (centered**2).sum(axis=1))
    varies = (size > 0) & (np.ptp(rows, axis=1) > 0)
    return np.clip(np.divide(centered @ a, size, where=varies, out=np.zeros(len(rows))), -1, 1)


DRAWN = 2**18  # queries drawn at once: what is counted of them stays in a processor's cache


def times_drawn(count, draws, seed, step):
    """Yield how often each of `count` things is in a draw of as many with replacement, (step, count), for all draws."""
    rng = np.random.default_rng(seed)
    for start in range(0, draws, step):
        rows = np.arange(min(step, draws - start))[:, None]
        drawn = rng.integers(count, size=(len(rows), count)) + count * rows
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)


def bootstrap(uncertainty, hit, count, group=None, draws=1000, seed=0, confidence=0.95, drop_remainder=False):
    """Percentile intervals over queries drawn with replacement: dict of [low, high] (Efron, 1979).

    uncertainty, hit: (Q,). group (Q,): queries that are no independent witnesses, such as the captions of an image, are
    drawn together. Of every field of the trend over `count` levels, which every draw is split into anew, of `auroc`
    (None where that is), and of the recall of each level: `level_recall`, a list of `count` intervals.
    """
    queries = len(hit)
    _edges(queries, count, drop_remainder)  # refuses what cannot be
    order, hit, starts = _in_order(uncertainty, hit)
    of_group = slice(None) if group is None else np.unique(group, return_inverse=True)[1][order]
    groups = queries if group is None else of_group.max() + 1
    sizes = np.diff(starts, append=queries)
    found = []
    for drawn in times_drawn(groups, draws, seed, max(1, DRAWN // queries)):
        rows, times = np.arange(len(drawn))[:, None], drawn[:, of_group]
        if len(starts) < queries:
            tied_times = np.add.reduceat(times, starts, axis=1)
            tied_hits = np.add.reduceat(times * hit, starts, axis=1)
            auroc = _auroc(tied_hits, tied_times - tied_hits)
            right = np.repeat(tied_hits / np.maximum(tied_times, 1), sizes, axis=1)  # in random order of ties
            hits = times * right
        else:
            right, hits = np.broadcast_to(hit, times.shape), times * hit
            auroc = _auroc(hits, times - hits)
        # A level ends within the copies of some query: those above its end are taken off again.
        ends, total = np.cumsum(times, axis=1), np.cumsum(hits, axis=1)
        edges = _edges(ends[:, -1], count, drop_remainder)
        apart = (ends[:, -1].max() + 1) * rows  # so that one search serves all draws
        last = np.searchsorted((ends + apart).ravel(), edges + apart) - queries * rows
        above = np.take_along_axis(ends, last, axis=1) - edges
        within = np.take_along_axis(total, last, axis=1) - above * np.take_along_axis(right, last, axis=1)
        recalls = np.diff(within, axis=1, prepend=0) / np.diff(edges, axis=1, prepend=0)
        found.append(np.column_stack([*_trends(recalls), auroc, recalls]))
    found = np.concatenate(found)
    tails, names = [(1 - confidence) / 2, (1 + confidence) / 2], (*Trend._fields, "auroc")
    intervals = dict(zip(names, np.quantile(found, tails, axis=0).T.tolist()))
    # By chance a draw may lack hits or misses; AUROC is known of the others.
    known = found[:, names.index("auroc")][~np.isnan(found[:, names.index("auroc")])]
    intervals["auroc"] = np.quantile(known, tails).tolist() if len(known) else None
    return intervals | {"level_recall": np.quantile(found[:, len(names) :], tails, axis=0).T.tolist()}


def falling_chains(uncertainty, chain, depth):
    """Share of chains, and of single steps, along which uncertainty falls strictly from general to specific.

    uncertainty, chain, depth: (K,), one prompt each.
    """
    order = np.lexsort([depth, chain])
    chain, falls = np.asarray(chain)[order], np.diff(np.asarray(uncertainty)[order]) < 0
    inside = chain[1:] == chain[:-1]
    _, of_step = np.unique(chain[1:][inside], return_inverse=True)
    whole = np.bincount(of_step, weights=~falls[inside]) == 0
    return float(whole.mean()), float(falls[inside].mean())


class DepthCorrelation(NamedTuple):
    """Spearman's correlation of uncertainty and depth; the more negative, the better."""

    pooled: float  # over all prompts; that of the best order is above -1, for depths tie
    within: float  # mean over chains; -1 is ideal


def depth_correlation(uncertainty, chain, depth):
    """Correlate uncertainty with how specific prompts are. uncertainty, chain, depth: (K,), one prompt each.

    Raises ValueError for a chain of one prompt.
    """
    uncertainty, depth = np.asarray(uncertainty), np.asarray(depth)
    _, of_chain, size = np.unique(chain, return_inverse=True, return_counts=True)
    if size.min() < 2:
        raise ValueError("a chain has but one prompt")
    chains = np.split(np.argsort(of_chain, kind="stable"), np.cumsum(size)[:-1])
    within = [_correlation(stats.rankdata(depth[rows]), stats.rankdata(uncertainty[rows])[None])[0] for rows in chains]
    return DepthCorrelation(spearman(uncertainty, depth), float(np.mean(within)))
