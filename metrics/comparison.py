"""Differences between methods: paired bootstrap over the queries, paired t-test over the seeds, Holm's adjustment.

Q queries, R forecasts of each, B bootstrap draws, S seeds.
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
import scipy
from scipy import sparse

from metrics.uncertainty import DRAWN, auroc_of_draws, bin_of, times_drawn


class Difference(NamedTuple):
    """Difference of one statistic of two methods on the same data, its interval, and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def real(self):
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def resampled(nll, confidence, hit, bins=15, draws=1000, seed=0):
    """Mean NLL and ECE of R forecasts on bootstrap draws of their queries: {"nll": (1 + B, R), "ece": (1 + B, R)}.

    nll, confidence, hit: (R, Q). The first row is of the queries themselves, the others of draws with replacement
    (Efron, 1979), which depend on Q, `draws` and `seed` only, so that calls can be compared. ECE has `bins` bins of
    equal width, as in `calibration.reliability`. Resampling adds noise, which raises a small ECE more than a large
    one: the interval of a difference in ECE may lie nearer to 0 than the difference, and errs on the side of no
    difference. Raises ValueError for a confidence outside of [0, 1].

    >>> result = resampled(nll=[[0.0, 1.0]], confidence=[[0.75, 0.75]], hit=[[1, 0]], draws=10)
    >>> result["nll"][0].tolist(), result["ece"][0].tolist()
    ([0.5], [0.25])
    """
    nll, confidence, hit = (np.asarray(values, dtype=np.float64) for values in (nll, confidence, hit))
    runs, queries = nll.shape
    run, query = np.divmod(np.arange(runs * queries), queries)
    # ECE sums over bins the distance of the summed hits and confidences. So every query contributes two numbers per
    # forecast, one to the mean NLL and one to its bin, and a draw is a weighted sum over a sparse matrix.
    row = np.concatenate([run * (1 + bins), run * (1 + bins) + 1 + bin_of(confidence, bins).ravel()])
    terms = np.concatenate([nll.ravel(), (hit - confidence).ravel()]) / queries
    terms = sparse.csr_array((terms, (row, np.tile(query, 2))), shape=(runs * (1 + bins), queries))
    step = max(1, DRAWN // queries)
    weights = itertools.chain([np.ones((1, queries))], times_drawn(queries, draws, seed, step))
    sums = np.concatenate([(terms @ part.T).T for part in weights]).reshape(-1, runs, 1 + bins)
    return {"nll": sums[..., 0], "ece": np.abs(sums[..., 1:]).sum(axis=-1)}


class PairedBootstrap:
    """Bootstrap draws of Q queries (Efron, 1979), shared by all methods that are compared on these queries.

    group: (Q,). Queries of one group, such as the captions of one image, are drawn together; np.arange(Q) draws every
    query on its own. Statistics are arrays (1 + B,): of the queries themselves, then of each draw. With a leading axis
    of seeds, (S, Q), a statistic is averaged over the seeds draw by draw. Attributes: `group` (Q,), the numbers of the
    groups, 0 .. G - 1, and `times` (1 + B, G), how often each is in the data and in each draw.

    >>> bootstrap = PairedBootstrap(group=[0, 0, 1, 1], draws=10)
    >>> bootstrap.mean([1, 1, 1, 0]).shape
    (11,)
    """

    def __init__(self, group, draws=1000, seed=0):
        _, self.group = np.unique(group, return_inverse=True)
        self._groups = self.group.max() + 1
        parts = times_drawn(self._groups, draws, seed, max(1, DRAWN // self._groups))
        # A byte each: no group of hundreds of thousands is drawn 256 times.
        self.times = np.concatenate([np.ones((1, self._groups), np.uint8), *(part.astype(np.uint8) for part in parts)])
        self._queries = self._sum(np.bincount(self.group))
        self._aurocs = {}  # of seeds seen: methods that change no answer, and seeds of untrained ones, repeat them

    def _sum(self, by_group):
        """Sums (1 + B, ...) over the draws of values by group (G, ...), some rows at a time."""
        step = max(1, DRAWN // self._groups)
        rows = range(0, len(self.times), step)
        return np.concatenate([self.times[start : start + step].astype(np.float64) @ by_group for start in rows])

    def mean(self, value):
        """Mean (1 + B,) of a value per query, (Q,) or (S, Q), such as the hit of R@1.

        >>> PairedBootstrap(group=np.arange(4), draws=1).mean([1, 1, 1, 0]).tolist()
        [0.75, 0.75]
        """
        by_group = np.bincount(self.group, weights=np.atleast_2d(value).mean(axis=0))
        return self._sum(by_group) / self._queries

    def sums(self, value, query, column, columns):
        """Sums (1 + B, C) of K values, each of a query and in one of C columns: (K,) each.

        >>> PairedBootstrap(group=[0, 1], draws=1).sums([1.0, 2.0, 4.0], [0, 0, 1], [0, 1, 1], columns=2)[0].tolist()
        [1.0, 6.0]
        """
        place = self.group[query] * columns + column
        by_group = np.bincount(place, weights=value, minlength=self._groups * columns)
        return self._sum(by_group.reshape(self._groups, columns))

    def calibration_error(self, confidence, hit, bins=15):
        """ECE (1 + B,) in bins of equal width, as `calibration.reliability` has them; confidence, hit: (Q,).

        Resampling adds noise, so that the draws lie above the ECE itself where that is small.

        >>> PairedBootstrap(group=[0, 1], draws=1).calibration_error([0.75, 0.75], [1, 1]).tolist()
        [0.25, 0.25]
        """
        sums = self.sums(np.subtract(hit, confidence), np.arange(len(self.group)), bin_of(confidence, bins), bins)
        return np.abs(sums).sum(axis=1) / self._queries

    def auroc(self, uncertainty, hit):
        """AUROC (1 + B,) of detecting wrong answers by uncertainty; NaN for a draw that lacks hits or misses.

        uncertainty, hit: (Q,) or (S, Q), as in `uncertainty.auroc`.

        >>> PairedBootstrap(group=np.arange(4), draws=1).auroc([0.1, 0.2, 0.3, 0.4], [1, 1, 0, 0]).tolist()
        [1.0, 1.0]
        """
        aurocs = []
        for seed in zip(np.atleast_2d(uncertainty), np.atleast_2d(hit), strict=True):
            key = tuple(hashlib.sha256(np.ascontiguousarray(values)).digest() for values in seed)
            if key not in self._aurocs:
                self._aurocs[key] = auroc_of_draws(*seed, self.times, self.group)
            aurocs.append(self._aurocs[key])
        return np.mean(aurocs, axis=0)


def interval(statistic, confidence=0.95, basic=False):
    """Interval [low, high] of a statistic (1 + B,) of a `PairedBootstrap`: of percentiles, or the basic one.

    basic: the percentiles reflected at the statistic, from 0 at least to the statistic at least (Davison & Hinkley,
    1997, 5.2), for one that resampling lifts as it lifts an ECE: there percentiles may lie above the truth altogether.

    >>> interval([0.5, 0.25, 0.625], confidence=1.0), interval([0.5, 0.25, 0.625], confidence=1.0, basic=True)
    ([0.25, 0.625], [0.375, 0.75])
    """
    low, high = np.quantile(statistic[1:], [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    if not basic:
        return [low, high]
    value = float(statistic[0])
    return [max(0.0, 2 * value - high), max(value, 2 * value - low)]  # draws may all lie above twice a tiny error


def paired_difference(ours, theirs, confidence=0.95):
    """Difference of one statistic of two methods, (1 + B,) each of the same draws; None if undefined.

    ours, theirs: of one `PairedBootstrap`, or columns of `resampled`. The interval is that of percentiles. The
    two-sided p-value is twice the share of draws on the rarer side of 0, one added to both counts (Davison & Hinkley,
    1997): it is at least 2 / (B + 1), which limits how many of them `holm` can adjust. Draws in which a statistic is
    NaN are left out.

    >>> bootstrap = PairedBootstrap(group=np.arange(100), draws=999)
    >>> paired_difference(bootstrap.mean(np.ones(100)), bootstrap.mean(np.zeros(100)))
    Difference(mean=1.0, low=1.0, high=1.0, p=0.002)
    """
    difference = np.round(np.subtract(ours, theirs), 12)  # so that a rounding error has no sign
    mean, drawn = float(difference[0]), difference[1:]
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(mean) or not len(drawn):
        return None
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    rarer = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    return Difference(mean, low, high, min(1.0, 2 * (rarer + 1) / (len(drawn) + 1)))


def paired(values, against, image_error=0.0):
    """Compare two statistics (S,) of the same seeds by a paired t-test: a `Difference`, None for fewer than two seeds.

    image_error: standard error of the mean difference by the choice of the images, which all seeds share; it adds to
    that of the seeds. The interval is the 95 % one of Student's t with S - 1 degrees of freedom, too wide where the
    images prevail. If all seeds have the same difference and no image error is given there is no test: p is 1.

    >>> float(round(paired([0.9, 0.8, 0.85], against=[0.5, 0.5, 0.5]).p, 3))
    0.007
    """
    difference = np.subtract(values, against)
    if len(difference) < 2:
        return None
    mean = difference.mean()
    error = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), image_error)
    if error <= 1e-9 * np.abs([values, against]).max():  # equal up to rounding, as counts may be: t is undefined
        return Difference(mean, mean, mean, 1.0)
    low, high = scipy.stats.t.interval(0.95, len(difference) - 1, mean, error)
    return Difference(mean, low, high, 2 * scipy.stats.t.sf(abs(mean) / error, len(difference) - 1))


def holm(p):
    """Adjust p-values (N,) for their number, in their order; Holm (1979).

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p, order = np.asarray(p, dtype=float), np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
