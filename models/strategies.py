"""Which images of a pool to label, for the sake of a target: what BayesVLM (arXiv 2412.06014) compares, and k-center.

Every strategy is a function of a Choice and gives different rows of the pool, `budget` of them, the
first first: those of a smaller budget are the beginning of those of a larger one. None of them sees a label.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.acquisition import bald, entropy, epig, k_center, neighbors, online_update, select, unique_neighbors
from models.laplace import Factors, Posterior, curvature
from models.prob_cosine import cosine_mean, cosine_variance
from models.projection import Classifier, Items, joined

HELD = 2**26  # drawn probabilities that are in memory at once


@dataclass(frozen=True)
class Choice:
    """What a strategy chooses from, and how; N images of the pool, T of the target."""

    pool: Items
    target: Items
    classifier: Classifier  # as pretrained
    posterior: Posterior  # of its W
    loss: dict  # the curvature's: its name and the logits' bias, see models/laplace.py
    budget: int
    generator: torch.Generator
    similarity: str = "wasserstein"  # of images: or cosine
    k: int = 1  # neighbors that a target brings in
    draws: int = 100  # of W
    published: bool = False  # every logit drawn on its own, EPIG not corrected, and its A updated by one number
    candidates: int = 500  # of the pool, next to targets, among which EPIG looks
    targets: int = 200  # drawn anew for each of EPIG's picks
    weight: int = 10  # as how many items a pick counts in EPIG's posterior
    tick: Callable[[], None] = lambda: None  # called after each of EPIG's picks


def at_random(choice: Choice) -> Tensor:
    """Any of the pool."""
    return _shuffled(choice.pool, choice)[: choice.budget]


def next_to_random(choice: Choice) -> Tensor:
    """Next to any of the target."""
    return _next_to(_shuffled(choice.target, choice), choice)


def uncertain(choice: Choice) -> Tensor:
    """Those of the pool whose classes are least certain."""
    return select(_entropy(choice.pool, choice), choice.budget)


def next_to_uncertain(choice: Choice) -> Tensor:
    """Next to those of the target whose classes are least certain."""
    return _next_to(select(_entropy(choice.target, choice), len(choice.target.label)), choice)


def next_to_disagreed(choice: Choice) -> Tensor:
    """Next to those of the target on whose classes drawn W disagree most (BALD)."""
    rows = torch.arange(len(choice.target.label), device=choice.target.label.device)
    parts = rows.split(max(1, HELD // (choice.draws * len(choice.classifier.classes))))
    # BALD is of each image alone: other draws for other parts do no harm.
    score = torch.cat([bald(*probabilities(choice, choice.posterior, choice.target.rows(part))) for part in parts])
    return _next_to(select(score, len(score)), choice)


def informative(choice: Choice) -> Tensor:
    """Those of the pool whose labels say most of the target's (EPIG), one by one.

    Between picks the posterior learns that one more image is labeled, for which no label is needed, and its prior's
    precision is found anew. The published code also moves W by a step on the label, which is left out here.
    """
    pool, target, posterior = choice.pool, choice.target, choice.posterior
    limit = max(choice.candidates, choice.budget)
    near = unique_neighbors(*_gaussians(choice, target, pool), limit, choice.similarity).sort().values
    factors, picks = posterior.spectrum.factors, []
    for _ in range(min(choice.budget, len(near))):
        some = target.rows(_shuffled(target, choice)[: choice.targets])
        score = epig(*probabilities(choice, posterior, pool.rows(near), some), corrected=not choice.published)
        best = select(score, 1)
        image = pool.rows(near[best])
        picks.append(near[best])
        near = near[torch.arange(len(near), device=near.device) != best]
        one = curvature(image.embedding, choice.classifier.classes, choice.classifier.scale, **choice.loss)
        factors = Factors(*online_update(*factors, image.phi[0], one, choice.weight, choice.published))
        posterior = Posterior(factors, posterior.norm_sq, posterior.n, posterior.prior)
        choice.tick()
    return torch.cat(picks)


def spread_out(choice: Choice) -> Tensor:
    """Each the farthest from all chosen before, by directions of embeddings (k-center)."""
    return k_center(F.normalize(choice.pool.embedding, dim=-1), choice.budget)


STRATEGIES = {
    "random": at_random, "random-targeted": next_to_random, "entropy": uncertain, "entropy-targeted": next_to_uncertain,
    "bald": next_to_disagreed, "epig": informative, "k-center": spread_out,
}  # fmt: skip


@torch.no_grad()
def probabilities(choice: Choice, posterior: Posterior, *parts: Items) -> list[Tensor]:
    """Drawn class probabilities (K, N, C) of every part, draw k of all parts under one W; those of classes are fixed.

    Only W is random, as only W can learn. published: every logit is drawn for itself, by mean and variance of its
    cosine, so that draws of two parts have nothing to do with each other.
    """
    classes, scale = choice.classifier.classes, choice.classifier.scale
    if not choice.published:
        images = joined(list(parts))
        unit = F.normalize(classes, dim=-1).T
        samples = posterior.samples(images.phi, images.embedding, choice.generator, choice.draws)
        drawn = torch.stack([(scale * F.normalize(z, dim=-1) @ unit).softmax(dim=-1) for z in samples])
        return list(drawn.split([len(part.label) for part in parts], dim=1))
    found, certain = [], (classes, torch.zeros_like(classes), torch.eye(classes.shape[1]).to(classes))
    for part in parts:
        images = part.embedding, posterior.spread(part.phi), posterior.basis
        mean, deviation = cosine_mean(images, certain), cosine_variance(images, certain).sqrt()
        noise = torch.randn(choice.draws, *mean.shape, generator=choice.generator).to(mean)
        found.append((scale * (mean + deviation * noise)).softmax(dim=-1))
    return found


@torch.no_grad()
def _entropy(images, choice):
    return entropy(choice.classifier(images).softmax(dim=-1))


def _shuffled(images, choice):
    order = torch.randperm(len(images.label), generator=choice.generator)
    return order.to(images.label.device)


def _gaussians(choice, *parts):
    return [(part.embedding, choice.posterior.spread(part.phi)) for part in parts]


def _next_to(order, choice):
    """Rows (budget,) of the pool: k next to the first target, k next to the second, ..., none twice.

    Where all targets bring too few, their next neighbors follow.
    """
    target, pool = _gaussians(choice, choice.target.rows(order), choice.pool)
    found = neighbors(target, pool, choice.k, choice.similarity).flatten().tolist()
    if len(set(found)) < choice.budget:
        found += unique_neighbors(target, pool, choice.budget, choice.similarity).tolist()
    return torch.tensor(list(dict.fromkeys(found))[: choice.budget], device=order.device)
