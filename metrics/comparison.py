"""Which differences are real: of forecasts of the same queries, which are drawn anew, and of runs paired by seed.

Q queries, R forecasts of each, B draws, S seeds.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import sparse, stats

from metrics.uncertainty import DRAWN, bin_of, times_drawn


class Gap(NamedTuple):
    """A difference of two figures of the same queries, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def real(self):
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def resampled(nll, confidence, hit, bins=15, draws=1000, seed=0):
    """Mean NLL and ECE of R forecasts of the same queries, (R, Q) each: {"nll": (1 + B, R), "ece": (1 + B, R)}.

    The first row is of the queries as they are, the others of draws with replacement (Efron, 1979), which are the same
    for every call with as many queries, draws and the same seed. ECE is of `bins` bins of equal width, into which
    confidences fall as in `calibration.reliability`; raises ValueError for a confidence outside [0, 1].
    """
    nll, confidence, hit = (np.asarray(values, dtype=np.float64) for values in (nll, confidence, hit))
    runs, queries = nll.shape
    run, query = np.divmod(np.arange(runs * queries), queries)
    # ECE is the sum over bins of the distance of hits and confidences summed there, so that two sparse rows of sums
    # per query and forecast are all that a draw must weigh.
    row = np.concatenate([run * (1 + bins), run * (1 + bins) + 1 + bin_of(confidence, bins).ravel()])
    summed = np.concatenate([nll.ravel(), (hit - confidence).ravel()]) / queries
    terms = sparse.csr_array((summed, (row, np.tile(query, 2))), shape=(runs * (1 + bins), queries))
    step = max(1, DRAWN // queries)
    weights = itertools.chain([np.ones((1, queries))], times_drawn(queries, draws, seed, step))
    sums = np.concatenate([(terms @ part.T).T for part in weights]).reshape(-1, runs, 1 + bins)
    return {"nll": sums[..., 0], "ece": np.abs(sums[..., 1:]).sum(axis=-1)}


def gap(ours, theirs):
    """Compare one figure of two methods, (1 + B,) each as `resampled` orders them: percentiles over the draws.

    Drawing adds noise, which raises a small ECE more than a large one: its interval may lie nearer to 0 than the
    difference itself, and errs on the side of no difference.
    """
    found = np.subtract(ours, theirs)
    return Gap(float(found[0]), *np.quantile(found[1:], [0.025, 0.975]).tolist())


class Difference(NamedTuple):
    """Mean of paired differences over seeds, its 95 % interval by Student's t, and the p-value of no difference.

    Where every seed has the same difference there is no test: p is 1.
    """

    mean: float
    low: float
    high: float
    p: float


def paired(values, against):
    """Compare two figures (S,) of the same seeds; None with fewer than two seeds."""
    gap = np.subtract(values, against)
    if len(gap) < 2:
        return None
    mean, error = gap.mean(), gap.std(ddof=1) / np.sqrt(len(gap))
    if error <= 1e-9 * np.abs([values, against]).max():  # alike up to rounding, as counts may be: t knows nothing
        return Difference(mean, mean, mean, 1.0)
    low, high = stats.t.interval(0.95, len(gap) - 1, mean, error)
    return Difference(mean, low, high, stats.ttest_1samp(gap, 0).pvalue)


def holm(p):
    """Adjust p-values for their number, in their order; Holm (1979)."""
    p, order = np.asarray(p, dtype=float), np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
