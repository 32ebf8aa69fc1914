"""Sources of image-caption pairs; this file makes ours win over an installed Hugging Face `datasets`."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from utils.errors import UserError


class Image(NamedTuple):
    id: int  # the source's own id
    path: Path | None = None  # the file that holds it; none: the source has its embedding, or reads it in its own way
    name: str = ""  # what a report calls it, if it is no file of its own

    @property
    def place(self):
        """What a report calls it: valid Unicode, whatever its file is called."""
        said = self.name or (f"image {self.id}" if self.path is None else str(self.path))
        return said.encode("utf-8", "backslashreplace").decode()


class Caption(NamedTuple):
    id: int  # the source's own id
    image_id: int  # the id of the image it describes; of a prompt for a class, the class's number
    text: str


class Classes(NamedTuple):
    """What the N images of a split are, one of C classes each."""

    names: list[str]  # (C,), as prompts say them
    templates: list[str]  # of prompts, with {} where the name stands; none where `captions` has the prompts
    label: np.ndarray  # (N,) class numbers, in the order of `images`
    human: np.ndarray | None = None  # (N, C) shares of human answers, where they are known


class Source:
    """Image-caption pairs as their publisher lays them out: what `cache_embeddings.py` reads.

    A source is constructed with `root`, a folder or a file, and the `options` of its YAML, and lists what it has in a
    fixed order; rows of the cache follow that order. `version` names what else pixels and truth depend on: a cache made
    with another one is stale. `get` is the YAML's line on where the raw data is to be had, for what it says when they
    are missing.
    """

    version = ""
    get = ""

    def images(self, split: str) -> list[Image]:
        """List the images of `split`; raises UserError where the split or its files are missing."""
        raise NotImplementedError

    def captions(self, split: str) -> list[Caption]:
        """List the captions of `split`, grouped by image in the order of `images`.

        Where the images have classes, list the prompts, class by class, or none: then templates make them.
        """
        raise NotImplementedError

    def open(self, image: Image) -> PIL.Image.Image:
        """Open one of the images that `images` lists, in a worker process as well; raises what Pillow raises."""
        return PIL.Image.open(image.path)

    def id_space(self, split: str) -> str:
        """Name what the image ids of `split` count: where two names are equal, equal ids are one and the same image.

        By it training and test data are kept apart. By default ids mean nothing outside of this source and split.
        """
        return f"{type(self).__name__} {self.version} {split}"

    def classes(self, split: str) -> Classes | None:
        """Give the classes of the images of `split`, or None where captions describe them."""
        return None

    def embeddings(self, split: str):
        """Give what `images` and `captions` list already encoded, arrays (N, D) and (M, D), or None: to be encoded.

        A source that gives them has the `logit_scale` and `logit_bias` of the model that they are from.
        """
        return None

    def matches(self, split: str):
        """Tell which images each caption is true of, as a scipy.sparse (N, M) boolean array, or None if unknown."""
        return None

    def chains(self, split: str) -> list[list[str]]:
        """List chains of prompts that go from general to specific; empty where the source has none."""
        return []


def name_id(name):
    """Make an id of a name: 63 bits of its SHA-256, for sources that number nothing."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def check_folds(folds, seed):
    """Raise ValueError for options of `fold_splits` that cannot be."""
    if not (isinstance(folds, int) and folds >= 2 and isinstance(seed, int) and seed >= 0):
        raise ValueError("folds must be a whole number from 2 on, seed one from 0 on")


def fold_splits(count, folds, seed, where):
    """Split `count` images of `where` at random: {split: mask (count,)}; raises UserError where they are too few.

    `test0`, ... are the parts and `train0`, ... what each leaves; `train` and `test` are those of part 0, `all` is all.
    """
    if count < folds:
        way = "give more, or fewer parts with --set data.options.folds=2"
        raise UserError(f"{where} has {count} images, too few for {folds} parts: {way}.")
    fold = np.empty(count, dtype=np.int64)
    for number, rows in enumerate(np.array_split(np.random.default_rng(seed).permutation(count), folds)):
        fold[rows] = number
    splits = {"all": np.full(count, True), "train": fold != 0, "test": fold == 0}
    splits |= {f"train{number}": fold != number for number in range(folds)}
    return splits | {f"test{number}": fold == number for number in range(folds)}
