"""Strategies that choose images of a pool to label for a target: those of BayesVLM (arXiv 2412.06014), and k-center.

Every strategy is a function of a Choice and returns `budget` different rows of the pool in order of preference: a
smaller budget gets the first of them. No strategy sees a label.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from labeling.acquisition import (
    bald,
    density,
    entropy,
    epig,
    k_center,
    neighbors,
    online_update,
    select,
    unique_neighbors,
)
from labeling.classifier import Classifier, Items, joined
from models.laplace import Factors, Posterior, curvature
from models.prob_cosine import cosine_mean, cosine_variance

IN_MEMORY = 2**26  # drawn probabilities at once


@dataclass(frozen=True)
class Choice:
    """What a strategy chooses from and its settings; N images of the pool, T of the target."""

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
    reference: bool = False  # as BayesVLM's code: independent logits, EPIG uncorrected, A updated by one number
    candidates: int = 500  # images of the pool, nearest to targets, that EPIG considers
    targets: int = 200  # drawn anew for each of EPIG's picks
    weight: int = 10  # number of items that a pick counts as in EPIG's posterior
    tick: Callable[[], None] = lambda: None  # called after each of EPIG's picks
    by_density: bool = False  # acquisitions of an item are multiplied by the density there


def at_random(choice: Choice) -> Tensor:
    """Random images of the pool."""
    return _shuffled(choice.pool, choice)[: choice.budget]


def next_to_random(choice: Choice) -> Tensor:
    """Nearest neighbors of random target images."""
    return _next_to(_shuffled(choice.target, choice), choice)


def uncertain(choice: Choice) -> Tensor:
    """Images of the pool with the highest predictive entropy."""
    return select(_weighted(_entropy(choice.pool, choice), choice.pool, choice), choice.budget)


def next_to_uncertain(choice: Choice) -> Tensor:
    """Nearest neighbors of the target images with the highest predictive entropy."""
    score = _weighted(_entropy(choice.target, choice), choice.target, choice)
    return _next_to(select(score, len(score)), choice)


def next_to_disagreed(choice: Choice) -> Tensor:
    """Nearest neighbors of the target images on which drawn weights disagree most (BALD)."""
    rows = torch.arange(len(choice.target.label), device=choice.target.label.device)
    parts = rows.split(max(1, IN_MEMORY // (choice.draws * len(choice.classifier.classes))))
    # BALD is of each image by itself, so parts may have different draws.
    score = torch.cat([bald(*probabilities(choice, choice.posterior, choice.target.rows(part))) for part in parts])
    score = _weighted(score, choice.target, choice)
    return _next_to(select(score, len(score)), choice)


def informative(choice: Choice) -> Tensor:
    """Images of the pool whose labels tell most about the target's (EPIG), one by one.

    After each pick the posterior is updated by that image, which needs no label, and its prior precision is found
    again. The public code also takes a gradient step of W on the label, which is left out here.
    """
    pool, target, posterior = choice.pool, choice.target, choice.posterior
    limit = max(choice.candidates, choice.budget)
    near = unique_neighbors(*_gaussians(choice, target, pool), limit, choice.similarity).sort().values
    factors, picks = posterior.spectrum.factors, []
    for _ in range(min(choice.budget, len(near))):
        sample = target.rows(_shuffled(target, choice)[: choice.targets])
        score = epig(*probabilities(choice, posterior, pool.rows(near), sample), corrected=not choice.reference)
        best = select(score, 1)
        image = pool.rows(near[best])
        picks.append(near[best])
        near = near[torch.arange(len(near), device=near.device) != best]
        item_curvature = curvature(image.embedding, choice.classifier.classes, choice.classifier.scale, **choice.loss)
        factors = Factors(*online_update(*factors, image.phi[0], item_curvature, choice.weight, choice.reference))
        posterior = Posterior(factors, posterior.norm_sq, posterior.n, posterior.prior)
        choice.tick()
    return torch.cat(picks)


def spread_out(choice: Choice) -> Tensor:
    """Images farthest from all that were chosen before, by direction of embedding (k-center)."""
    return k_center(F.normalize(choice.pool.embedding, dim=-1), choice.budget)


def uncertain_and_dense(choice: Choice) -> Tensor:
    """As entropy, each times the density of the pool at the image."""
    return uncertain(replace(choice, by_density=True))


def next_to_uncertain_and_dense(choice: Choice) -> Tensor:
    """As entropy-targeted, each times the density of the target at the image."""
    return next_to_uncertain(replace(choice, by_density=True))


def next_to_disagreed_and_dense(choice: Choice) -> Tensor:
    """As bald, each times the density of the target at the image."""
    return next_to_disagreed(replace(choice, by_density=True))


STRATEGIES = {
    "random": at_random, "random-targeted": next_to_random, "entropy": uncertain, "entropy-targeted": next_to_uncertain,
    "bald": next_to_disagreed, "epig": informative, "k-center": spread_out,
    # Without EPIG, whose mean over the target is by its density already.
    "entropy-density": uncertain_and_dense, "entropy-targeted-density": next_to_uncertain_and_dense,
    "bald-density": next_to_disagreed_and_dense,
}  # fmt: skip


@torch.no_grad()
def probabilities(choice: Choice, posterior: Posterior, *parts: Items) -> list[Tensor]:
    """Drawn class probabilities (K, N, C) of every part; draw k of all parts is under the same W.

    Only W is random: class embeddings are fixed. With `reference` every logit is drawn independently, from the mean and
    variance of its cosine.
    """
    classes, scale = choice.classifier.classes, choice.classifier.scale
    if not choice.reference:
        images = joined(list(parts))
        unit = F.normalize(classes, dim=-1).T
        samples = posterior.samples(images.phi, images.embedding, choice.generator, choice.draws)
        drawn = torch.stack([(scale * F.normalize(z, dim=-1) @ unit).softmax(dim=-1) for z in samples])
        return list(drawn.split([len(part.label) for part in parts], dim=1))
    drawn, certain = [], (classes, torch.zeros_like(classes), torch.eye(classes.shape[1]).to(classes))
    for part in parts:
        images = part.embedding, posterior.spread(part.phi), posterior.basis
        mean, deviation = cosine_mean(images, certain), cosine_variance(images, certain).sqrt()
        noise = torch.randn(choice.draws, *mean.shape, generator=choice.generator).to(mean)
        drawn.append((scale * (mean + deviation * noise)).softmax(dim=-1))
    return drawn


@torch.no_grad()
def _entropy(images, choice):
    return entropy(choice.classifier(images).softmax(dim=-1))


def _weighted(score, images, choice):
    return score * density(images.embedding) if choice.by_density else score


def _shuffled(images, choice):
    order = torch.randperm(len(images.label), generator=choice.generator)
    return order.to(images.label.device)


def _gaussians(choice, *parts):
    return [(part.embedding, choice.posterior.spread(part.phi)) for part in parts]


def _next_to(order, choice):
    """Rows (budget,) of the pool, none twice: the k nearest to the first target, the k nearest to the second, ...

    Where these are too few, the next neighbors follow.
    """
    target, pool = _gaussians(choice, choice.target.rows(order), choice.pool)
    rows = neighbors(target, pool, choice.k, choice.similarity).flatten().tolist()
    if len(set(rows)) < choice.budget:
        rows += unique_neighbors(target, pool, choice.budget, choice.similarity).tolist()
    return torch.tensor(list(dict.fromkeys(rows))[: choice.budget], device=order.device)
