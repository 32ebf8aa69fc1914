"""The cache of frozen embeddings: open it (memory-mapped), copy it to a device. `datasets/caching.py` writes it.

One folder per split, `embeddings/<dataset>/<backbone>/<split>/`:

    image.npy (N, D), text.npy (M, D)   float16, not normalized
    image_of_text.npy (M,)              the row of image.npy that each caption describes
    image_id.npy (N,), text_id.npy (M,) ids given by the source
    items.jsonl                         image paths, captions and prompts of chains, in row order
    matches.npz                         sparse (N, M): which images each caption is true of, if known
    chains.npz                          text (K, D), chain (K,), depth (K,): prompts from general to specific
    skipped.jsonl                       what was left out, and why
    meta.json                           metadata; written last, so that its presence means the rest is complete

If the images have classes, image_of_text.npy is replaced by

    label.npy (N,), class_of_text.npy (M,)   class numbers; texts are prompts, every class in every template
    human.npy (N, C)                    shares of human answers, if known

and --features pooled adds

    image_pooled.npy, text_pooled.npy   float16, the inputs of the model's last projections
    projection.npz                      their weights (D, P) and biases (D,): embedding = weight @ pooled + bias, plus a
                                        residual in a few model families
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
from utils.config import HOME, load_backbone
from utils.errors import UserError
from utils.files import is_name, read_json

WORKING = "unfinished"  # folder inside the split's folder for the blocks of an unfinished run
META = "meta.json"
BLOCKS = 5  # of pairs at most calibrate, or pick the epoch
LAYOUT = 2  # of the files above; increase it when they, or how an image is encoded, change
UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error),
    *(TypeError, AttributeError),  # an .npy by the name of .npz in `with`, from Python 3.11 on and before
)


def read_meta(folder):
    """Read the metadata of a cache; raises UserError if meta.json is damaged."""
    try:
        meta = read_json(folder / META)
        if meta["complete"] is True:
            return meta
    except UNREADABLE:
        pass
    raise UserError(f"{folder / META} is damaged: delete {folder} and cache the split again.")


def cache_folder(dataset, backbone, split):
    """Folder of the cache of a split; raises UserError for a split that is a path."""
    if not is_name(split):
        raise UserError(f"a split names a folder: it cannot be {split!r}, with a separator or beginning with a dot.")
    return Path("embeddings", dataset, backbone, split)


def encoder_fingerprint(encoder):
    """Hash a backbone's architecture, weights, tokenizer and preprocessing, without loading it: 16 hex digits."""
    digest = hashlib.sha256(f"{encoder.model} {encoder.pretrained is None}".encode())
    if encoder.architecture:
        digest.update((HOME / encoder.architecture).read_bytes())
    for part in (encoder.tokenizer, encoder.preprocess, encoder.library != "open_clip"):
        digest.update(repr(part).encode() if part else b"")
    if encoder.pretrained:
        weights = encoder.weights_file  # a file, a folder, or None for weights given by name
        if weights is None:
            digest.update(encoder.pretrained.encode())
            paths = []
        else:
            paths = sorted(weights.iterdir()) if weights.is_dir() else [weights]
        for path in paths:
            if path.is_file():
                digest.update(path.name.encode() if path != weights else b"")
                with open(path, "rb") as file:
                    while part := file.read(2**24):
                        digest.update(part)
    return digest.hexdigest()[:16]


class Pairs:
    """An opened cache: memory-mapped embeddings of N images and M captions, with their annotations.

    pooled: require the pooled features, the inputs of the towers' last maps. Raises UserError if the cache is missing,
    unfinished or damaged, or lacks them.
    """

    def __init__(self, dataset, backbone, split, pooled=False):
        self.folder = cache_folder(dataset, backbone, split)
        self.command = f"python cache_embeddings.py --dataset {dataset} --backbone {backbone} --splits {split}"
        elsewhere = f"{self.folder} is for embeddings computed elsewhere, without the inputs of the model's last"
        elsewhere += " projections, which this needs: choose another method."
        if pooled and load_backbone(backbone).pretrained == "elsewhere":
            raise UserError(elsewhere)
        if pooled:
            self.command += " --features pooled"
        if not (self.folder / META).is_file():
            unfinished = (self.folder / WORKING).is_dir()
            state, again = ("unfinished", " again") if unfinished else ("missing", "")
            others = {path.parts[-3] for path in Path("embeddings", dataset).glob(f"*/{split}/{META}")}
            if others:
                state += f" (there is one of {', '.join(sorted(others))}: choose it with --backbone)"
            raise UserError(
                f"the cache {self.folder.absolute()} is {state}: run `{self.command}`{again}, with --root if the data"
                " are not where their YAML says."
            )
        self.meta = read_meta(self.folder)
        if self.meta.get("layout") != LAYOUT:
            again = f"run `{self.command} --overwrite`"
            raise UserError(f"{self.folder} was made by another version of this suite: {again}.")
        self.image, self.text = self._array("image"), self._array("text")
        self.image_id, self.text_id = (np.asarray(self._array(name)) for name in ("image_id", "text_id"))
        self.image_of_text = self.class_of_text = None
        if self.classes is None:
            target = self.image_of_text = np.asarray(self._array("image_of_text"))
        else:
            target = self.class_of_text = np.asarray(self._array("class_of_text"))
        shapes = (self.meta["images"], self.meta["dim"]), (self.meta["captions"], self.meta["dim"])
        if (self.image.shape, self.text.shape) != shapes or len(target) != len(self.text):
            raise UserError(
                f"the cache {self.folder} has other sizes than its {META} says: delete it and run `{self.command}`."
            )
        if pooled and self.meta["features"] != "pooled":
            if self.meta.get("precision") == "given":  # under the name of a backbone
                raise UserError(elsewhere)
            raise UserError(
                f"{self.folder} has no pooled features, which this needs: run `{self.command} --overwrite`, with --root"
                " if the data are not where their YAML says."
            )

    def _read(self, name, read):
        """Read a file of the cache, or return None if meta.json does not list it."""
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
        """Number of queries, in the direction that has fewer."""
        return len(self.image) if self.classes is not None else min(len(self.image), len(self.text))

    @property
    def classes(self):
        """Names of the C classes of the images, or None if captions describe them."""
        return self.meta.get("classes")

    @cached_property
    def label(self):
        """Class numbers of the images (N,)."""
        return np.asarray(self._array("label"))

    @cached_property
    def human(self):
        """Shares of human answers (N, C), or None if unknown."""
        return self._array("human")

    def seen(self, rows):
        """Return the ids of the images of `rows`, which a run stores to recognize its training images."""
        ids = np.unique(self.image_id[rows])
        return {"id_space": self.meta["id_space"], "image_id": torch.from_numpy(ids)}

    def shared_with(self, seen):
        """Count the images that are among those of `seen`, by their sources' ids; none are if the sources differ."""
        if self.meta["id_space"] != seen["id_space"]:
            return 0
        return int(np.isin(self.image_id, seen["image_id"].numpy()).sum())

    @property
    def identity(self):
        """The metadata that an adaptor trained on these embeddings depends on."""
        return {name: self.meta[name] for name in ("dim", "encoder", "encoder_fingerprint", "fingerprint")}

    def must_fit(self, identity, checkpoint):
        """Raise UserError unless an adaptor trained on embeddings of `identity` can be applied to these."""
        if self.dim != identity["dim"]:
            trained_on = f"embeddings of size {identity['dim']}, but {self.folder} holds size {self.dim}"
        elif self.meta["encoder_fingerprint"] != identity["encoder_fingerprint"]:
            trained_on = f"another backbone than {self.folder} was cached with"
        else:
            return
        raise UserError(f"{checkpoint} was trained on {trained_on}: cache and train with the same backbone.")

    @cached_property
    def matches(self):
        """Which images each caption is true of, sparse (N, M), or None if unknown."""
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
        """Return the inputs of an adaptor for each `image`, `text` or `prompt` of a chain: embeddings (N, D), float16.

        pooled: (N, D + P), each embedding followed by the input phi (P,) of the tower's last map W (D, P); phi ends in
        a 1 if W has a bias. The embedding is W phi, plus a residual in a few families. Open the Pairs as pooled for it.
        """
        embedding = self.chains["text"] if side == "prompt" else getattr(self, side)
        if not pooled:
            return embedding
        phi = self.chains["pooled"] if side == "prompt" else self._array(f"{side}_pooled")
        tower = "image" if side == "image" else "text"
        return Joined(embedding, phi, f"{tower}_bias" in self.projection)

    def to(self, device, pooled=False):
        """Copy to `device`: inputs of images and of captions (see `fed`), float16, and image_of_text (M,), int64."""
        arrays = (self.fed("image", pooled)[:], self.fed("text", pooled)[:], self.image_of_text)
        return tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)


def all_seen(*parts):
    """Join results of `Pairs.seen`, or None each; raises UserError if their images come from different sources."""
    parts = [part for part in parts if part is not None]
    filled = [part for part in parts if len(part["image_id"])] or parts[:1]
    if len({part["id_space"] for part in filled}) > 1:
        raise UserError(
            "what the method learned elsewhere is from another source's images than those to calibrate on, and a run"
            " stores the image ids of one source only: train with --val-fraction 0."
        )
    ids = np.unique(np.concatenate([part["image_id"].numpy() for part in filled]))
    return {"id_space": filled[0]["id_space"], "image_id": torch.from_numpy(ids)}


def hold_out(image_of_text, fraction, seed, block=1024, most=BLOCKS):
    """Split captions by image: rows to train on, and a list of blocks of held-out rows, no image twice in a block.

    image_of_text: (M,). fraction: share of the images to hold out; 0 gives no blocks. most: largest number of blocks.
    If a block held two captions of an image, each would be a wrong answer to the other's image. Raises UserError if
    either part would have fewer than two images.
    """
    captions = np.bincount(image_of_text)  # per image
    held_out = round(fraction * len(captions))
    rows = torch.arange(len(image_of_text))
    if not fraction:
        return rows, []
    if not 2 <= held_out <= len(captions) - 2:
        raise UserError(
            f"holding out {fraction:g} of {len(captions)} images leaves {held_out} to pick the epoch and"
            f" {len(captions) - held_out} to train on, where two are the least: choose another --val-fraction, or 0."
        )
    out = np.isin(image_of_text, np.random.default_rng(seed).permutation(len(captions))[:held_out])
    return rows[~out], blocks(image_of_text, out, block)[:most]


def blocks(image_of_text, chosen, block=1024):
    """Cut captions into blocks of rows, no image twice in a block, and no block of one.

    image_of_text: (M,). chosen: mask (M,) of the captions.
    """
    captions = np.bincount(image_of_text)  # per image
    order, starts = np.argsort(image_of_text, kind="stable"), np.cumsum(captions) - captions
    number = np.empty(len(order), dtype=np.int64)  # of each caption among those of its image
    number[order] = np.arange(len(order)) - np.repeat(starts, captions)
    parts, rows = [], torch.arange(len(image_of_text))
    for k in range(number[chosen].max() + 1):
        parts += rows[chosen & (number == k)].split(block)
    return [part for part in parts if len(part) > 1]  # one pair has no wrong answers
