"""PCME++, improved probabilistic image-text representations (Chun 2024, arXiv 2305.18171), on frozen embeddings."""

import torch.nn.functional as F
from torch import Tensor

from models.gaussian import PairwiseGaussian


class PCMEPP(PairwiseGaussian):
    """Gaussians trained by classifying pairs on their closed-form sampled distance (CSD); arXiv 2305.18171.

    mean, width, hidden, start, floor: see Gaussian. scale, vib, same_image: see PairwiseGaussian. pseudo: weight of the
    loss that also counts as positive every pair that scores at least as high as the match of its row, or column.
    """

    def __init__(
        self,
        dim: int,
        mean: str = "frozen",
        width: int = 1024,
        hidden: int = 3,
        scale: str = "exp",
        vib: float = 1e-4,
        pseudo: float = 0.0,
        same_image: bool = True,
        start: float | None = 0.1,
        floor: float = 1e-6,
    ):
        pairwise = {"scale": scale, "first_scale": 5, "first_shift": 5, "vib": vib, "same_image": same_image}
        super().__init__(dim, mean, width, hidden, start, floor, **pairwise)
        self.pseudo = pseudo

    @property
    def affine(self):
        """Of the match logit, shift - scale CSD with CSD = 2 - 2 match: equations 1 and 2."""
        return 2 * self.scale, self.shift - 2 * self.scale

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Sum () of the matching loss of B pairs in both directions, that of pseudo-positives in both, and KL."""
        group = self.groups(image)
        image, text = self.adapt_image(image), self.adapt_text(text)
        loss = 2 * self.pair_score(image, text).pairwise_sigmoid(group) / len(group) ** 2
        if self.vib:
            loss = loss + self.vib * (self.kl(image) + self.kl(text))
        if self.pseudo:
            logit, positive = self.log_likelihood(image, text), group[:, None] == group
            matched = logit.diagonal()
            for threshold in (matched[:, None], matched):
                loss = loss + self.pseudo * cross_entropy(logit, positive | (logit >= threshold))
        return loss


def cross_entropy(logit: Tensor, positive: Tensor) -> Tensor:
    """Mean binary cross-entropy () of logits (B, B) against labels (B, B)."""
    return F.binary_cross_entropy_with_logits(logit, positive.to(logit.dtype))
