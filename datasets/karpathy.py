"""The splits of Karpathy and Fei-Fei (CVPR 2015), one JSON file per data set: COCO's, and what Flickr's have in common.

{"images": [{"split": "restval", "cocoid": 522418, "filepath": "val2014", "filename": "COCO_val2014_000000522418.jpg",
             "sentences": [{"sentid": 681330, "raw": "A woman ..."}, ...]}, ...]}
"""

import json
import operator
from functools import cached_property, lru_cache
from pathlib import Path

from datasets import Caption, Described, Image
from utils.errors import UserError


class Karpathy(Described):
    """COCO captions in Karpathy's splits, in their file's order: <root>/<file>, images in <root>/train2014 and val2014.

    `train` has `restval` in it, as the field trains; `train_only` is without. Where a 2014 folder is absent, images are
    looked for in train2017 and val2017, which hold the same ones under other names.
    """

    def __init__(self, root, file="dataset_coco.json"):
        self.root, self.file = Path(root), Path(root, file)
        self.coco = CocoFolders(self.root)

    def id_space(self, split):
        """Images have COCO's own ids, whatever the splits."""
        return "coco"

    def pairs(self, split):
        """List the images of `split` with their captions; raises UserError for an unknown split or a broken file."""
        listed = self._read()
        splits = {part: [part] for part, _, _ in listed}
        if "restval" in splits:
            splits |= {"train": ["train", "restval"], "train_only": ["train"]}
        if split not in splits:
            raise UserError(f"{self.root} has no split '{split}'; it has {', '.join(sorted(splits))}.")
        return [(image, captions) for part, image, captions in listed if part in splits[split]]

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self):
        """List what the file has, (split, image, captions)."""
        if not self.file.is_file():
            raise UserError(f"the file of splits {self.file} is missing: {self.get or 'name its folder with --root'}.")
        try:
            entries = json.loads(self.file.read_bytes())["images"]
            listed = [(str(entry["split"]), *self._pair(entry)) for entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}"  # some errors have the whole file in their repr
            raise UserError(f"{self.file} is not a file of Karpathy's splits ({said}): download it again.") from None
        if not listed:
            raise UserError(f"{self.file} lists no images: download it again.")
        refuse_repeats(self.file, (image for _, image, _ in listed))
        return listed

    def _pair(self, entry):
        image = self._image(entry)
        said = [(operator.index(sentence["sentid"]), sentence["raw"].split()) for sentence in entry["sentences"]]
        return image, [Caption(id, image.id, " ".join(words)) for id, words in said]  # folded, as in datasets/coco.py

    def _image(self, entry):
        id = operator.index(entry["cocoid"])
        return Image(id, self.coco.find(id, entry["filepath"], entry["filename"]))


class CocoFolders:
    """COCO's images in the folders of 2014 or, where one is absent, of 2017, which hold the same under other names."""

    def __init__(self, root):
        self.root = root

    def find(self, id, folder, name):
        """Give the path of the image `id`, which is <root>/<folder>/<name> where that folder is there."""
        folder, name_of_2017 = self.root / folder, f"{id:012d}.jpg"
        if self._is_there(folder) or not self._files_of_2017:
            return folder / name
        return self._files_of_2017.get(name_of_2017, self.root / "train2017" / name_of_2017)

    @lru_cache  # noqa: B019  (for one answer per folder, not per image)
    def _is_there(self, folder):
        return folder.is_dir()

    @cached_property
    def _files_of_2017(self):
        return {path.name: path for folder in ("train2017", "val2017") for path in (self.root / folder).glob("*.jpg")}


def refuse_repeats(file, images):
    """Raise a UserError where two of the `images` that `file` lists have one id."""
    known = {}
    for image in images:
        if image.id in known:
            both = f"{known[image.id].path.name} and {image.path.name}"
            raise UserError(f"{file} lists {both} with one image id, {image.id}: leave one of them out.")
        known[image.id] = image
