"""The last linear map of a tower and its input phi, the pooled features: BayesVLM is uncertain of that map only.

N images or texts, D embedding size, P size of phi. An embedding is z = W phi + b + r: W (D, P) and b (D,) of the map,
r (D,) the residual that SigLIP's image tower adds. Adaptors that need phi take rows `z | phi | 1`, see `join`.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError


class Pooled(NamedTuple):
    embedding: Tensor  # (N, D) float32, the model's output, not normalized
    pooled: Tensor  # (N, P) float32
    residual: Tensor | None  # (N, D) float32


class Projection(NamedTuple):
    weight: Tensor  # (D, P) float32
    bias: Tensor | None  # (D,) float32


class Place(NamedTuple):
    map: str  # a Parameter (P, D) that the tower multiplies by, or a Linear
    residual: str = ""  # module whose input is added to the map's output
    then: str = ""  # module after the map, which must be an Identity


# The first one that a model has is its last map: layers that come later in a tower are listed first.
PLACES = {
    "image": (
        Place("visual.proj"),  # open_clip's ViT, CoCa
        Place("visual.attnpool.c_proj"),  # ResNet
        Place("visual.head.proj"),  # timm with `linear`
        Place("visual.head.mlp.fc2"),  # timm with `mlp`
        Place("visual.trunk.head.fc"),  # timm with the trunk's own classifier
        Place("visual.trunk.head"),
        Place("visual.trunk.attn_pool.mlp.fc2", "visual.trunk.attn_pool.norm", "visual.trunk.fc_norm"),  # SigLIP
        Place("visual_projection"),  # transformers: CLIP
        Place("vision_model.head.mlp.fc2", "vision_model.head.layernorm"),  # SigLIP
        Place("vision_proj"),  # BLIP
    ),
    "text": (
        Place("text.text_projection"),  # open_clip
        Place("text.proj"),  # a Hugging Face text tower with `linear`
        Place("text.proj.2"),  # with `mlp`
        Place("text_projection"),  # transformers: CLIP
        Place("text_model.head"),  # SigLIP
        Place("text_proj"),  # BLIP
    ),
}


class LastMap:
    """The last linear map of a model's `image` or `text` tower.

    name: of the model, for messages. Raises UserError if the tower ends in none of PLACES; it is never guessed.
    """

    def __init__(self, model, tower, name):
        for place in PLACES[tower]:
            *above, self.attribute = place.map.split(".")
            self.owner = _at(model, above)
            self.map = getattr(self.owner, self.attribute, None)
            is_last = not place.then or isinstance(_at(model, place.then.split(".")), nn.Identity)
            if isinstance(self.map, nn.Parameter | nn.Linear) and is_last:
                self.residual = _at(model, place.residual.split(".")) if place.residual else None
                return
        raise UserError(
            f"the {tower} tower of {name} does not end in a linear map, whose input the pooled features are: choose"
            " another backbone, or cache without pooled features."
        )

    @property
    def projection(self):
        """The map as W and b."""
        if isinstance(self.map, nn.Parameter):
            return Projection(self.map.T.float(), None)
        bias = self.map.bias
        return Projection(self.map.weight.float(), None if bias is None else bias.float())

    def read(self, encode):
        """Call `encode`, which runs the tower once and returns its output (N, D); returns that with phi as a Pooled."""
        replacement = self._replacement()
        if replacement is not self.map:
            setattr(self.owner, self.attribute, replacement)
            try:
                pooled = encode().float()
            finally:
                setattr(self.owner, self.attribute, self.map)
            return Pooled(F.linear(pooled, *self.projection), pooled, None)
        inputs = []  # of the module with the residual, if there is one, and of the map
        hooks = [
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            for module in (self.residual, self.map)
            if module is not None
        ]
        try:
            embedding = encode().float()
        finally:
            for hook in hooks:
                hook.remove()
        # Attention pooling with one query gives (N, 1, P).
        inputs = [x.float() if x.ndim == 2 else x[:, 0].float() for x in inputs]
        return Pooled(embedding, inputs[-1], inputs[0] if len(inputs) > 1 else None)

    def _replacement(self):
        """What replaces the map so that the tower returns phi, or the map itself if a hook on it can read phi."""
        if isinstance(self.map, nn.Parameter):
            return None
        if self.attribute != "c_proj":
            return self.map
        # open_clip's attention pooling uses the weights of this Linear without calling it.
        size = self.map.in_features
        identity = nn.utils.skip_init(nn.Linear, size, size, device=self.map.weight.device)
        nn.init.eye_(identity.weight)
        nn.init.zeros_(identity.bias)
        return identity


def join(embedding, phi, bias):
    """Put embeddings (N, D), phi (N, P) and, where `bias` is true, a column of ones side by side: rows `z | phi | 1`.

    The 1 multiplies the bias of a map that has one. All are arrays or all are tensors.
    """
    library = torch if isinstance(embedding, Tensor) else np
    ones = [library.ones_like(embedding[:, :1])] if bias else []
    return library.concatenate([embedding, phi, *ones], axis=1)


def cut(rows, dim):
    """Cut rows of `join` into embeddings (N, D), D = dim, and phi with its 1, (N, P) or (N, P + 1); undoes `join`."""
    return rows[:, :dim], rows[:, dim:]


class Joined:
    """`join` of memory-mapped arrays that reads only the rows asked for; indexed like an array."""

    def __init__(self, embedding, phi, bias):
        self.embedding, self.phi, self.bias = embedding, phi, bias
        self.shape = (len(embedding), embedding.shape[1] + phi.shape[1] + bias)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return join(self.embedding[rows], self.phi[rows], self.bias)


def reconstruction_error(pooled, projection):
    """Largest relative error |W phi + b + r - z| / |z| over the rows of a Pooled; infinite if one is NaN."""
    rebuilt = F.linear(pooled.pooled, *projection) + (0 if pooled.residual is None else pooled.residual)
    error = (rebuilt - pooled.embedding).norm(dim=-1) / pooled.embedding.norm(dim=-1)
    return torch.nan_to_num(error, nan=torch.inf).max().item()


def _at(model, path):
    """Follow a list of attribute names from a module; returns None if one is missing."""
    for name in path:
        model = getattr(model, name, None)
    return model
