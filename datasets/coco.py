"""COCO captions in the 2017 layout: <root>/annotations/captions_<split>2017.json and <root>/<split>2017/*.jpg."""

import contextlib
import io
from functools import lru_cache
from pathlib import Path

from pycocotools.coco import COCO

from datasets import Caption, Image, Source
from utils.errors import UserError


class Coco(Source):
    """COCO 2017 captions (Chen et al., arXiv 1504.00325), read with pycocotools; images and captions sorted by id."""

    def __init__(self, root):
        self.root = Path(root)

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self, split):
        path = self.root / "annotations" / f"captions_{split}2017.json"
        if not path.is_file():
            raise UserError(f"COCO's annotation file {path} is missing: {self.get or 'point --root to its folder'}.")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                coco = COCO(str(path))
            folder = self.root / f"{split}2017"
            images = [Image(id, folder / coco.imgs[id]["file_name"]) for id in sorted(coco.imgs)]
            # White space is folded: thousands of captions have trailing blanks and line breaks.
            captions = [
                Caption(annotation["id"], id, " ".join(annotation["caption"].split()))
                for id in sorted(coco.imgs)
                for annotation in sorted(coco.imgToAnns[id], key=lambda annotation: annotation["id"])
            ]
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {error}"  # not the repr, which may hold the whole file
            raise UserError(f"{path} is not a file of COCO captions ({reason}): download it again.") from None
        if not images or not captions or len(captions) != len(coco.dataset.get("annotations", ())):
            raise UserError(f"{path} lists no images, or captions of images that it does not list: download it again.")
        return images, captions

    def images(self, split):
        """List the images of `split` by id; raises UserError if the annotation file is missing or broken."""
        return self._read(split)[0]

    def captions(self, split):
        """List the captions of `split` by image id and caption id; raises what `images` raises."""
        return self._read(split)[1]

    def id_space(self, split):
        """Return "coco": image ids are unique over all splits of COCO, including Karpathy's."""
        return "coco"
