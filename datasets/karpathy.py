"""The splits of Karpathy and Fei-Fei (CVPR 2015), one JSON file per data set: COCO, and the base class for Flickr.

{"images": [{"split": "restval", "cocoid": 522418, "filepath": "val2014", "filename": "COCO_val2014_000000522418.jpg",
             "sentences": [{"sentid": 681330, "raw": "A woman ..."}, ...]}, ...]}
"""

import json
import operator
from functools import cached_property, lru_cache
from pathlib import Path

from datasets import Caption, Described, Image, check_splits
from datasets.captions import folded
from utils.errors import UserError
from utils.files import UNREADABLE, not_downloaded


class Karpathy(Described):
    """COCO captions in Karpathy's splits, in file order: <root>/<file>, images in <root>/train2014 and val2014.

    `train` includes `restval`, as is common in the field; `train_only` excludes it. If a 2014 folder is absent, images
    are read from train2017 and val2017, which hold the same images under other names.
    """

    def __init__(self, root, file="dataset_coco.json"):
        self.root, self.file = Path(root), Path(root, file)
        self.coco = CocoFolders(self.root)

    def id_space(self, split):
        """Return "coco": images have COCO's ids in all splits."""
        return "coco"

    def pairs(self, split):
        """List the images of `split` with their captions; raises UserError for an unknown split or a broken file."""
        listed = self._read()
        splits = {part: [part] for part, _, _ in listed}
        if "restval" in splits:
            splits |= {"train_only": ["train"]} if "train" in splits else {}
            splits["train"] = ["train", "restval"]
        if split not in splits:
            raise UserError(f"{self.root} has no split '{split}'; it has {', '.join(sorted(splits))}.")
        return [(image, captions) for part, image, captions in listed if part in splits[split]]

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self):
        """Read the file as a list of (split, image, captions)."""
        if not self.file.is_file():
            raise UserError(f"the file of splits {self.file} is missing: {self.get or 'point --root to its folder'}.")
        listed, where = [], ""
        try:
            # A caption that is not UTF-8 must not spoil the others: datasets/listing.py names it.
            entries = json.loads(self.file.read_bytes().decode("utf-8-sig", "surrogateescape"))["images"]
            for number, entry in enumerate(entries):
                where = f"images[{number}]: "
                listed.append((str(entry["split"]), *self._pair(entry)))
        except UNREADABLE as error:
            # Not the repr, which may hold the whole file.
            reason = not_downloaded(self.file) or f"{where}{type(error).__name__}: {error}"
            raise UserError(f"{self.file} is not a file of Karpathy's splits ({reason}): download it again.") from None
        if not listed:
            raise UserError(f"{self.file} lists no images: download it again.")
        refuse_repeats(self.file, (image for _, image, _ in listed))
        check_splits((split for split, _, _ in listed), self.file)
        return listed

    def _pair(self, entry):
        image = self._image(entry)
        captions = []
        for sentence in entry["sentences"]:
            captions.append(Caption(operator.index(sentence["sentid"]), image.id, folded(sentence.get("raw"))))
        return image, captions

    def _image(self, entry):
        id = operator.index(entry["cocoid"])
        return Image(id, self.coco.find(id, entry["filepath"], entry["filename"]))


class CocoFolders:
    """COCO's images in the 2014 folders or, if one is absent, in the 2017 folders, which hold the same images."""

    def __init__(self, root):
        self.root = root

    def find(self, id, folder, name):
        """Return the path of image `id`: <root>/<folder>/<name> if that folder exists, else its path of 2017."""
        folder, name_of_2017 = self.root / folder, f"{id:012d}.jpg"
        if self._exists(folder) or not self._files_of_2017:
            return folder / name
        return self._files_of_2017.get(name_of_2017, self.root / "train2017" / name_of_2017)

    @lru_cache  # noqa: B019  (asked once per folder, not per image)
    def _exists(self, folder):
        return folder.is_dir()

    @cached_property
    def _files_of_2017(self):
        return {path.name: path for folder in ("train2017", "val2017") for path in (self.root / folder).glob("*.jpg")}


def refuse_repeats(file, images):
    """Raise UserError if two of the `images` that `file` lists have the same id."""
    by_id = {}
    for image in images:
        if image.id in by_id:
            both = f"{by_id[image.id].path.name} and {image.path.name}"
            raise UserError(f"{file} lists {both} with the same image id, {image.id}: leave one of them out.")
        by_id[image.id] = image
