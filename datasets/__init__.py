"""Sources of image-caption pairs; this file makes `datasets` mean this package, not an installed Hugging Face one."""

import hashlib
from numbers import Integral
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import PIL.Image

from utils.errors import UserError

# What operating systems and tools put among the user's files, besides names that begin with a dot; in lower case.
SYSTEM = {
    "__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "lost+found", "@eadir",
    "#recycle", "#snapshot", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip


class Image(NamedTuple):
    id: int  # given by the source, within 64 bits
    path: Path | None = None  # the file that holds it; None if the source has its embedding, or opens it itself
    name: str = ""  # shown in reports if the image has no file of its own

    @property
    def place(self):
        """Name of the image in reports: valid Unicode, whatever its file is called."""
        name = self.name or (f"image {self.id}" if self.path is None else str(self.path))
        return name.encode("utf-8", "backslashreplace").decode()


class Caption(NamedTuple):
    id: int  # given by the source
    image_id: int  # the id of the image it describes; for a prompt, the number of its class
    text: str  # what a source read instead of one, such as None, is named or left out by datasets/listing.py
    where: str = ""  # in the file that lists it, for errors


class Classes(NamedTuple):
    """The C classes of the N images of a split."""

    names: list[str]  # (C,), as prompts spell them
    templates: list[str]  # of prompts, with {} in place of the name; empty if `captions` lists the prompts
    label: np.ndarray  # (N,) class numbers, in the order of `images`
    human: np.ndarray | None = None  # (N, C) shares of human answers, if known


class Source:
    """Image-caption pairs in their publisher's layout, as `cache_embeddings.py` reads them.

    A source is constructed with `root` (a folder or a file) and the `options` of its YAML. It lists its content in a
    fixed order, which is the row order of the cache. `version` names what else pixels and truth depend on: a cache made
    with another version is stale. `get` is the YAML's sentence on where to get the raw data; errors quote it if they
    are missing.
    """

    version = ""
    get = ""
    distinct = False  # whether a caption that an image has twice is a row listed twice, to be left out and counted

    def images(self, split: str) -> list[Image]:
        """List the images of `split`; raises UserError if the split or its files are missing."""
        raise NotImplementedError

    def captions(self, split: str) -> list[Caption]:
        """List the captions of `split`, grouped by image in the order of `images`.

        If the images have classes, list the prompts class by class, or nothing: templates then make the prompts.
        """
        raise NotImplementedError

    def open(self, image: Image) -> PIL.Image.Image:
        """Open an image that `images` lists, also in a worker process; raises what Pillow raises."""
        return PIL.Image.open(image.path)

    def id_space(self, split: str) -> str:
        """Name the id space of `split`: equal image ids in equal id spaces are the same image.

        It is used to keep training and test images apart. By default ids mean nothing outside this source and split.
        """
        return f"{type(self).__name__} {self.version} {split}"

    def classes(self, split: str) -> Classes | None:
        """Return the classes of the images of `split`, or None if captions describe them."""
        return None

    def embeddings(self, split: str):
        """Return the embeddings (N, D) and (M, D) of `images` and `captions`, or None if they are yet to be encoded.

        A source that returns them has the `logit_scale` and `logit_bias` of the model that made them.
        """
        return None

    def matches(self, split: str):
        """Return which images each caption is true of, a boolean scipy.sparse array (N, M), or None if unknown."""
        return None

    def chains(self, split: str) -> list[list[str]]:
        """List chains of prompts from general to specific; empty if the source has none."""
        return []


class Described(Source):
    """A source that reads each image together with its captions: it implements `pairs` instead of both lists."""

    def pairs(self, split: str) -> list[tuple[Image, list[Caption]]]:
        """List the images of `split` with their captions; raises UserError if it or its files are missing."""
        raise NotImplementedError

    def images(self, split):
        """List the images of `split`; raises what `pairs` raises."""
        return [image for image, _ in self.pairs(split)]

    def captions(self, split):
        """List the captions of `split`, by image; raises what `pairs` raises."""
        return [caption for _, captions in self.pairs(split) for caption in captions]


def name_id(name):
    """Hash a name to an id, 63 bits of its SHA-256, for sources that do not number their images."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def is_id(value):
    """Whether a value is an integer of 64 bits, as the ids of images and captions must be."""
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def visible(path):
    """Whether no part of a relative path is hidden or the system's: `.git`, `__MACOSX`, `a.jpg:Zone.Identifier`."""
    parts = [part.lower() for part in PurePath(path).parts]
    return not any(p in SYSTEM or p.startswith((".", "~$")) or p.endswith(":zone.identifier") for p in parts)


def check_splits(names, where):
    """Raise UserError if two names of splits in `where` differ in upper and lower case alone, as by mistake."""
    first = {}
    for name in names:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"{where} has the splits '{other}' and '{name}': write them alike, or rename one.")


def check_folds(folds, seed):
    """Raise ValueError for invalid options of `fold_splits`."""
    if not (isinstance(folds, int) and folds >= 2 and isinstance(seed, int) and seed >= 0):
        raise ValueError("folds must be an integer of at least 2, and seed an integer of at least 0")


def fold_splits(count, folds, seed, where):
    """Split `count` images of `where` at random: {split: mask (count,)}; raises UserError if they are too few.

    `test0`, ... are the parts and `train0`, ... their complements; `train` and `test` are those of part 0, `all` is
    everything. `train0-100` is 100 images of `train0`, drawn by chance, and so on for any number of images; `rest0-100`
    are the others of `train0`.
    """
    if count < folds:
        hint = "add images, or make fewer parts with --set data.options.folds=2"
        raise UserError(f"{where} has {count} images, too few for {folds} parts: {hint}.")
    fold, order = np.empty(count, dtype=np.int64), np.random.default_rng(seed).permutation(count)
    for number, rows in enumerate(np.array_split(order, folds)):
        fold[rows] = number
    splits = {"all": np.full(count, True), "train": fold != 0, "test": fold == 0}
    splits |= {f"train{number}": fold != number for number in range(folds)}
    return _Splits(order, splits | {f"test{number}": fold == number for number in range(folds)})


class _Splits(dict):
    """Masks of images by the name of the split; smaller training splits are made when they are asked for."""

    def __init__(self, order, masks):
        super().__init__(masks)
        self.order = np.random.default_rng(order).permutation(len(order))  # of another draw than the parts

    def __missing__(self, name):
        whole, _, count = name.rpartition("-")
        rest, whole = whole.startswith("rest"), whole.replace("rest", "train", 1)
        if not whole.startswith("train") or whole not in self or not count.isdigit():
            raise KeyError(name)
        order = self.order[self[whole][self.order]]
        rows = order[int(count) :] if rest else order[: int(count)]
        if len(order) < int(count) or not len(rows):
            raise KeyError(name)
        return np.isin(np.arange(len(self.order)), rows)
