"""COCO captions in the 2017 layout: <root>/annotations/captions_<split>2017.json and <root>/<split>2017/*.jpg."""

import contextlib
import io
import json
from functools import lru_cache
from pathlib import Path

from pycocotools.coco import COCO

from datasets import Caption, Image, Source, is_id
from datasets.captions import folded
from utils.errors import UserError
from utils.files import UNREADABLE, not_downloaded


class Coco(Source):
    """COCO 2017 captions (Chen et al., arXiv 1504.00325), read with pycocotools; images and captions sorted by id."""

    def __init__(self, root):
        self.root = Path(root)

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self, split):
        path = self.root / "annotations" / f"captions_{split}2017.json"
        if not path.is_file():
            raise UserError(f"COCO's annotation file {path} is missing: {self.get or 'point --root to its folder'}.")
        coco = COCO()
        try:
            # A caption that is not UTF-8 must not spoil the others: datasets/listing.py names it.
            coco.dataset = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
            _check(path, coco.dataset)
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                coco.createIndex()
        except UNREADABLE as error:
            # Not the repr, which may hold the whole file.
            reason = not_downloaded(path) or f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is not a file of COCO captions ({reason}): download it again.") from None
        folder = self.root / f"{split}2017"
        images = [Image(id, folder / coco.imgs[id]["file_name"]) for id in sorted(coco.imgs)]
        # White space is folded: thousands of captions have trailing blanks and line breaks.
        captions = [
            Caption(annotation["id"], id, folded(annotation.get("caption")))
            for id in sorted(coco.imgs)
            for annotation in sorted(coco.imgToAnns[id], key=lambda annotation: annotation["id"])
        ]
        if not images or not captions:
            raise UserError(f"{path} lists no images or no captions: download it again.")
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


def _check(path, listing):
    """Raise UserError at an image or annotation without its fields, listed twice, or of an image that is not listed.

    pycocotools takes the last of two images with one id, and both of two annotations.
    """
    again = "fix it, or download the file again"
    place = {"images": {}, "annotations": {}}
    for kind, key in (("images", "file_name"), ("annotations", "image_id")):
        for number, entry in enumerate(listing[kind]):
            where, id, value = f"{path}: {kind}[{number}]", entry.get("id"), entry.get(key)
            if not is_id(id):
                raise UserError(f"{where} has the 'id' {id!r:.40}, which is not an integer of 64 bits: {again}.")
            if kind == "images" and not isinstance(value, str):
                raise UserError(f"{where} has no '{key}': {again}.")
            if kind == "annotations" and value not in place["images"]:
                raise UserError(f"{where} describes image {value!r:.40}, which is not among its images: {again}.")
            if id in place[kind]:
                raise UserError(f"{where} has the id of {kind}[{place[kind][id]}], {id}: leave one of them out.")
            place[kind][id] = number
    if listing["annotations"] and not any("caption" in entry for entry in listing["annotations"]):
        raise UserError(f"{path}: no annotation has a 'caption': put a file of captions there, not of objects.")
