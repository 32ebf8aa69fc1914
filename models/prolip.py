"""ProLIP, probabilistic language-image pre-training (Chun et al. 2025, arXiv 2410.18857), on frozen embeddings.

Of its two inclusion losses, this implements the inclusion of an image in its caption. The other is the inclusion of an
input in a masked copy of itself, which a cache of embeddings does not have.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from models.base import COSINE_SCALE, Embedding
from models.gaussian import PairwiseGaussian, kl_to_standard_normal
from utils.errors import one_of

STEEPNESS = 1000  # of the sigmoid of the difference between the inclusions of both directions


class ProLIP(PairwiseGaussian):
    """Gaussians trained with a pairwise sigmoid loss on cos - (S_i + S_t)/2, inclusion and KL; arXiv 2410.18857.

    mean, width, hidden, start, floor: see Gaussian. scale, vib, same_image: see PairwiseGaussian. kl: `exact`, or
    `halved`, with log sigma^2 halved first, as published. inclusion: weight of the inclusion loss. inclusion_weights:
    `exact`, or `published`, which uses log sigma^2 as if it were log sigma. inclusion_eps: ln of a factor on the
    squared distance of the means in the inclusion; 0, or -20 as published, which leaves the variances alone.
    """

    def __init__(
        self,
        dim: int,
        mean: str = "frozen",
        width: int = 1024,
        hidden: int = 3,
        scale: str = "exp",
        vib: float = 1e-4,
        kl: str = "exact",
        inclusion: float = 1e-7,
        inclusion_weights: str = "exact",
        inclusion_eps: float = 0.0,
        same_image: bool = True,
        start: float | None = 0.1,
        floor: float = 1e-6,
    ):
        first = {"first_scale": COSINE_SCALE, "first_shift": -10}
        pairwise = {"scale": scale, "vib": vib, "same_image": same_image} | first
        super().__init__(dim, mean, width, hidden, start, floor, **pairwise)
        self.halved = one_of("kl", kl, ("exact", "halved")) == "halved"
        self.published = one_of("inclusion_weights", inclusion_weights, ("exact", "published")) == "published"
        self.inclusion, self.closeness = inclusion, math.exp(inclusion_eps)

    @property
    def affine(self):
        return self.scale, self.shift

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Sum () of the pairwise sigmoid loss per image, the inclusion loss and KL of B pairs."""
        group = self.groups(image)
        image, text = self.adapt_image(image), self.adapt_text(text)
        loss = self.pair_score(image, text).pairwise_sigmoid(group) / len(group)
        if self.inclusion:
            in_text = log_inclusion(image, text, self.published, self.closeness)
            in_image = log_inclusion(text, image, self.published, self.closeness)
            loss = loss - self.inclusion * F.logsigmoid(STEEPNESS * (in_text - in_image)).mean()
        return loss + self.vib * (self.kl(image) + self.kl(text))

    def kl(self, embedding: Embedding) -> Tensor:
        if self.halved:
            return kl_to_standard_normal(embedding.mean, embedding.spread / 2)
        return super().kl(embedding)


def log_inclusion(inner: Embedding, outer: Embedding, published: bool = False, closeness: float = 1.0) -> Tensor:
    """Inclusion (N, D) of `inner` in `outer` per coordinate: ln of the integral of p_inner^2 p_outer.

    The square is a Gaussian of half the variance over 2 sqrt(pi) sigma, and the integral of a product of two Gaussians
    is a Gaussian density at the distance of their means. closeness: factor on the square of that distance.
    """
    width = inner.spread.exp() + 2 * outer.spread.exp()
    squares = (inner.mean - outer.mean).square()
    exact = -inner.spread / 2 - width.log() / 2 - closeness * squares / width - math.log(2 * math.pi)
    return exact - inner.spread - outer.spread / 2 if published else exact
