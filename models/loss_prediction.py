"""Loss prediction: uncertainty is the retrieval loss that a perceptron expects of a query.

After Yoo & Kweon (2019), arXiv 1905.03677, and Kirchhof et al. (2024), Pretrained Visual Uncertainties,
arXiv 2402.16569; where both rank pairs of losses, this regresses them, so that an uncertainty is in nats. No
distribution is assumed, and the scores are those of plain CLIP.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import COSINE_SCALE, Adaptor, Embedding, Mean, perceptron


class LossPrediction(Adaptor):
    """Points as CLIP has them, and beside each the cross-entropy expected of retrieving with it.

    mean: see models.base.Mean. width, hidden: of the perceptrons.
    """

    def __init__(self, dim: int, mean: str = "frozen", width: int = 1024, hidden: int = 3):
        super().__init__(temperature="exp")
        nn.init.constant_(self.log_temperature, math.log(COSINE_SCALE))  # cosines alone are too flat
        self.image_mean, self.text_mean = (Mean(mean, dim, width, hidden) for _ in ("image", "text"))
        self.image_loss, self.text_loss = (perceptron(dim, width, 1, hidden) for _ in ("image", "text"))

    def adapt_image(self, image: Tensor) -> Embedding:
        """Give images (N, D) a mean and the loss (N,) expected of retrieving with them, in nats beyond a guess's."""
        return Embedding(self.image_mean(image), uncertainty=self.image_loss(image).squeeze(-1))

    def adapt_text(self, text: Tensor) -> Embedding:
        return Embedding(self.text_mean(text), uncertainty=self.text_loss(text).squeeze(-1))

    def auxiliary_loss(self, image: Embedding, text: Embedding, score: Tensor) -> Tensor:
        """Squared errors of the predicted losses.

        The prediction's target is detached and its input frozen, so that it changes no score (Kirchhof et al. 2024).
        """
        target = torch.arange(len(score), device=score.device)
        # Less what a guess would cost, so that a loss means the same in batches of any size.
        guess = math.log(len(score))
        observed = (F.cross_entropy(x.detach(), target, reduction="none") - guess for x in (score, score.T))
        return sum(F.mse_loss(x.uncertainty, loss) for x, loss in zip((image, text), observed, strict=True))
