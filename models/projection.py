"""A zero-shot classifier whose image projection can be trained, on what the frozen tower hands to it.

N images, C classes, D embedding size, P size of what the projection W (D, P) is given, which ends in a 1 where it has a
bias.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Items(NamedTuple):
    """Images as a cache with pooled features holds them."""

    embedding: Tensor  # (N, D) under the pretrained W
    phi: Tensor  # (N, P) what W was given
    label: Tensor  # (N,) class numbers

    def rows(self, index: Tensor) -> "Items":
        """Those of some rows."""
        return Items(*(part[index] for part in self))


def joined(parts: list[Items]) -> Items:
    """The images of several parts, one after another."""
    return Items(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


class Classifier(nn.Module):
    """Logits (N, C): `scale` times cosines of images and classes (C, D). W alone has gradients."""

    def __init__(self, weight: Tensor, classes: Tensor, scale: float):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("pretrained", weight)
        self.register_buffer("classes", classes)
        self.scale = scale

    def embed(self, images: Items) -> Tensor:
        """Embeddings (N, D) under W as it is now, not normalized; the part that is not W's (SigLIP) stays as it was."""
        return images.embedding + images.phi @ (self.weight - self.pretrained).T

    def forward(self, images: Items) -> Tensor:
        """Logits (N, C)."""
        return self.scale * F.normalize(self.embed(images), dim=-1) @ F.normalize(self.classes, dim=-1).T
