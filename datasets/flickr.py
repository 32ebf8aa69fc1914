"""Flickr30k (Young et al., TACL 2014) and Flickr8k (Hodosh et al., JAIR 2013), from either kind of files in <root>:

    Karpathy's JSON     dataset_flickr30k.json, dataset_flickr8k.json
    the publisher's     results_20130124.token with train.txt, val.txt, test.txt of Flickr30k Entities, and
                        Flickr8k.token.txt with Flickr_8k.trainImages.txt, ...devImages.txt, ...testImages.txt

configs/datasets/flickr30k.yaml and flickr8k.yaml name these files and the folders that images may lie in.
"""

import re
from functools import cached_property, lru_cache

from datasets import Caption, Image
from datasets.karpathy import Karpathy, refuse_repeats
from utils.errors import UserError


class Flickr(Karpathy):
    """Flickr30k or Flickr8k: Karpathy's JSON where it is there, else the token file and its lists; in their order.

    root: the folder. file: the JSON. tokens: the token file. lists: its file of image names by split. folders: names
    that the folder of images may have. An image's id is that of the photo on Flickr, for both data sets.
    """

    def __init__(self, root, file, tokens, lists, folders):
        super().__init__(root, file)
        self.tokens = self.root / tokens
        self.lists = {split: self.root / name for split, name in lists.items()}
        self.folders = [self.root / name for name in folders]

    def id_space(self, split):
        """Flickr numbers its photos; most images of Flickr8k are in Flickr30k as well."""
        return "flickr"

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self):
        """List what the JSON, or else the token file, has: (split, image, captions)."""
        if self.file.is_file():
            return super()._read()
        if not self.tokens.is_file():
            way = self.get or "name their folder with --root"
            raise UserError(f"neither {self.file.name} nor {self.tokens.name} is in {self.root}: {way}.")
        said, listed = self._said(), []
        for split, path in self.lists.items():
            if not path.is_file():
                raise UserError(f"the list of images {path} is missing: {self.get or 'put it there'}.")
            # Flickr30k's lists leave .jpg out.
            names = [f"{name.removesuffix('.jpg')}.jpg" for name in _text(path).split()]
            for name in names:
                if name not in said:
                    way = "take it out of the list, or complete the captions"
                    raise UserError(f"{path} lists {name}, of which {self.tokens} has no caption: {way}.")
            images = [self._image({"filename": name}) for name in names]
            refuse_repeats(path, images)
            captions = [[caption._replace(image_id=image.id) for caption in said[image.path.name]] for image in images]
            listed += [(split, *pair) for pair in zip(images, captions)]
        # An image in two splits is no mistake of this kind: whoever trains on one and tests on the other is told.
        refuse_repeats(self.root, {image.path.name: image for _, image, _ in listed}.values())
        return listed

    def _said(self):
        """Read the captions by image name; some name what is no image, which no split lists."""
        said = {}
        for number, line in enumerate(_text(self.tokens).split("\n")):
            name, tab, text = line.partition("\t")
            if tab and "#" in name:
                said.setdefault(name.rpartition("#")[0], []).append(Caption(number, 0, " ".join(text.split())))
            elif line.strip():
                form = "'name.jpg#0', a tab and a caption"
                raise UserError(f"{self.tokens}: line {number + 1} is not {form}: download the file again.")
        return said

    def _image(self, entry):
        name = entry["filename"]
        photo = re.match(r"(\d+)[_.]", name)
        if not photo:
            raise UserError(f"the file name '{name}' in {self.root} does not begin with a Flickr photo id: mend it.")
        return Image(int(photo[1]), self._folder / name)

    @cached_property
    def _folder(self):
        return next((folder for folder in self.folders if folder.is_dir()), self.folders[0])


def _text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): download it again.") from None
