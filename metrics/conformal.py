"""Conformal sets: the smallest sets of answers that hold the right one with a stated probability.

Q queries, G gallery items, N groups of queries that depend on each other, such as the captions of an image. An item
enters a query's set if its nonconformity is at most a threshold, which queries with known answers set; Vovk, Gammerman
& Shafer (2005). Coverage holds for a new query whatever the model is, if its group and those of the queries that set
the threshold are exchangeable, and all galleries alike.
"""

import math

import numpy as np
import scipy
import torch

from metrics.score_tiles import Columns, read, tiles

KINDS = ("score", "lac", "aps", "raps")
PENALTY, FREE_RANKS = 0.01, 5  # of raps


def nonconformity(scores, scale):
    """Nonconformity of items by falling score, {kind: (q, G)}, none of which falls, and the items (q, G) in that order.

    scores: (q, G). scale: the posterior p is the softmax of scale * scores. `score`: minus the score. `lac`: 1 - p
    (Sadinle, Lei & Wasserman, 2019). `aps`: the sum of p over the items above (Romano, Sesia & Candès, NeurIPS 2020,
    arXiv 2006.02544), without the random part, so that a query always gets the same set, with one item at least.
    `raps`: that plus PENALTY for every rank beyond FREE_RANKS (Angelopoulos et al., ICLR 2021, arXiv 2009.14193). In
    float64: sums of p are near 1 for most of a gallery.

    >>> values, item = nonconformity(torch.tensor([[0.25, 0.75]]).log(), 1.0)
    >>> values["aps"].round(decimals=6).tolist(), item.tolist()
    ([[0.0, 0.75]], [[1, 0]])
    """
    ordered, item = scores.sort(dim=1, descending=True, stable=True)
    ordered, item = ordered.cpu().double(), item.cpu()
    probability = (scale * ordered).softmax(dim=1)
    total = torch.nn.functional.pad(probability.cumsum(dim=1)[:, :-1], (1, 0))
    rank = torch.arange(1, total.shape[1] + 1)
    penalized = total + PENALTY * (rank - FREE_RANKS).clamp_min(0)
    return {"score": -ordered, "lac": 1 - probability, "aps": total, "raps": penalized}, item


def of_answers(score, gallery, query_of_positive, item_of_positive, scale=1.0):
    """Nonconformity of each query's least and most conforming answer: {kind: (Q, 2)}, least nonconformity first.

    A set holds a right answer where the first is within the threshold, and all of them where the second is. The
    arguments are those of `retrieval.rank`. Raises FloatingPointError if a score is not finite.

    >>> of_answers(lambda rows: torch.tensor([[0.5, 0.25, 0.0]])[rows], 3, [0, 0], [0, 2])["score"].tolist()
    [[-0.5, -0.0]]
    """

    def ends_of(tile):
        if not torch.isfinite(tile.scores).all():
            raise FloatingPointError("a score is not finite")
        row, column = (x.cpu() for x in tile.targets)
        values, item = nonconformity(tile.scores, scale)
        place = torch.empty_like(item).scatter_(1, item, torch.arange(gallery).expand_as(item))
        ends = []
        for kind in KINDS:
            value = values[kind][row, place[row, column]]
            for end, infinite in (("amin", torch.inf), ("amax", -torch.inf)):
                start = value.new_full((len(item),), infinite)
                ends.append(start.scatter_reduce(0, row, value, end))
        return ends

    (columns,) = read(score, gallery, query_of_positive, item_of_positive, ends_of)
    return {kind: np.stack(columns[2 * i : 2 * i + 2], axis=1) for i, kind in enumerate(KINDS)}


@torch.inference_mode()
def sizes(score, gallery, queries, thresholds, scale=1.0):
    """Sizes of the sets under T thresholds for each query, {kind: (Q, T)}; thresholds: {kind: (Q, T)}.

    score: as in `retrieval.rank`.

    >>> one = np.array([[-0.25]])
    >>> sizes(lambda rows: torch.tensor([[0.5, 0.25, 0.0]])[rows], 3, 1, {"score": one})["score"].tolist()
    [[2]]
    """
    columns = Columns(queries)
    for rows, scores in tiles(score, queries, gallery):
        values, _ = nonconformity(scores, scale)
        limits = (torch.from_numpy(np.ascontiguousarray(part[rows])) for part in thresholds.values())
        counts = (torch.searchsorted(values[kind], limit, right=True) for kind, limit in zip(thresholds, limits))
        columns.put(rows, *counts)
    return dict(zip(thresholds, columns))


def least_groups(alpha):
    """The fewest groups of queries that can set a threshold which at most a share `alpha` of queries exceeds.

    >>> least_groups(0.05), least_groups(0.1)
    (19, 9)
    """
    return math.ceil((1 - alpha) / alpha - 1e-9)


def threshold(nonconformity, group, alpha):
    """The threshold that a new query's nonconformity exceeds with a probability of at most `alpha`.

    nonconformity, group: (Q,). Every group counts once, shared evenly by its queries: the smallest value at which the
    groups' mean distribution function reaches (1 - alpha) (1 + 1 / N), for N groups (Dunn, Wasserman & Ramdas, 2023,
    arXiv 1809.07441; Lee, Barber & Willett, 2023, arXiv 2306.06342). With one query a group that is split conformal.
    Infinite if there are fewer than `least_groups`.

    >>> threshold(np.arange(1, 10), np.arange(9), alpha=0.2)
    8.0
    """
    _, of_group, size = np.unique(group, return_inverse=True, return_counts=True)
    values = np.asarray(nonconformity, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(1 / size[of_group][order])
    place = np.searchsorted(reached, (1 - alpha) * (len(size) + 1) - 1e-9)
    return float(values[order][place]) if place < len(order) else math.inf


def expected_coverage(taught_by, judged, alpha, confidence=0.95):
    """Interval of the coverage of `judged` groups under a threshold that `taught_by` groups set, if one query each.

    Beta-binomial (Vovk, 2012, arXiv 1209.2673): the threshold is itself drawn. Queries that share groups vary less.

    >>> [round(bound, 2) for bound in expected_coverage(1000, 1000, 0.1)]
    [0.87, 0.93]
    """
    rank = math.ceil((1 - alpha) * (taught_by + 1) - 1e-9)
    spread = scipy.stats.betabinom(judged, rank, taught_by + 1 - rank)
    tail = (1 - confidence) / 2
    return [float(spread.ppf(tail) / judged), float(spread.ppf(1 - tail) / judged)]
