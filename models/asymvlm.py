"""AsymVLM: a caption is a distribution on the unit sphere, an image a point of it (arXiv 2505.11029).

A perceptron turns the frozen text embedding into eta = kappa mu. The score of an image x is its log density under the
caption's distribution, less the constant log C_D(0), which no ranking and no softmax sees and whose size (868 at
D = 512) would cost float32 the digits that matter.
"""

import torch
from torch import Tensor

from models.base import Adaptor, Embedding, perceptron
from models.distributions import PowerSpherical, VonMisesFisher

FAMILIES = {"von-mises-fisher": VonMisesFisher, "power-spherical": PowerSpherical}
# kappa = sqrt(|eta|^2 + FLOOR^2) and mu = eta / kappa have finite gradients at eta = 0, where kappa mu . x keeps its
# gradient x; from |eta| = 1 on, float64 cannot tell the difference.
FLOOR = 1e-8


class AsymVLM(Adaptor):
    """Captions as von Mises-Fisher or power spherical distributions, images as points; trained with unified InfoNCE.

    family: `von-mises-fisher` or `power-spherical`. width, hidden: of the text perceptron. normalizer: `exact`, or
    `bounds`, the mean of two bounds that the public code takes for von Mises-Fisher. temperature: see Adaptor.
    """

    def __init__(
        self,
        dim: int,
        family: str = "power-spherical",
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
        self.eta = perceptron(dim, width, dim, hidden)

    def adapt_text(self, text: Tensor) -> Embedding:
        eta = self.eta(text)
        kappa = (eta.square().sum(dim=-1) + FLOOR**2).sqrt()
        return Embedding(mean=eta / kappa[:, None], uncertainty=1 / kappa, spread=kappa)

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
