"""The adaptor for a few hundred pairs: a linear map of either side, as near to no map as cross-validation wants."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Adaptor, Embedding, best_temperature
from models.pair_loss import PairScore, info_nce

PENALTIES = (1.0, 0.3)  # that cross-validation compares, with no map at all
FOLDS, LEAST, PAIRS = 3, 30, 600  # of the cross-validation: parts, and the pairs that it needs and at most reads
GAIN = 0.01  # nats that a map must gain
STEPS, BATCH, RATE = 60, 256, 3e-3  # of its short trainings


class Linear(Adaptor):
    """Points as in CLIP, each moved by a linear map, x + A x; without an uncertainty of its own.

    penalty: factor on the squared entries of both maps in the loss, or None: what cross-validation prefers, which may
    be to learn no map.
    """

    def __init__(self, dim: int, penalty: float | None = None):
        super().__init__()
        if penalty is not None and penalty < 0:
            raise ValueError(f"penalty must be 0 or more, not {penalty}")
        self.image_map, self.text_map = (nn.Parameter(torch.zeros(dim, dim)) for _ in ("image", "text"))
        self.chooses = penalty is None
        self.register_buffer("penalty", torch.tensor(PENALTIES[0] if penalty is None else penalty))
        self.register_buffer("logit_scale", torch.tensor(100.0))

    def prepare(self, pairs, bank, quiet: bool = False) -> None:
        """Choose the penalty, and calibrate the posterior, on one caption of each image of the bank.

        Both follow from the scores that each fold of the pairs gets from the others. Too few pairs choose nothing.
        """
        self.logit_scale.fill_(pairs.meta["logit_scale"])
        dim = len(self.image_map)
        rows = np.unique(bank.image_of_text.numpy(), return_index=True)[1]
        rows = rows[torch.randperm(len(rows))[:PAIRS].numpy()]
        if len(rows) < LEAST:
            return
        image, text = bank.image[bank.image_of_text[rows], :dim], bank.text[rows, :dim]
        image, text = (x.to(self.image_map.device).float() for x in (image, text))
        penalties = (None, *PENALTIES) if self.chooses else (self.penalty.item(),)
        scores = {penalty: self._held_out_scores(image, text, penalty) for penalty in penalties}
        scales = {penalty: best_temperature(scores[penalty]) for penalty in penalties}
        losses = {
            penalty: sum(info_nce(scales[penalty] * score).item() for score in scores[penalty]) / FOLDS
            for penalty in penalties
        }
        best = min(penalties, key=losses.get)
        if losses.get(None, math.inf) < losses[best] + GAIN:
            best = None
        self.given_scale.fill_(scales[best])
        if best is None:
            self.requires_grad_(False)
        else:
            self.penalty.fill_(best)

    def _held_out_scores(self, image, text, penalty):
        """Scores of each fold of the pairs (n, D), (n, D) after training on the others; without a penalty, none."""
        scores, part = [], torch.arange(len(image), device=image.device) % FOLDS
        for fold in range(FOLDS):
            model = self._learned(image[part != fold], text[part != fold], penalty)
            with torch.no_grad():
                rows = part == fold
                scores.append(model.log_likelihood(model.adapt_image(image[rows]), model.adapt_text(text[rows])))
        return scores

    def refit(self, image: Tensor, text: Tensor):
        """Learn maps from the pairs (n, D), (n, D) alone: a function that moves images (N, D) and captions (M, D).

        It moves nothing where the run has learned no map, and takes no number from torch's global generators.
        """
        if not self.image_map.any():
            return lambda image, text: (image, text)
        device = self.image_map.device
        generator = torch.Generator().manual_seed(0)
        model = self._learned(image.to(device), text.to(device), self.penalty.item(), generator).requires_grad_(False)
        return lambda image, text: (
            model.adapt_image(image.to(device)).mean.cpu(),
            model.adapt_text(text.to(device)).mean.cpu(),
        )

    def _learned(self, image, text, penalty, generator=None):
        """A model after STEPS steps on the pairs (n, D), (n, D); without a penalty, after none."""
        model = Linear(image.shape[1], penalty).to(image.device)
        model.logit_scale.copy_(self.logit_scale)
        if penalty is not None:
            model._learn(image, text, generator)
        return model

    @torch.enable_grad()
    def _learn(self, image, text, generator=None):
        """Take STEPS steps on the pairs (n, D), (n, D)."""
        optimizer = torch.optim.Adam(self.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(STEPS):
            if len(order) < min(BATCH, len(image)):
                order = torch.randperm(len(image), generator=generator)
            rows, order = order[:BATCH].to(image.device), order[BATCH:]
            optimizer.zero_grad()
            self.loss(image[rows], text[rows]).backward()
            optimizer.step()
            schedule.step()

    def adapt_image(self, image: Tensor) -> Embedding:
        return Embedding(_moved(image, self.image_map))

    def adapt_text(self, text: Tensor) -> Embedding:
        return Embedding(_moved(text, self.text_map))

    def pair_score(self, image: Embedding, text: Embedding) -> PairScore:
        """Cosine (N, M) times the frozen model's logit scale."""
        return PairScore(image.mean, text.mean, slope=self.logit_scale)

    def auxiliary_loss(self, image: Embedding, text: Embedding, losses: tuple[Tensor, Tensor]) -> Tensor:
        """The penalty () times the squared entries of both maps."""
        return self.penalty * (self.image_map.square().sum() + self.text_map.square().sum())


def _moved(x, linear_map):
    """Unit embeddings (N, D) that a map (D, D) has moved."""
    direction = F.normalize(x, dim=-1)
    return F.normalize(direction + direction @ linear_map.T, dim=-1, eps=0.1)  # zeros have no direction
