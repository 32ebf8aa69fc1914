"""The cache of frozen embeddings: open it (memory-mapped), take it to a device. `datasets/caching.py` writes it.

One folder per split, `embeddings/<dataset>/<backbone>/<split>/`:

    image.npy (N, D), text.npy (M, D)   float16, not normalized
    image_of_text.npy (M,)              the row of image.npy that each caption describes
    image_id.npy (N,), text_id.npy (M,) the source's own ids
    items.jsonl                         image paths, captions and prompts of chains, in row order
    matches.npz                         sparse (N, M): which images each caption is true of, where the source knows it
    chains.npz                          text (K, D), chain (K,), depth (K,): prompts from general to specific
    skipped.jsonl                       what --on-error skip left out, and why
    meta.json                           what the cache is; written last, so that its presence means the rest is whole

In place of image_of_text.npy, a set of images with classes has

    label.npy (N,), class_of_text.npy (M,)   class numbers; texts are prompts, every class in every template
    human.npy (N, C)                    shares of human answers, where they are known

and with --features pooled there are

    image_pooled.npy, text_pooled.npy   float16, what the model's last projections were given
    projection.npz                      their weights (D, P) and biases (D,): embedding = weight @ pooled + bias, and in
                                        a few families a residual, the rest
"""

import hashlib
import json
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from models.backbones.last_map import Joined
from utils.config import HOME
from utils.errors import UserError
from utils.files import read_json

WORKING = "unfinished"  # folder inside the split's folder that holds what a killed run had done
META = "meta.json"
LAYOUT = 2  # of the files above; raise it when they, or what makes embeddings of an image, change
UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def read_meta(folder):
    """Read what a cache says of itself; raises UserError where meta.json is damaged."""
    try:
        meta = read_json(folder / META)
        if meta["complete"] is True:
            return meta
    except UNREADABLE:
        pass
    raise UserError(f"{folder / META} is damaged: delete {folder} and cache the split again.")


def cache_folder(dataset, backbone, split):
    return Path("embeddings", dataset, backbone, split)


def encoder_fingerprint(encoder):
    """Identify a backbone by architecture, weights and what it is given, without loading it: 16 hex digits."""
    digest = hashlib.sha256(f"{encoder.model} {encoder.pretrained is None}".encode())
    if encoder.architecture:
        digest.update((HOME / encoder.architecture).read_bytes())
    for part in (encoder.tokenizer, encoder.preprocess, encoder.library != "open_clip"):
        digest.update(repr(part).encode() if part else b"")
    if encoder.pretrained:
        place = encoder.weights_file  # a file, or a folder
        if place is None:
            digest.update(encoder.pretrained.encode())
        for path in sorted(place.iterdir()) if place and place.is_dir() else filter(None, [place]):
            if path.is_file():
                digest.update(path.name.encode() if path != place else b"")
                with open(path, "rb") as file:
                    while part := file.read(2**24):
                        digest.update(part)
    return digest.hexdigest()[:16]


class Pairs:
    """An opened cache: memory-mapped embeddings of N images and M captions, and what is known of them.

    pooled: whether `fed` will be asked for what goes into the towers' last maps. Raises UserError where the cache is
    missing or unfinished, or lacks that.
    """

    def __init__(self, dataset, backbone, split, pooled=False):
        self.folder = cache_folder(dataset, backbone, split)
        self.command = f"python cache_embeddings.py --dataset {dataset} --backbone {backbone} --splits {split}"
        self.command += " --features pooled" * pooled
        if not (self.folder / META).is_file():
            state = "unfinished" if (self.folder / WORKING).is_dir() else "missing"
            again = " again" * (state == "unfinished")
            others = {path.parts[-3] for path in Path("embeddings", dataset).glob(f"*/{split}/{META}")}
            there = f" ({', '.join(sorted(others))} is there: name it with --backbone)" * bool(others)
            raise UserError(
                f"the cache {self.folder.absolute()} is {state}{there}: run `{self.command}`{again}, with --root if the"
                " data lie elsewhere than their YAML says."
            )
        self.meta = read_meta(self.folder)
        if self.meta.get("layout") != LAYOUT:
            raise UserError(f"{self.folder} was made by another version of this suite: `{self.command} --overwrite`.")
        self.image, self.text = self._array("image"), self._array("text")
        self.image_id, self.text_id = (np.asarray(self._array(name)) for name in ("image_id", "text_id"))
        owner = np.asarray(self._array("image_of_text" if self.classes is None else "class_of_text"))
        self.image_of_text, self.class_of_text = (owner, None) if self.classes is None else (None, owner)
        shapes = (self.meta["images"], self.meta["dim"]), (self.meta["captions"], self.meta["dim"])
        if (self.image.shape, self.text.shape) != shapes or len(owner) != len(self.text):
            raise UserError(
                f"the cache {self.folder} holds other sizes than its {META} says: delete it and run `{self.command}`."
            )
        if pooled and self.meta["features"] != "pooled":
            raise UserError(
                f"{self.folder} has no pooled features, which this needs: run `{self.command} --overwrite`, with --root"
                " if the data lie elsewhere than their YAML says."
            )

    def _read(self, name, read):
        """Read one of the cache's files; one that meta.json lists must be there, another gives None."""
        if name not in self.meta["files"]:
            return None
        try:
            return read(self.folder / name)
        except UNREADABLE as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): delete {self.folder} and run `{self.command}`."
            ) from None

    def _array(self, name):
        return self._read(f"{name}.npy", lambda path: np.load(path, mmap_mode="r"))

    @property
    def dim(self):
        return self.meta["dim"]

    @property
    def queries(self):
        """How many queries there are, in the direction that has the fewer."""
        return len(self.image) if self.classes is not None else min(len(self.image), len(self.text))

    @property
    def classes(self):
        """Names of the C classes that the images have, or None where captions describe them."""
        return self.meta.get("classes")

    @cached_property
    def label(self):
        """Class numbers of the images (N,)."""
        return np.asarray(self._array("label"))

    @cached_property
    def human(self):
        """Shares of human answers (N, C), or None where they are not known."""
        return self._array("human")

    def seen(self, rows):
        """What a run that is trained on the images of `rows` keeps of them, to know them again."""
        ids = np.unique(self.image_id[rows])
        return {"id_space": self.meta["id_space"], "image_id": torch.from_numpy(ids)}

    @property
    def identity(self):
        """What an adaptor trained on these embeddings depends on."""
        return {name: self.meta[name] for name in ("dim", "encoder", "encoder_fingerprint", "fingerprint")}

    def must_fit(self, identity, checkpoint):
        """Raise a UserError unless an adaptor trained on embeddings of `identity` can be applied to these."""
        if self.dim != identity["dim"]:
            kind = f"embeddings of size {identity['dim']}, but {self.folder} holds size {self.dim}"
        elif self.meta["encoder_fingerprint"] != identity["encoder_fingerprint"]:
            kind = f"another backbone than {self.folder} was cached with"
        else:
            return
        raise UserError(f"{checkpoint} was trained on {kind}: cache and train with the same backbone.")

    @cached_property
    def matches(self):
        """Which images each caption is true of, sparse (N, M), or None where the source does not know."""
        return self._read("matches.npz", lambda path: sparse.load_npz(path).tocsc())

    @cached_property
    def chains(self):
        """Prompts from general to specific: dict of text (K, D), chain (K,), depth (K,), or None."""
        return self._read("chains.npz", lambda path: dict(np.load(path)))

    @cached_property
    def items(self):
        """Image paths and captions in row order: {"image": [...], "text": [...], "prompt": [...]}."""

        def read(path):
            items = {"image": [], "text": [], "prompt": []}
            for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):  # captions may hold other line ends
                item = json.loads(line)
                items[item["kind"]].append(item["value"])
            return items

        return self._read("items.jsonl", read)

    @cached_property
    def projection(self):
        """The towers' last linear maps, dict of image_weight (D, P), image_bias (D,) if any, text_weight, text_bias."""
        return self._read("projection.npz", lambda path: dict(np.load(path)))

    def fed(self, side, pooled=False):
        """What an adaptor is fed of each `image`, `text` or `prompt` of a chain: the embedding (N, D), float16.

        pooled: beside it, (N, D + P), what the tower's last map W (D, P) was given, which ends in a 1 where that has a
        bias: the embedding is W times it, and in a few families a residual. Open the Pairs as pooled, then.
        """
        embedding = self.chains["text"] if side == "prompt" else getattr(self, side)
        if not pooled:
            return embedding
        beside = self.chains["pooled"] if side == "prompt" else self._array(f"{side}_pooled")
        tower = "image" if side == "image" else "text"
        return Joined(embedding, beside, f"{tower}_bias" in self.projection)

    def to(self, device, pooled=False):
        """Put what an adaptor is fed on `device`: float16 images and captions (see `fed`), int64 image_of_text (M,)."""
        arrays = (self.fed("image", pooled)[:], self.fed("text", pooled)[:], self.image_of_text)
        return tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)


def all_seen(*parts):
    """Join what `Pairs.seen` gave, or None, each; raises UserError where images of two sources are among them."""
    parts = [part for part in parts if part is not None]
    held = [part for part in parts if len(part["image_id"])] or parts[:1]
    if len({part["id_space"] for part in held}) > 1:
        raise UserError(
            "what was learned elsewhere is of another source's images than those it is to be calibrated on, and a run"
            " knows the images of one: train with --val-fraction 0."
        )
    ids = np.unique(np.concatenate([part["image_id"].numpy() for part in held]))
    return {"id_space": held[0]["id_space"], "image_id": torch.from_numpy(ids)}


def hold_out(image_of_text, fraction, seed, block=1024, most=5):
    """Split captions by their images: rows to train on, and a list of blocks of held-out rows, no image twice in one.

    image_of_text: (M,). fraction: of the images that is held out; none gives no block. most: blocks that are given. Two
    captions of an image in one block would each be a wrong answer to the other's image. Raises UserError where fewer
    than two images would be left of either part.
    """
    captions = np.bincount(image_of_text)
    held = round(fraction * len(captions))
    rows = torch.arange(len(image_of_text))
    if not fraction:
        return rows, []
    if not 2 <= held <= len(captions) - 2:
        raise UserError(
            f"--val-fraction {fraction} holds out {held} of {len(captions)} images: leave two or more on either side,"
            " or hold out none with --val-fraction 0."
        )
    out = np.isin(image_of_text, np.random.default_rng(seed).permutation(len(captions))[:held])
    order, starts = np.argsort(image_of_text, kind="stable"), np.cumsum(captions) - captions
    number = np.empty(len(order), dtype=np.int64)  # of each caption among its image's
    number[order] = np.arange(len(order)) - np.repeat(starts, captions)
    blocks = [rows[out & (number == k)].split(block) for k in range(number[out].max() + 1)]
    # A block of one pair has no wrong answer to learn from.
    return rows[~out], [part for parts in blocks for part in parts if len(part) > 1][:most]
