"""The bank of a run: training queries that it keeps, to say how near everything a gallery item is, and how dense."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST = 10_000  # captions: 10 MB for either side in float16 at D = 512


class Bank(NamedTuple):
    """Captions that a run was trained on, and their images, as `Pairs.fed` gives them; float16."""

    image: Tensor  # (N, D) or, where pooled, (N, D + P)
    text: Tensor  # (M, D) or (M, D + P)
    image_of_text: Tensor  # (M,) rows of `image`
    id_space: str  # as in `Pairs.seen`
    image_id: Tensor  # (N,)

    @property
    def seen(self):
        """Which images it holds, as `Pairs.seen`."""
        return {"id_space": self.id_space, "image_id": self.image_id}


def draw(pairs, rows, seed, pooled=False, most=MOST):
    """Draw a Bank of at most `most` of the captions `rows` of an opened Pairs, all by chance; a seed fixes it.

    pooled: as in `Pairs.fed`.
    """
    rows = np.asarray(rows)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
    images, image_of_text = np.unique(pairs.image_of_text[rows] if len(rows) else rows, return_inverse=True)
    image, text = (torch.from_numpy(np.array(pairs.fed(side, pooled)[chosen]))
                   for side, chosen in (("image", images), ("text", rows)))  # fmt: skip
    ids = torch.from_numpy(pairs.image_id[images])
    return Bank(image, text, torch.from_numpy(image_of_text), pairs.meta["id_space"], ids)
