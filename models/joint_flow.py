"""The density of pairs on the product of two spheres by flow matching, with its marginals and conditionals.

One velocity field, that of models/flow.py, is trained under five masks: of an image and its caption both move, or one
does while the other is given or unknown (the idea of arXiv 2605.13352). N items, D embedding size.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Embedding
from models.density import SIDES
from models.flow import Flow, log_density

# Whether the image moves, whether the caption does.
MASKS = {
    "pair": (True, True),
    "image given text": (True, False),
    "text given image": (False, True),
    "image": (True, False),
    "text": (False, True),
}


class JointFlow(Flow):
    """Uncertainty is the log density of a query, from one flow of pairs; after arXiv 2605.13352.

    width, steps: as in Flow. candidates: best answers of a query that `of_candidates` compares.
    """

    masks: ClassVar = MASKS

    def __init__(self, dim: int, width: int = 512, steps: int = 16, candidates: int = 8):
        super().__init__(dim, width, steps)
        self.require_positive(candidates=(candidates, int))
        self.compared_answers = candidates

    def log_density(self, query: Tensor, side: str) -> Tensor:
        """That of the flow whose other side is unknown."""
        unknown = torch.zeros_like(query)
        return self.of_pairs(*((query, unknown) if side == "image" else (unknown, query)), side)

    def of_pairs(self, image: Tensor, text: Tensor, mask: str = "pair") -> Tensor:
        """Log density (N,), in nats above uniform, of pairs (N, D), (N, D), or of one side of them; mask: of MASKS."""
        pair = torch.cat([F.normalize(image, dim=-1), F.normalize(text, dim=-1)], dim=-1)
        return log_density(self.field, pair, list(self.masks).index(mask), self.steps)

    def of_candidates(self, query: Embedding, answers: Embedding, side: str) -> dict[str, Tensor]:
        """Uncertainties (N,) of queries by their K best answers (N, K, D), best first; 1 + K solutions of the ODE each.

        `conditional`: entropy of the answers' posterior where each is as likely before, the softmax of log p(query |
        answer). `information`: minus the pointwise mutual information of the query and its best answer, log p(query |
        answer) - log p(query).
        """
        count = answers.mean.shape[1]
        pairs = {side: query.mean.repeat_interleave(count, dim=0), SIDES[side]: answers.mean.flatten(0, 1)}
        likelihood = self.of_pairs(**pairs, mask=f"{side} given {SIDES[side]}").unflatten(0, (-1, count))
        return {
            "conditional": torch.special.entr(likelihood.double().softmax(dim=-1)).sum(dim=-1),
            "information": self.log_density(query.mean, side) - likelihood[:, 0],
        }

    def ends(self, image: Tensor, text: Tensor) -> list[Tensor]:
        """Pairs (B, 2 D) for each mask, with zeros for what is unknown."""
        pair, unknown = torch.cat([image, text], dim=-1), torch.zeros_like(image)
        return [pair, pair, pair, torch.cat([image, unknown], dim=-1), torch.cat([unknown, text], dim=-1)]
