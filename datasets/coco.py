"""COCO captions in the 2017 layout: <root>/annotations/captions_<split>2017.json and <root>/<split>2017/*.jpg."""

import contextlib
import io
import json
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
            raise UserError(
                f"COCO's annotation file {path} is missing: unpack annotations_trainval2017.zip and {split}2017.zip"
                " from https://cocodataset.org/#download into one folder and name it with --root."
            )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                return COCO(str(path))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError) as error:
            raise UserError(f"{path} is not a COCO annotation file ({error!r}): download it again.") from None

    def images(self, split):
        coco = self._read(split)
        folder = self.root / f"{split}2017"
        return [Image(id, folder / coco.imgs[id]["file_name"]) for id in sorted(coco.imgs)]

    def captions(self, split):
        coco = self._read(split)
        # Thousands of captions carry trailing blanks and line breaks: white space is folded.
        return [
            Caption(annotation["id"], id, " ".join(annotation["caption"].split()))
            for id in sorted(coco.imgs)
            for annotation in sorted(coco.imgToAnns[id], key=lambda annotation: annotation["id"])
        ]
