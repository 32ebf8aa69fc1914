"""Sources of image-caption pairs; this file makes ours win over an installed Hugging Face `datasets`."""

from pathlib import Path
from typing import NamedTuple


class Image(NamedTuple):
    id: int  # the source's own id
    path: Path


class Caption(NamedTuple):
    id: int  # the source's own id
    image_id: int  # the id of the image it describes
    text: str


class Source:
    """Image-caption pairs as their publisher lays them out: what `cache_embeddings.py` reads.

    A source is constructed with the folder `root` and the `options` of its YAML, and lists what it has in a fixed
    order; rows of the cache follow that order. `version` names what else pixels and truth depend on: a cache made with
    another one is stale.
    """

    version = ""

    def images(self, split: str) -> list[Image]:
        """List the images of `split`; raises UserError where the split or its files are missing."""
        raise NotImplementedError

    def captions(self, split: str) -> list[Caption]:
        """List the captions of `split`, grouped by image in the order of `images`."""
        raise NotImplementedError

    def matches(self, split: str):
        """Tell which images each caption is true of, as a scipy.sparse (N, M) boolean array, or None if unknown."""
        return None

    def chains(self, split: str) -> list[list[str]]:
        """List chains of prompts that go from general to specific; empty where the source has none."""
        return []
