"""Symmetric von Mises-Fisher: images and captions are both distributions on the unit sphere.

An ablation of the asymmetry of AsymVLM (arXiv 2505.11029). Two distributions are compared by the expected likelihood
kernel, the integral of the product of their densities (Jebara & Kondor 2003), which has a closed form for von
Mises-Fisher (Kirchhof et al. 2022, arXiv 2207.03784).
"""

import torch
from torch import Tensor

from models.asymvlm import FLOOR, SphericalHead
from models.base import Adaptor, Embedding
from models.distributions.von_mises_fisher import log_normalizer


class SymmetricVMF(Adaptor):
    """Images and captions as von Mises-Fisher distributions, trained with unified InfoNCE; after arXiv 2505.11029.

    mean, width, hidden: of both heads, see SphericalHead. temperature: see Adaptor.
    """

    def __init__(self, dim: int, mean: str = "residual", width: int = 1024, hidden: int = 3, temperature: str = "exp"):
        super().__init__(temperature)
        self.dim = dim
        self.image, self.text = (SphericalHead(dim, mean, width, hidden) for _ in ("image", "text"))

    def adapt_image(self, image: Tensor) -> Embedding:
        mean, kappa = self.image(image)
        return Embedding(mean, uncertainty=1 / kappa, spread=kappa)

    def adapt_text(self, text: Tensor) -> Embedding:
        mean, kappa = self.text(text)
        return Embedding(mean, uncertainty=1 / kappa, spread=kappa)

    def log_likelihood(self, image: Embedding, text: Embedding) -> Tensor:
        """Log expected likelihood kernel (N, M), up to the constant log C_D(0)."""
        return log_kernel(self.similarity(image, text), image.spread[:, None], text.spread, self.dim)


def log_kernel(cos: Tensor, kappa: Tensor, other: Tensor, dim: int) -> Tensor:
    """Log integral of the product of two von Mises-Fisher densities, minus log C_dim(0), elementwise.

    log C(kappa) + log C(other) - log C(|kappa mu + other mu'|), each minus log C(0), so 0 if either is uniform.
    """
    # |kappa mu + other mu'|^2 as a sum of two squares: expanded, opposite directions would cancel. The floor keeps the
    # gradient of the root finite at zero, where the gradient of log C vanishes.
    squared = (kappa - other).square() + 2 * kappa * other * (1 + cos).clamp_min(0)
    both = torch.sqrt(squared + FLOOR**2)
    return log_normalizer(kappa, dim) + log_normalizer(other, dim) - log_normalizer(both, dim)
