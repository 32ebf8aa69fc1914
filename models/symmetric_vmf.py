"""Symmetric von Mises-Fisher: images and captions are both distributions on the unit sphere.

An ablation of the asymmetry of AsymVLM (arXiv 2505.11029). Two distributions are compared by the expected likelihood
kernel, the integral of the product of their densities (Jebara & Kondor 2003), which has a closed form for von
Mises-Fisher (Kirchhof et al. 2022, arXiv 2207.03784).
"""

from torch import Tensor

from models.asymvlm import FLOOR, SphericalHead
from models.base import Adaptor, Embedding
from models.distributions.von_mises_fisher import log_normalizer, mean_resultant_length
from models.pair_loss import PairScore


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

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore:
        """Log expected likelihood kernel (N, M), up to the constant log C_D(0), so 0 if either side is uniform.

        log C(kappa) + log C(kappa') - log C(|kappa mu + kappa' mu'|), each minus log C(0).
        """
        row, column = (log_normalizer(side.spread, self.dim) for side in (image, text))
        return PairScore(
            image.mean, text.mean, column=column, row=row, kernel=ExpectedLikelihood(self.dim),
            row_parameter=image.spread, column_parameter=text.spread,
        )  # fmt: skip


class ExpectedLikelihood:
    """-log C_dim(|kappa mu + other mu'|) + log C_dim(0), of the cosine of mu and mu'; a kernel of `PairScore`."""

    matrices = 2

    def __init__(self, dim: int):
        self.dim = dim

    def value(self, cos: Tensor, kappa: Tensor, other: Tensor) -> Tensor:
        return -log_normalizer(self.length(cos, kappa, other), self.dim)

    def derivatives(self, cos: Tensor, value: Tensor, kappa: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = self.length(cos, kappa, other)
        slope = mean_resultant_length(length, self.dim).div_(length)
        above = (1 + cos).clamp_min_(0)
        difference = kappa - other
        by_cos = (slope * kappa).mul_(other).masked_fill_(above == 0, 0)
        return by_cos, slope * (difference + other * above), slope.mul_(kappa * above - difference)

    @staticmethod
    def length(cos: Tensor, kappa: Tensor, other: Tensor) -> Tensor:
        """|kappa mu + other mu'|, elementwise."""
        # As a sum of two squares: expanded, opposite directions would cancel. The floor keeps the gradient of the root
        # finite at zero, where the gradient of log C vanishes.
        return ((kappa - other).square() + 2 * kappa * other * (1 + cos).clamp_min(0) + FLOOR**2).sqrt()
