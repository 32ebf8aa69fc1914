"""AsymVLM (Ju et al., arXiv 2505.11029): a caption is a distribution on the unit sphere, an image a point on it.

A perceptron predicts eta = kappa mu from the frozen text embedding, or a correction to it. The score of an image x is
its log density under the caption's distribution minus the constant log C_D(0). Rankings and softmaxes do not depend on
this constant, and its size (868 at D = 512) would cost float32 the digits that matter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Adaptor, Embedding, perceptron
from models.distributions import PowerSpherical, VonMisesFisher
from models.pair_loss import Linear, Logarithm, PairScore
from utils.config import MEANS
from utils.errors import one_of

FAMILIES = {"von-mises-fisher": (VonMisesFisher, Linear), "power-spherical": (PowerSpherical, Logarithm)}
# kappa = sqrt(|eta|^2 + FLOOR^2) and mu = eta / kappa have finite gradients at eta = 0, where kappa mu . x keeps its
# gradient x. From |eta| = 1 on, the floor is below float64 rounding.
FLOOR = 1e-8


class SphericalHead(nn.Module):
    """Unit mean mu (N, D) and concentration kappa (N,) of frozen embeddings (N, D).

    mean: `learned`, a perceptron predicts both as eta = kappa mu; `residual`, it predicts a correction, at first zero,
    to eta = start * direction; `frozen`, mu is the direction, and a perceptron predicts kappa alone.
    width, hidden: of the perceptron.
    """

    def __init__(self, dim: int, mean: str, width: int, hidden: int):
        super().__init__()
        self.kind = one_of("mean", mean, MEANS)
        # A mean that starts at the frozen direction needs scores of a size that a softmax can use. Cosines of unrelated
        # directions have standard deviation 1 / sqrt(D); with kappa = sqrt(D), that of scores is 1 nat.
        self.start = math.sqrt(dim)
        head = perceptron(dim, width, 1 if mean == "frozen" else dim, hidden)
        if mean != "learned":
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        self.kappa, self.eta = (head, None) if mean == "frozen" else (None, head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "frozen":
            # Softplus grows linearly, as |eta| does; with exp, one SGD step that is too long would multiply kappa.
            kappa = self.start / math.log(2) * F.softplus(self.kappa(x).squeeze(-1)) + FLOOR
            return F.normalize(x, dim=-1), kappa
        eta = self.eta(x)
        if self.kind == "residual":
            eta = eta + self.start * F.normalize(x, dim=-1)
        kappa = (eta.square().sum(dim=-1) + FLOOR**2).sqrt()
        return eta / kappa[:, None], kappa


class AsymVLM(Adaptor):
    """Captions as von Mises-Fisher or power spherical distributions, images as points; Ju et al., arXiv 2505.11029.

    Trained with unified InfoNCE. family: `von-mises-fisher` or `power-spherical`. mean, width, hidden: see
    SphericalHead. normalizer: `exact`, or for von Mises-Fisher `bounds`, the public code's mean of two bounds.
    temperature: see Adaptor.
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
        self.dim = dim
        self.family, self.kernel = FAMILIES[one_of("family", family, FAMILIES)]
        normalizers = ("exact", "bounds") if family == "von-mises-fisher" else ("exact",)
        one_of(f"the {family} normalizer", normalizer, normalizers)
        self.log_normalizer = self.family.log_normalizer if normalizer == "exact" else mean_of_bounds
        self.text = SphericalHead(dim, mean, width, hidden)

    def adapt_text(self, text: Tensor) -> Embedding:
        mean, kappa = self.text(text)
        return Embedding(mean, uncertainty=1 / kappa, spread=kappa)

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore:
        """Log density (N, M) of each image under each caption's distribution, up to the constant log C_D(0)."""
        kappa = text.spread
        normalizer = self.log_normalizer(kappa, self.dim)
        return PairScore(image.mean, text.mean, slope=kappa, column=normalizer, kernel=self.kernel)


def mean_of_bounds(kappa: Tensor, dim: int) -> Tensor:
    """Mean (M,) of an upper and a lower bound of log C_D(kappa) (arXiv 2103.15718), as in the public code.

    It is off by up to 0.1 nat and by a constant, and kept to replicate published runs.
    """
    a = (dim - 1) / 2

    def bound(b: float) -> Tensor:
        root = torch.sqrt(kappa.square() + b * b)
        return root - a * torch.log(a + root)

    return -(bound((dim + 1) / 2) + bound((dim - 1) / 2)) / 2
