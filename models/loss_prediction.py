"""Loss prediction: the uncertainty of a query is its retrieval loss as predicted by a perceptron.

After Yoo & Kweon (2019), arXiv 1905.03677, and Kirchhof et al. (2024), Pretrained Visual Uncertainties,
arXiv 2402.16569. Both rank pairs of losses; this method regresses losses, so that uncertainty is in nats. It assumes no
distribution, and its scores are those of plain CLIP.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import COSINE_SCALE, Adaptor, Embedding, Mean, perceptron
from models.pair_loss import PairScore


class LossPrediction(Adaptor):
    """Points as in CLIP, each with its predicted retrieval cross-entropy; after arXiv 1905.03677 and 2402.16569.

    mean: see models.base.Mean. width, hidden: of the perceptrons.
    """

    def __init__(self, dim: int, mean: str = "frozen", width: int = 1024, hidden: int = 3):
        super().__init__(temperature="exp")
        nn.init.constant_(self.log_temperature, math.log(COSINE_SCALE))  # the softmax of plain cosines is too flat
        self.image_mean, self.text_mean = (Mean(mean, dim, width, hidden) for _ in ("image", "text"))
        self.image_loss, self.text_loss = (perceptron(dim, width, 1, hidden) for _ in ("image", "text"))

    def adapt_image(self, image: Tensor) -> Embedding:
        """Adapt images (N, D): mean, and predicted retrieval loss (N,) in nats above that of guessing."""
        return Embedding(self.image_mean(image), uncertainty=self.image_loss(image).squeeze(-1))

    def adapt_text(self, text: Tensor) -> Embedding:
        return Embedding(self.text_mean(text), uncertainty=self.text_loss(text).squeeze(-1))

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore:
        """Cosine (N, M)."""
        return PairScore(image.mean, text.mean)

    def auxiliary_loss(self, image: Embedding, text: Embedding, losses: tuple[Tensor, Tensor]) -> Tensor:
        """Squared errors () of the predicted losses.

        Their target is detached and their input frozen, so prediction changes no score (Kirchhof et al. 2024).
        """
        # Relative to the loss of guessing, so that losses in batches of different sizes are comparable.
        observed = (loss.detach() - math.log(len(loss)) for loss in losses)
        return sum(F.mse_loss(x.uncertainty, loss) for x, loss in zip((image, text), observed, strict=True))
