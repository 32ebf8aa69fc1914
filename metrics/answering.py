"""Whether a gallery answers a query at all: uncertainties with the right items and without, and probabilities by them.

Q queries, G gallery items. Larger = less certain that there is an answer.
"""

from typing import NamedTuple

import numpy as np
import torch

from metrics.score_tiles import Columns, read, tiles, two_highest

NAMES = ("top", "margin", "energy", "entropy", "probability")


def uncertainties(scores, scale):
    """Uncertainties of queries by their scores (q, G), {name: (q,)}, and their best item (q,); -inf is no item.

    `top`: minus the best score. `margin`: minus its lead over the second. `energy`: minus the log-sum-exp of
    scale * score over the gallery, by scale (Liu et al., NeurIPS 2020, arXiv 2010.03759). `entropy` and `probability`:
    of the posterior, the softmax of scale * score, as in `retrieval.rank`; the latter is minus its logarithm.

    >>> values, best = uncertainties(torch.tensor([[0.5, 0.25, -torch.inf]]), scale=1.0)
    >>> values["top"].tolist(), values["margin"].tolist(), best.tolist()
    ([-0.5], [-0.25], [0])
    """
    value, item = two_highest(scores)
    logit = scale * scores
    total = logit.logsumexp(dim=1)
    log_probability = logit - total[:, None]
    entropy = -torch.where(log_probability > -80, log_probability.exp() * log_probability, 0).sum(dim=1)
    top, second = value.T
    values = {"top": -top, "margin": second - top, "energy": -total / scale, "entropy": entropy}
    return values | {"probability": total - scale * top}, item[:, 0]


def with_and_without(score, gallery, query_of_positive, item_of_positive, scale=1.0):
    """Uncertainties of each query in the whole gallery and in the one without its items: {name: (Q, 2)}.

    Besides those of `uncertainties`: `best` (Q, 2), the best item; `hit` (Q,), whether the first is right; `left` (Q,),
    how many items remain, of which fewer than two give no uncertainty: NaN. The arguments are those of
    `retrieval.rank`. Raises FloatingPointError if a score is not finite.

    >>> scores = torch.tensor([[0.5, 0.25, 0.0]])
    >>> with_and_without(lambda rows: scores[rows], 3, [0], [0])["top"].tolist()
    [[-0.5, -0.25]]
    """

    def ask_twice(tile):
        scores = tile.scores
        if not torch.isfinite(scores).all():
            raise FloatingPointError("a score is not finite")
        whole, best = uncertainties(scores, scale)
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[tile.targets] = True
        hit = right.gather(1, best[:, None])[:, 0]
        left = gallery - right.sum(dim=1)
        without, other = uncertainties(scores.masked_fill(right, -torch.inf), scale)
        pairs = [torch.stack([whole[name], without[name].where(left > 1, torch.nan)], dim=1) for name in NAMES]
        return *pairs, torch.stack([best, other], dim=1), hit.float(), left

    (columns,) = read(score, gallery, query_of_positive, item_of_positive, ask_twice)
    return dict(zip((*NAMES, "best", "hit", "left"), columns))


@torch.inference_mode()
def of_queries(score, gallery, queries, scale=1.0):
    """`uncertainties` of Q queries, {name: (Q,)}, and their best items (Q,), in tiles; score: as in `retrieval.rank`.

    >>> of_queries(lambda rows: torch.tensor([[0.5, 0.25]])[rows], 2, 1)[0]["margin"].tolist()
    [-0.25]
    """
    columns = Columns(queries)
    for rows, scores in tiles(score, queries, gallery):
        values, best = uncertainties(scores, scale)
        columns.put(rows, *(values[name] for name in NAMES), best)
    return dict(zip(NAMES, columns)), columns[-1]


class Logistic(NamedTuple):
    """A probability by F features: the logistic function of their weighted sum."""

    weight: np.ndarray  # (F,)
    intercept: float

    def __call__(self, features):
        logit = np.asarray(features) @ np.asarray(self.weight) + self.intercept
        return 1 / (1 + np.exp(-np.clip(logit, -700, 700)))


def fit(features, target):
    """Fit a Logistic to features (Q, F) and targets (Q,) in [0, 1], with a weak L2 penalty on standardized features.

    >>> model = fit(np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0.0, 1.0, 0.0, 1.0]))
    >>> model(np.array([[3.0]])) > model(np.array([[0.0]]))
    array([ True])
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes a second to import

    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1)
    if np.ptp(target) == 0:  # all right, or all wrong: by the rule of succession
        share = (target.sum() + 1) / (len(target) + 2)
        return Logistic(np.zeros(features.shape[1]), float(np.log(share / (1 - share))))
    model = LogisticRegression(max_iter=1000).fit((features - mean) / spread, target > 0.5)
    weight = model.coef_[0] / spread
    return Logistic(weight, float(model.intercept_[0] - mean @ weight))
