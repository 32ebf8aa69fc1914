"""Figures of an active learner after each budget, and which differences between strategies are real.

T images of the target, C classes, S seeds.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from metrics import calibration, uncertainty

FIGURES = ("accuracy", "nll", "ece")
LEVELS = 10  # of entropy


class Judged(NamedTuple):
    """What is said of each image of the target, (T,) each."""

    entropy: np.ndarray  # of the predicted classes, in nats
    confidence: np.ndarray  # the largest probability
    hit: np.ndarray  # whether its class is right; where several are first, the chance
    nll: np.ndarray  # in nats


def judge(logit, label):
    """Judge logits (T, C) by labels (T,)."""
    label = np.asarray(label)
    found = calibration.forecast(lambda rows: logit[rows], logit.shape[1], np.arange(len(label)), label)
    log_probability = logit.detach().cpu().double().log_softmax(dim=1)
    entropy = -(log_probability.exp() * log_probability).sum(dim=1)
    return Judged(entropy.clamp_min(0).numpy(), found.confidence, found.hit, found.nll)


def figures(judged):
    """Accuracy, NLL, ECE of 15 bins; the error in levels of entropy of equal count, and how entropy tells errors."""
    count = min(LEVELS, len(judged.hit))
    groups = uncertainty.levels(judged.entropy, count) if count > 1 else [np.arange(count)]
    return {
        "accuracy": float(judged.hit.mean()),
        "nll": float(judged.nll.mean()),
        "ece": calibration.calibration_error(calibration.reliability(judged.confidence, judged.hit)),
        "by_entropy": {
            "count": [len(rows) for rows in groups],
            "entropy": [float(judged.entropy[rows].mean()) for rows in groups],
            "error": [float(1 - judged.hit[rows].mean()) for rows in groups],
        },
        "entropy_auroc": uncertainty.auroc(judged.entropy, judged.hit),
    }


class Difference(NamedTuple):
    """Mean of paired differences over seeds, its 95 % interval by Student's t, and the p-value of no difference."""

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
    if error == 0:  # all alike, of which t knows nothing
        return Difference(mean, mean, mean, float(mean == 0))
    low, high = stats.t.interval(0.95, len(gap) - 1, mean, error)
    return Difference(mean, low, high, stats.ttest_1samp(gap, 0).pvalue)


def holm(p):
    """Adjust p-values for their number, in their order; Holm (1979)."""
    p, order = np.asarray(p, dtype=float), np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted
