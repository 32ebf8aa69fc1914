"""Sources of image-caption pairs; this file makes ours win over an installed Hugging Face `datasets`."""

from pathlib import Path
from typing import NamedTuple


class Image(NamedTuple):
    id: int  # the source's own id
    path: Path | None = None  # none: the source has its embedding, not its pixels

    @property
    def place(self):
        """What a report calls it."""
        return f"image {self.id}" if self.path is None else str(self.path)


class Caption(NamedTuple):
    id: int  # the source's own id
    image_id: int  # the id of the image it describes
    text: str


class Source:
    """Image-caption pairs as their publisher lays them out: what `cache_embeddings.py` reads.

    A source is constructed with `root`, a folder or a file, and the `options` of its YAML, and lists what it has in a
    fixed order; rows of the cache follow that order. `version` names what else pixels and truth depend on: a cache made
    with another one is stale.
    """

    version = ""

    def images(self, split: str) -> list[Image]:
        """List the images of `split`; raises UserError where the split or its files are missing."""
        raise NotImplementedError

    def captions(self, split: str) -> list[Caption]:
        """List the captions of `split`, grouped by image in the order of `images`."""
        raise NotImplementedError

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
