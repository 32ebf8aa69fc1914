"""A zero-shot classifier whose image projection can be trained, on the features that the frozen tower feeds to it.

N images, C classes, D embedding size, P size of the projection's input; its W (D, P) includes the bias, if there is
one, and then the input ends in a 1.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics import calibration
from utils.errors import UserError


class Items(NamedTuple):
    """Images as a cache with pooled features holds them."""

    embedding: Tensor  # (N, D) under the pretrained W
    phi: Tensor  # (N, P) input of W
    label: Tensor  # (N,) class numbers

    def rows(self, index: Tensor) -> "Items":
        """Select rows of every field."""
        return Items(*(part[index] for part in self))


def joined(parts: list[Items]) -> Items:
    """Concatenate the images of several parts."""
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
        """Embeddings (N, D) under the current W, not normalized; a residual beside W (SigLIP) stays as it was."""
        return images.embedding + images.phi @ (self.weight - self.pretrained).T

    def forward(self, images: Items) -> Tensor:
        """Logits (N, C)."""
        return self.scale * F.normalize(self.embed(images), dim=-1) @ F.normalize(self.classes, dim=-1).T


def fine_tune(classifier, labeled, val, options, seed):
    """Train a copy of the classifier on labeled Items: the copy after its best epoch on `val`, and that epoch.

    val: Items, or None, with which the last epoch is kept; epoch 0 is the start. options: lr, weight_decay, epochs,
    batch_size, patience. Raises UserError where no epoch has a finite loss on `val`.
    """
    model, best = copy.deepcopy(classifier), (math.inf, 0, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(options.epochs + 1):
        if epoch:
            for rows in torch.randperm(len(labeled.label), generator=generator).split(options.batch_size):
                batch = labeled.rows(rows.to(labeled.label.device))
                loss = F.cross_entropy(model(batch), batch.label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if val is None:
            continue
        with torch.no_grad():
            val_loss = F.cross_entropy(model(val), val.label).item()
        if val_loss < best[0]:
            best = val_loss, epoch, model.weight.detach().clone()
        elif epoch - best[1] >= options.patience:
            break
    if val is None:
        return model, options.epochs
    if best[2] is None:
        raise UserError("no epoch gives the images of --val a finite loss: the cache holds NaN or infinity.")
    model.load_state_dict({"weight": best[2]}, strict=False)
    return model, best[1]


@torch.no_grad()
def judged(classifier, images):
    """The classifier's forecast of every image, as calibration.Forecast; raises FloatingPointError as that does."""
    logit, label = classifier(images), images.label.cpu().numpy()
    return calibration.forecast(lambda rows: logit[rows], logit.shape[1], np.arange(len(label)), label)
