"""HierarCaps (Alper and Averbuch-Elor, ECCV 2024): images of COCO, each with captions from general to specific.

id,captions,image_url
1,bird => blue bird => ... => A blue bird sitting on ...,http://images.cocodataset.org/val2014/COCO_val2014_000000100489.jpg
"""

import re
from functools import cached_property
from pathlib import Path

from datasets import Caption, Image, name_id
from datasets.karpathy import CocoFolders, refuse_repeats
from datasets.pairs import PairsFile

COLUMNS = "id", "captions", "image_url"


class HierarCaps(PairsFile):
    """The split `test`, in file order; the caption of an image is the last of its chain, the most specific one.

    root: folder of hierarcaps_test.csv. images: folder that holds COCO's 2014 or 2017 folders, by default root. An
    image has COCO's id, a caption the `id` of its row.
    """

    def __init__(self, root, images=""):
        super().__init__(Path(root, "hierarcaps_test.csv"), image_root=images)
        self.coco = CocoFolders(self.folder)

    @cached_property
    def version(self):
        """Hash of the chains, of which `captions` lists only the last prompts."""
        return f"{name_id(repr(self.chains('test'))):x}"

    def id_space(self, split):
        """Return "coco": images have COCO's ids."""
        return "coco"

    def chains(self, split):
        """List the chains of `split`, including those of absent images; raises what `pairs` raises."""
        self.pairs(split)  # raises UserError for an unknown split
        return [chain for _, _, chain in self._rows]

    def _read(self):
        return {"test": [(image, [Caption(number, image.id, chain[-1])]) for image, number, chain in self._rows]}

    @cached_property
    def _rows(self):
        """The rows of the file, as a list of (image, id of the row, chain)."""
        names, rows = self._open()
        for column in COLUMNS:
            if column not in names:
                raise self._error(f"it has no column '{column}'; it has {', '.join(names):.200}: download it again.")
        listed, seen = [], set()
        for where, row in rows:
            number, captions, url = (row.get(column, "").strip() for column in COLUMNS)  # a row may be too short
            if not re.fullmatch(r"[0-9]{1,18}", number) or int(number) in seen:
                hint = "give each row its own number"
                raise self._error(f"'id' of {where} is {number!r:.40}, which is not a number or not unique: {hint}.")
            chain = [" ".join(caption.split()) for caption in captions.split("=>")]  # folded, as in datasets/coco.py
            if len(chain) < 2 or not all(chain):
                problem = "has an empty caption" if len(chain) > 1 else "is not a chain"
                hint = "write at least two captions with ' => ' between them, or remove the row"
                raise self._error(f"'captions' of {where} {problem}, {captions!r:.80}: {hint}.")
            match = re.search(r"(\w+)/((?:COCO_\w+_)?([0-9]{12})\.jpg)$", url)
            if not match:
                form = ".../val2014/COCO_val2014_000000100489.jpg"
                raise self._error(f"'image_url' of {where} is {url!r:.80}, not of the form {form}: fix the row.")
            folder, name, id = match.groups()
            seen.add(int(number))
            listed.append((Image(int(id), self.coco.find(int(id), folder, name)), int(number), chain))
        if not listed:
            raise self._error("it holds no chains: download it again.")
        refuse_repeats(self.file, (image for image, _, _ in listed))
        return listed
