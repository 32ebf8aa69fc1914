"""AsymVLM: a caption is a distribution on the unit sphere, an image a point of it (arXiv 2505.11029).

A perceptron turns the frozen text embedding into eta = kappa mu, or corrects it. The score of an image x is its log
density under the caption's distribution, less the constant log C_D(0), which no ranking and no softmax sees and whose
size (868 at D = 512) would cost float32 the digits that matter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Adaptor, Embedding, perceptron
from models.distributions import PowerSpherical, VonMisesFisher
from utils.config import MEANS

FAMILIES = {"von-mises-fisher": VonMisesFisher, "power-spherical": PowerSpherical}
# kappa = sqrt(|eta|^2 + FLOOR^2) and mu = eta / kappa have finite gradients at eta = 0, where kappa mu . x keeps its
# gradient x; from |eta| = 1 on, float64 cannot tell the difference.
FLOOR = 1e-8


class SphericalHead(nn.Module):
    """Unit mean mu (N, D) and concentration kappa (N,) of frozen embeddings (N, D).

    mean: `learned`, both from one vector eta = kappa mu that a perceptron makes; `residual`, the perceptron corrects
    eta = start * direction, at first by zero; `frozen`, mu is the direction, and a perceptron makes kappa alone.
    width, hidden: of the perceptron.
    """

    def __init__(self, dim: int, mean: str, width: int, hidden: int):
        super().__init__()
        if mean not in MEANS:
            raise ValueError(f"mean must be {', '.join(MEANS[:-1])} or {MEANS[-1]}, not '{mean}'")
        self.kind = mean
        # Where the mean starts out right, scores must start at a size that a softmax can use. Cosines of unrelated
        # directions scatter by 1 / sqrt(D): kappa = sqrt(D) gives them a scatter of one nat.
        self.start = math.sqrt(dim)
        head = perceptron(dim, width, 1 if mean == "frozen" else dim, hidden)
        if mean != "learned":
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        self.kappa, self.eta = (head, None) if mean == "frozen" else (None, head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "frozen":
            # Softplus grows no faster than |eta| does; with exp, one step of SGD that is too long would multiply kappa.
            kappa = self.start / math.log(2) * F.softplus(self.kappa(x).squeeze(-1)) + FLOOR
            return F.normalize(x, dim=-1), kappa
        eta = self.eta(x)
        if self.kind == "residual":
            eta = eta + self.start * F.normalize(x, dim=-1)
        kappa = (eta.square().sum(dim=-1) + FLOOR**2).sqrt()
        return eta / kappa[:, None], kappa


class AsymVLM(Adaptor):
    """Captions as von Mises-Fisher or power spherical distributions, images as points; trained with unified InfoNCE.

    family: `von-mises-fisher` or `power-spherical`. mean, width, hidden: see SphericalHead. normalizer: `exact`, or
    `bounds`, the mean of two bounds that the public code takes for von Mises-Fisher. temperature: see Adaptor.
    """

    def __init__(
        self,
        dim: int,
        family: str = "power-spherical",
        mean: str = "residual",
        width: int = 1024,
        hidden: int = 3,
        normalizer: str = "exact",
        temperature: str = "exp",
    ):
        super().__init__(temperature)
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not '{family}'")
        if normalizer not in ("exact", "bounds") or (normalizer == "bounds" and family != "von-mises-fisher"):
            raise ValueError(f"the {family} normalizer cannot be '{normalizer}'")
        self.dim, self.family = dim, FAMILIES[family]
        self.log_normalizer = self.family.log_normalizer if normalizer == "exact" else mean_of_bounds
        self.text = SphericalHead(dim, mean, width, hidden)

    def adapt_text(self, text: Tensor) -> Embedding:
        mean, kappa = self.text(text)
        return Embedding(mean, uncertainty=1 / kappa, spread=kappa)

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Log density (N, M) of each image under each caption's distribution, up to the constant log C_D(0)."""
        kernel = self.family.log_kernel(image.mean @ text.mean.T)
        return text.spread * kernel + self.log_normalizer(text.spread, self.dim)


def mean_of_bounds(kappa: Tensor, dim: int) -> Tensor:
    """Approximate log C_D(kappa) (M,) by the mean of an upper and a lower bound (arXiv 2103.15718), as the public code.

    Off by up to 0.1 nat and by a constant; kept to replicate published runs.
    """
    a = (dim - 1) / 2

    def bound(b: float) -> Tensor:
        root = torch.sqrt(kappa.square() + b * b)
        return root - a * torch.log(a + root)

    return -(bound((dim + 1) / 2) + bound((dim - 1) / 2)) / 2
