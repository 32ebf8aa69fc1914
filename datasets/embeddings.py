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

In a large cache, image.npy and text.npy are several files, image-00000.npy and so on. Embeddings in parts that were
computed elsewhere stay where they are: meta.json has their paths, and

    image_rows.npy (N,), text_rows.npy (M,)   which rows of all parts the split has

--features pooled adds

    image_pooled.npy, text_pooled.npy   float16, the inputs of the model's last projections
    projection.npz                      their weights (D, P) and biases (D,): embedding = weight @ pooled + bias, plus a
                                        residual in a few model families
"""

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from scipy import sparse

from datasets.folds import fold_of, mask
from datasets.parts import Parts, choose
from models.backbones.last_map import Joined
from utils.config import HOME, Encoder, load_backbone
from utils.errors import UserError
from utils.files import UNREADABLE, is_name, read_json, reason

WORKING = "unfinished"  # folder inside the split's folder for the blocks of an unfinished run
META = "meta.json"
BLOCKS = 5  # of pairs at most calibrate, or pick the epoch
STRINGS = "id_space", "features", "precision", "encoder_fingerprint", "fingerprint"  # in meta.json
COUNTS = "dim", "images", "captions", "skipped", "captions_cut", "unreadable"  # likewise
LAYOUT = 2  # of the files above; increase it when they, or how an image is encoded, change


def read_meta(folder):
    """Read the metadata of a cache, which may be of another layout; raises UserError if meta.json is damaged."""
    try:
        meta = read_json(folder / META)
        if meta["complete"] is True and (meta["layout"] != LAYOUT or _is_whole(meta)):
            return meta
    except UNREADABLE:
        pass
    raise UserError(f"{folder / META} is damaged: delete {folder} and cache the split again.")


def _is_whole(meta):
    """Whether metadata of this layout hold all entries, each of its type and in its range."""
    Encoder(**meta["encoder"])
    targets = ("image_of_text",) if meta.get("classes") is None else ("class_of_text", "label")
    lists = [meta["files"], *(meta[name] for name in ("classes", "classes_without_images") if name in meta)]
    return (
        all(isinstance(meta[name], str) for name in STRINGS)
        and all(type(meta[name]) is int and meta[name] >= 0 for name in COUNTS)
        and all(isinstance(values, list) and all(isinstance(value, str) for value in values) for values in lists)
        and {"image_id.npy", "text_id.npy", "items.jsonl"} <= set(meta["files"])
        and all(f"{name}.npy" in meta["files"] or name in meta["parts"] for name in ("image", "text"))
        and all(_is_part(part) for parts in meta.get("parts", {}).values() for part in [*parts, parts[0]])
        and {f"{name}.npy" for name in targets} <= set(meta["files"])
        and type(meta["logit_scale"]) in (int, float) and 0 < meta["logit_scale"] < math.inf
        and isinstance(meta["logit_bias"], int | float | None)
    )  # fmt: skip


def _is_part(part):
    """Whether an entry of meta.json is a part: its path, its rows, and what the file was like, from `stamp_of`."""
    path, rows, stamp = part
    return isinstance(path, str) and isinstance(stamp, list) and type(rows) is int and rows > 0


def cached_as(split):
    """The split in whose cache a split lies: itself, or the one that it is a fold of."""
    fold = fold_of(split)
    return fold.whole if fold else split


def cache_folder(dataset, backbone, split):
    """Folder of the cache of a split, for a fold that of the whole; raises UserError for a split that is a path."""
    split = cached_as(split)
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

    split: of the cache, or a fold of it, see datasets/folds.py. pooled: require the pooled features, the inputs of the
    towers' last maps. Raises UserError if the cache is missing, unfinished or damaged, or lacks them.
    """

    _rows = MappingProxyType({})  # of a fold: those of each kind that it has

    def __init__(self, dataset, backbone, split, pooled=False):
        self.split, self.folder = split, cache_folder(dataset, backbone, split)
        split = cached_as(split)
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
        images, captions, dim = (self.meta[name] for name in ("images", "captions", "dim"))
        self._sizes = images, captions  # of the files
        self.image, self.text = self._embeddings("image", (images, dim)), self._embeddings("text", (captions, dim))
        self.image_id, self.text_id = self._numbers("image_id", images), self._numbers("text_id", captions)
        self.image_of_text = self.class_of_text = self.label = None  # label: class numbers of the images (N,)
        if self.classes is None:
            self.image_of_text = self._numbers("image_of_text", captions, images)
        else:
            self.class_of_text = self._numbers("class_of_text", captions, len(self.classes))
            self.label = self._numbers("label", images, len(self.classes))
        if pooled and self.meta["features"] != "pooled":
            if self.meta.get("precision") == "given":  # under the name of a backbone
                raise UserError(elsewhere)
            raise UserError(
                f"{self.folder} has no pooled features, which this needs: run `{self.command} --overwrite`, with --root"
                " if the data are not where their YAML says."
            )

        if fold_of(self.split):
            self._choose(fold_of(self.split))

    def _choose(self, fold):
        """Keep the images of a fold, and their captions; raises UserError where there is no such fold."""
        try:
            images = mask(fold, len(self.image), self.image_of_text, self.matches)
        except ValueError as error:
            raise UserError(f"{self.folder}: {error}: ask for others.") from None
        texts = np.full(len(self.text), True) if self.image_of_text is None else images[self.image_of_text]
        self._rows = {"image": np.flatnonzero(images), "text": np.flatnonzero(texts)}
        del self.matches  # read again, of these rows
        self.image, self.image_id = choose(self.image, images), self.image_id[images]
        self.text, self.text_id = choose(self.text, texts), self.text_id[texts]
        if self.image_of_text is None:
            self.label = self.label[images]
        else:
            self.image_of_text = (np.cumsum(images) - 1)[self.image_of_text[texts]]
        digest = hashlib.sha256(f"{self.meta['fingerprint']} {self.split}".encode()).hexdigest()[:16]
        sizes = {"images": len(self.image), "captions": len(self.text)}
        self.meta = self.meta | sizes | {"split": self.split, "fingerprint": digest}

    def _read(self, name, read):
        """Read a file of the cache, or return None if meta.json does not list it."""
        if name not in self.meta["files"]:
            return None
        try:
            return read(self.folder / name)
        except UNREADABLE as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({reason(error, self.folder / name)}): delete {self.folder} and"
                f" run `{self.command}`."
            ) from None

    def _array(self, name, shape=None, dtype="f2"):
        """Open an array; raises UserError unless it has this shape and type, where one is named."""

        def read(path):
            array = np.load(path, mmap_mode="r")
            if (dtype and array.dtype != dtype) or shape not in (None, array.shape):
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}")
            return array

        return self._read(f"{name}.npy", read)

    def _embeddings(self, name, shape=None):
        """Open embeddings (N, D), in one file or in parts; raises UserError if a part is missing or has changed."""
        listed = self.meta.get("parts", {}).get(name)
        if listed is None:
            return self._array(name, shape)
        if path := changed_part(self.folder, listed):
            state = "has changed since" if path.is_file() else "is missing, and"
            raise UserError(
                f"{path} {state} {self.folder} was made from it: run `{self.command} --overwrite`, with --root if the"
                " data are not where their YAML says."
            )
        lengths, rows = [count for _, count, _ in listed], None
        if f"{name}_rows.npy" in self.meta["files"]:
            rows = self._numbers(f"{name}_rows", self._sizes[name == "text"], sum(lengths))
        array = Parts([self.folder / path for path, *_ in listed], lengths, rows)
        if shape not in (None, array.shape):
            raise UserError(
                f"{self.folder / META}: the parts of '{name}' hold rows of shape {array.shape}, not {shape}: delete"
                f" {self.folder} and run `{self.command}`."
            )
        return array

    def _numbers(self, name, count, below=None):
        """Read ids, or numbers from 0 to `below`; raises UserError for others."""
        numbers = np.asarray(self._array(name, (count,), "i8"))
        if below is not None and count and not 0 <= numbers.min() <= numbers.max() < below:
            raise UserError(
                f"{self.folder / name}.npy holds numbers outside of 0 to {below - 1}: delete {self.folder} and run"
                f" `{self.command}`."
            )
        return numbers

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
    def human(self):
        """Shares of human answers (N, C), or None if unknown."""
        human = self._array("human", (self._sizes[0], len(self.classes)), None)
        return human if human is None or not self._rows else human[self._rows["image"]]

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

        def read(path):
            matches = sparse.load_npz(path).tocsc()
            if matches.shape != self._sizes:
                raise ValueError(f"it is of shape {matches.shape}")
            return matches[self._rows["image"]][:, self._rows["text"]] if self._rows else matches

        return self._read("matches.npz", read)

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
            counts = *self._sizes, len(self.chains["text"]) if self.chains else 0
            values = [value for of_kind in items.values() for value in of_kind]
            if tuple(map(len, items.values())) != counts or not all(isinstance(value, str) for value in values):
                raise ValueError("it does not name each row of the arrays")
            "".join(values).encode()  # half a character cannot be written into a result
            return items

        items = self._read("items.jsonl", read)
        return items | {kind: [items[kind][row] for row in rows] for kind, rows in self._rows.items()}

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
        phi = self.chains["pooled"] if side == "prompt" else self._embeddings(f"{side}_pooled")
        if side in self._rows:
            phi = choose(phi, self._rows[side])
        tower = "image" if side == "image" else "text"
        return Joined(embedding, phi, f"{tower}_bias" in self.projection)

    def must_be_finite(self, pooled=False):
        """Raise UserError, which names the rows, if the embeddings, or the pooled features, hold NaN or infinity."""
        for name in ("image", "text", *(("image_pooled", "text_pooled") if pooled else ())):
            array = self._embeddings(name)
            wrong = np.flatnonzero(~finite_rows(array))
            if len(wrong):
                (file, wrong), *_ = self.by_file(name, wrong, array)
                size = "" if isinstance(array, Parts) else f" of {len(array):,}"
                raise UserError(
                    f"{file} holds NaN or infinity in {name_rows(wrong)}{size}: delete {self.folder} and run"
                    f" `{self.command}`."
                )

    def by_file(self, name, rows, array=None):
        """Group rows (n,) of `image` or `text`, or of `array`, by the files they are in: [(path, rows (m,) of it)]."""
        array, file = getattr(self, name) if array is None else array, self.folder / f"{name}.npy"
        if not isinstance(array, Parts):
            return [(file, rows)]
        parts = [(array.parts[number], inside) for number, _, inside in array.places(rows)]
        return [(part if isinstance(part, Path) else file, inside) for part, inside in parts]

    def to(self, device, pooled=False):
        """Copy to `device`: inputs of images and of captions (see `fed`), float16, and image_of_text (M,), int64."""

        def copied(array):
            rows = array[:]  # of a cache in parts a copy already
            return torch.from_numpy(np.array(rows) if isinstance(rows, np.memmap) else rows).to(device)

        image, text = (copied(self.fed(side, pooled)) for side in ("image", "text"))
        return image, text, torch.from_numpy(np.array(self.image_of_text)).to(device)


def stamp_of(path):
    """Size of a file in bytes and when it was written, in ns, by which a change is noticed."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def changed_part(folder, parts):
    """The path of the first part that is missing or has changed since, or None.

    folder: of the cache. parts: entries of meta.json, [path, rows, stamp].
    """
    for path, _, stamp in parts:
        path = folder / path
        if not path.is_file() or stamp != stamp_of(path)[: len(stamp)]:
            return path
    return None


def finite_rows(array, block=2**16):
    """Which rows (N,) of an array (N, D) of float16 are finite, read block by block."""
    parts = (np.asarray(array[start : start + block]).view(np.int16) for start in range(0, len(array), block))
    # Without the sign, the bits of NaN and infinity are above all others: seven times as fast as isfinite.
    return np.concatenate([(part & 0x7FFF).max(axis=1) < 0x7C00 for part in parts])


def name_rows(rows, most=3):
    """Name rows by number: "row 7", "rows 3 and 7", "rows 3, 7, 12 and 5 more"."""
    names = [f"{row:,}" for row in rows[:most]] + [f"{len(rows) - most:,} more"] * (len(rows) > most)
    return f"row {names[0]}" if len(names) == 1 else f"rows {', '.join(names[:-1])} and {names[-1]}"


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
