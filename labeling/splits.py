"""The cached splits that active learning uses: pool, target and validation part."""

import itertools

import numpy as np
import torch

from datasets.embeddings import Pairs
from labeling.classifier import Items, joined
from models.backbones.last_map import cut
from utils.errors import UserError


class Splits:
    """Opened splits as Items on a device: `pool` of one split or more, `target`, and `val` or None.

    Raises UserError where a cache is missing or has no pooled features or no classes, where classes or backbones
    differ, and where two splits share an image.
    """

    def __init__(self, dataset, backbone, pool, target, val, device):
        splits = [*pool, target, *([val] if val else [])]
        if len(set(splits)) < len(splits):
            raise UserError("--pool, --target and --val must name different splits, and none twice.")
        self.pairs = {split: Pairs(dataset, backbone, split, pooled=True) for split in splits}
        self.of_target = self.pairs[target]  # classes and backbone, which all splits share
        for pairs in self.pairs.values():
            if pairs.classes is None:
                raise UserError(
                    f"{pairs.folder} has captions and no classes: active learning needs images with classes."
                )
        for pairs in self.pairs.values():
            if pairs.classes != self.of_target.classes:
                raise UserError(f"{pairs.folder} has other classes than {self.of_target.folder}, or in another order.")
            must_share_backbone(pairs, self.of_target)
        if len(self.of_target.classes) < 2:
            raise UserError(
                f"{self.of_target.folder} has only one class, '{self.of_target.classes[0]}': classification needs at"
                " least two."
            )
        for one, other in itertools.combinations(splits, 2):
            shared = self.pairs[one].shared_with(self.pairs[other].seen(slice(None)))
            if shared:
                raise UserError(f"'{one}' and '{other}' share {shared:,} images: name splits that share none.")
        parts = {split: items(pairs, device) for split, pairs in self.pairs.items()}
        self.pool, self.target, self.val = joined([parts[split] for split in pool]), parts[target], parts.get(val)
        self.split_of = np.repeat(pool, [len(parts[split].label) for split in pool])  # of each image of the pool
        self.id_of = np.concatenate([self.pairs[split].image_id for split in pool])


def items(pairs, device):
    """The images of opened pairs as Items in float32, with label 0 where they have none.

    Raises UserError without pooled features, and for NaN or infinity.
    """
    rows = torch.from_numpy(np.array(pairs.fed("image", pooled=True)[:])).to(device).float()
    if not rows.isfinite().all():
        raise UserError(f"{pairs.folder} holds features that are NaN or infinite: cache it again.")
    label = np.zeros(len(rows), np.int64) if pairs.classes is None else pairs.label
    return Items(*cut(rows, pairs.dim), torch.from_numpy(np.array(label)).to(device).long())


def image_map(pairs, device):
    """The image tower's last map (D, P) in float32, its bias in the last column where it has one."""
    weight, bias = pairs.projection["image_weight"], pairs.projection.get("image_bias")
    whole = weight if bias is None else np.concatenate([weight, bias[:, None]], axis=1)
    return torch.from_numpy(np.array(whole, dtype=np.float32)).to(device)


def must_share_backbone(pairs, other):
    """Raise a UserError unless two opened caches are of one backbone."""
    if pairs.meta["encoder_fingerprint"] != other.meta["encoder_fingerprint"]:
        raise UserError(f"{pairs.folder} and {other.folder} were cached with different backbones.")
