"""Acquisition functions: entropy, BALD, EPIG, density, k-center, neighbors, and the posterior's update by a new label.

N items of the pool, T of the target, C classes, K draws of the posterior, D coordinates of an embedding. Entropies and
information are in nats. Gaussian embeddings are a pair: means (N, D), not normalized, and variances (N, D), 0 where an
embedding is certain, of its coordinates or along a basis that all covariances share (`spread` in models/laplace.py).
"""

import math

import torch
from torch import Tensor

from models.density import kernel
from models.distributions.sphere import at_least_float32
from models.prob_cosine import Gaussians, cosine_mean
from utils.errors import one_of

Diagonal = tuple[Tensor, Tensor]  # means and variances


def entropy(probability: Tensor) -> Tensor:
    """Entropy (...,) in nats of probabilities (..., C); entries may be 0."""
    return torch.special.entr(at_least_float32(probability)).sum(dim=-1)


def bald(samples: Tensor) -> Tensor:
    """Mutual information (N,) in nats of an item's label and the weights, from drawn probabilities (K, N, C).

    The entropy of the mean less the mean of the entropies; Houlsby et al. (2011). Items need not share draws.
    """
    samples = at_least_float32(samples)
    return (entropy(samples.mean(dim=0)) - entropy(samples).mean(dim=0)).clamp_min(0)  # rounding alone goes below 0


def epig(pool: Tensor, target: Tensor, corrected: bool = True, block: int = 2**20) -> Tensor:
    """Mutual information (N,) in nats of an item's label and a random target's; Bickford Smith et al. (AISTATS 2023).

    pool: drawn probabilities (K, N, C). target: (K, T, C'), whose draw k is under the same weights as the pool's.
    corrected: subtract the bias of a finite K, so an uninformative item has about 0, or less. block: entries of a joint
    table in memory at once. BayesVLM's code draws pool and target independently, without correction (and in float16):
    its values are bias alone. Raises ValueError if the numbers of draws differ, for a single draw to correct, or
    without a target.
    """
    (draws, items, classes), (target_draws, targets, target_classes) = pool.shape, target.shape
    if draws != target_draws or not targets:
        raise ValueError(f"pool and target need the same draws, and a target: {draws}, {target_draws} and {targets}")
    if corrected and draws < 2:
        raise ValueError(f"to correct for the bias takes 2 draws or more, not {draws}")
    pool, target = at_least_float32(pool), at_least_float32(target)
    rows = max(1, math.isqrt(block) // classes)
    columns = max(1, block // (rows * classes * target_classes))
    information = pool.new_zeros(items)
    for i in range(0, items, rows):
        left = pool[:, i : i + rows].flatten(1).T / draws
        for j in range(0, targets, columns):
            right = target[:, j : j + columns]
            by_class = _p_log_p(left @ right.flatten(1))
            if corrected:
                # With the target's draws rotated, both have independent weights: what information remains is bias. The
                # entropies of the single labels stay the same, and cancel.
                by_class -= _p_log_p(left @ right.roll(draws // 2, 0).flatten(1))
            information[i : i + rows] += by_class.view(-1, classes).sum(dim=1) / targets
    if not corrected:
        information += entropy(pool.mean(dim=0)) + entropy(target.mean(dim=0)).mean()
    return information


def _p_log_p(table: Tensor) -> Tensor:
    """Sums (N,) of p log p over the rows of (N, M); twice as fast as torch's entr."""
    return torch.linalg.vecdot(table, table.clamp_min(torch.finfo(table.dtype).tiny).log_())


def select(score: Tensor, budget: int) -> Tensor:
    """Indices (budget,) of the highest scores (N,), highest first, ties by index; all of them, if they are fewer.

    Raises ValueError for NaN, which would rank highest.
    """
    if score.isnan().any():
        raise ValueError(f"{int(score.isnan().sum())} of {len(score)} scores are NaN")
    return score.argsort(descending=True, stable=True)[:budget]


def density(features: Tensor, kappa: float = 20.0) -> Tensor:
    """Density (N,) of items (N, D) among themselves, by direction: the mean of exp(kappa (cosine - 1)).

    A factor on acquisitions: the information density of Settles & Craven (EMNLP 2008, section 3.4), whose similarity
    is here a von Mises-Fisher kernel.
    """
    return (kernel(features, features, kappa) - kappa).exp()


def k_center(features: Tensor, budget: int) -> Tensor:
    """Indices (budget,) of items (N, P), each the farthest from all before it; Sener & Savarese (2018), algorithm 1.

    The item nearest to the mean comes first; ties go to the lower index. All items, if they are fewer than the budget.
    Raises ValueError for NaN or infinity.
    """
    if not features.isfinite().all():
        raise ValueError("features must be finite")
    features, chosen = at_least_float32(features), []
    distance = -_squared_distance_to(features, features.mean(dim=0))
    for _ in range(min(budget, len(features))):
        index = int(distance.argmax())
        away = _squared_distance_to(features, features[index])
        distance = distance.minimum(away) if chosen else away
        distance[index] = -1  # below its copies, which are at 0
        chosen.append(index)
    return torch.tensor(chosen, dtype=torch.long, device=features.device)


def _squared_distance_to(features: Tensor, center: Tensor) -> Tensor:
    # Differences, so that copies of a chosen item are at exactly 0.
    return (features - center).square_().sum(dim=1)


def wasserstein(first: Diagonal, second: Diagonal) -> Tensor:
    """Squared 2-Wasserstein distances (N, M) of Gaussians, |m - m'|^2 + sum (sqrt v - sqrt v')^2, not below 0.

    Exact for covariances that are diagonal in one common basis, that of the variances; the means may be in another.
    """
    left, right = (
        torch.cat([at_least_float32(mean), at_least_float32(variance).sqrt()], 1) for mean, variance in (first, second)
    )
    center = right.mean(dim=0)  # a common shift changes no distance, and loses fewer digits
    left, right = left - center, right - center
    squares = left.square().sum(dim=1, keepdim=True) + right.square().sum(dim=1)
    return torch.addmm(squares, left, right.T, alpha=-2).clamp_min_(0)


def cosine(first: Diagonal, second: Diagonal) -> Tensor:
    """Mean cosines (N, M) of Gaussians as BayesVLM approximates them (ProbCosine), in any basis of the variances."""
    return cosine_mean(*(Gaussians(*map(at_least_float32, side), basis=None) for side in (first, second)))


_NEARNESS = {"cosine": cosine, "wasserstein": lambda first, second: -wasserstein(first, second)}


def neighbors(target: Diagonal, pool: Diagonal, k: int, similarity: str = "wasserstein", block: int = 2**22) -> Tensor:
    """Indices (T, min(k, N)) of the pool's items nearest to each target, nearest first, ties in any order.

    similarity: `cosine` or `wasserstein`. block: distances in memory at once. Raises ValueError for another similarity.
    """
    nearness = _NEARNESS[one_of("similarity", similarity, list(_NEARNESS))]
    step, k, rows = max(1, math.isqrt(block)), min(k, len(pool[0])), []
    for i in range(0, len(target[0]), step):
        part = tuple(x[i : i + step] for x in target)
        best = at_least_float32(part[0])[:, :0]
        index = torch.empty(best.shape, dtype=torch.long, device=best.device)
        for j in range(0, len(pool[0]), step):
            near = nearness(part, tuple(x[j : j + step] for x in pool))
            near, place = near.topk(min(k, near.shape[1]))
            best, index = torch.cat([best, near], 1), torch.cat([index, place + j], 1)
            best, kept = best.topk(min(k, best.shape[1]))
            index = index.gather(1, kept)
        rows.append(index)
    return torch.cat(rows) if rows else torch.empty((0, k), dtype=torch.long, device=pool[0].device)


def unique_neighbors(
    target: Diagonal, pool: Diagonal, budget: int, similarity: str = "wasserstein", block: int = 2**22
) -> Tensor:
    """Indices (budget,) of different items of the pool: the nearest of each target, then the second nearest, ...

    All of the pool, if it is smaller. Raises what `neighbors` raises, and ValueError without targets.
    """
    if not len(target[0]):
        raise ValueError("there is no target to find neighbors of")
    # The `limit` nearest items of a single target are all different, so k never has to be more.
    limit = min(budget, len(pool[0]))
    k = min(limit, math.ceil(budget / len(target[0])))
    while True:
        by_rank = neighbors(target, pool, k, similarity, block).T.flatten()
        different = list(dict.fromkeys(by_rank.tolist()))
        if len(different) >= limit:
            return torch.tensor(different[:limit], dtype=torch.long, device=target[0].device)
        k = min(limit, 2 * k)


def online_update(
    a: Tensor, b: Tensor, count: int, activation: Tensor, curvature: Tensor, weight: int = 1, reference: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Kronecker factors a (P', P'), b (D, D) and their count after one more item, as if gathered with it.

    a = sum phi phi^T / sqrt N and b = sum H / sqrt N over N items. activation: phi (P',), with its 1 if the map has a
    bias. curvature: H (D, D) of the item's embedding. weight: number of items that it counts as. reference: as
    BayesVLM's code, which adds |phi|^2 to every entry of a, which keeps nothing of phi's direction, and counts 1
    whatever the weight. Raises ValueError if phi does not fit a.
    """
    if activation.shape != a.shape[:1]:
        raise ValueError(f"activation must be ({len(a)},), as the factor, not {tuple(activation.shape)}")
    outer = activation.square().sum() if reference else activation.outer(activation)
    after = count + (1 if reference else weight)
    a, b = ((math.sqrt(count) * old + weight * new) / math.sqrt(after) for old, new in ((a, outer), (b, curvature)))
    return a, b, after
