"""How well an uncertainty orders queries: levels and their trend."""

from typing import NamedTuple

import numpy as np
from scipy import stats


def auroc(uncertainty, hit):
    """Probability that a query answered wrongly is more uncertain than one answered rightly; ties count half.

    uncertainty: (Q,). hit: (Q,), the chance of a right answer, in [0, 1]. 0.5 is a guess, 1 ideal; None where
    all queries are hits or all are misses. Area under the ROC curve, Hanley & McNeil (1982).
    """
    order = np.argsort(uncertainty, kind="stable")
    uncertainty = np.asarray(uncertainty)[order]
    hit = np.asarray(hit, dtype=np.float64)[order]
    # By groups of equal uncertainty: a miss outranks the hits below its group, and half of those in it.
    starts = np.flatnonzero(np.append(True, uncertainty[1:] != uncertainty[:-1]))
    hits, misses = np.add.reduceat(hit, starts), np.add.reduceat(1 - hit, starts)
    outranked = np.cumsum(hits) - hits / 2
    pairs = hits.sum() * misses.sum()
    return float(misses @ outranked / pairs) if pairs > 0 else None


class Trend(NamedTuple):
    """Trend of recall over uncertainty levels (ProbVLM, arXiv 2307.00398, section 4)."""

    s: float  # Spearman correlation of level and recall; -1 is ideal
    r2: float  # of the linear fit of recall on level; 1 is ideal
    minus_s_r2: float  # -s * r2; 1 is ideal


def levels(uncertainty, count):
    """Split queries into `count` levels from least to most uncertain: list of index arrays.

    Every query is used, sizes differ by at most one, and ties keep the order of the rows. Raises ValueError unless
    2 <= count <= number of queries.
    """
    if not 2 <= count <= len(uncertainty):
        raise ValueError(f"{len(uncertainty)} queries cannot be split into {count} levels")
    return np.array_split(np.argsort(uncertainty, kind="stable"), count)


def spearman(a, b):
    """Spearman's rank correlation of two arrays (Q,); 0 where one of them is constant."""
    return float(stats.spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0


def trend(recalls):
    """Trend over levels of their recalls, (L,), least uncertain first; without any variation it is 0."""
    recalls = np.asarray(recalls, dtype=np.float64)
    if np.ptp(recalls) == 0:
        return Trend(0.0, 0.0, 0.0)
    level = np.arange(len(recalls))
    s = spearman(level, recalls)
    r2 = float(np.corrcoef(level, recalls)[0, 1] ** 2)
    return Trend(s, r2, -s * r2)


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
