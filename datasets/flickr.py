"""Flickr30k (Young et al., TACL 2014) and Flickr8k (Hodosh et al., JAIR 2013), from one of two kinds of files.

    Karpathy's JSON     dataset_flickr30k.json, dataset_flickr8k.json
    publisher's lists   results_20130124.token with train.txt, val.txt, test.txt of Flickr30k Entities, and
                        Flickr8k.token.txt with Flickr_8k.trainImages.txt, ...devImages.txt, ...testImages.txt

The files lie in <root>. configs/datasets/flickr30k.yaml and flickr8k.yaml name them and the possible folders of images.
"""

import re
from functools import cached_property, lru_cache

from datasets import Caption, Image
from datasets.karpathy import Karpathy, refuse_repeats
from utils.errors import UserError


class Flickr(Karpathy):
    """Flickr30k or Flickr8k from Karpathy's JSON if it exists, else from the token file and its lists; in file order.

    root: the folder. file: the JSON. tokens: the token file. lists: for each split, the file of image names. folders:
    possible names of the folder of images. For both data sets, an image's id is that of its photo on Flickr.
    """

    def __init__(self, root, file, tokens, lists, folders):
        super().__init__(root, file)
        self.tokens = self.root / tokens
        self.lists = {split: self.root / name for split, name in lists.items()}
        self.folders = [self.root / name for name in folders]

    def id_space(self, split):
        """Return "flickr": ids are those of photos on Flickr, and most images of Flickr8k are also in Flickr30k."""
        return "flickr"

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self):
        """Read the JSON, or else the token file, as a list of (split, image, captions)."""
        if self.file.is_file():
            return super()._read()
        if not self.tokens.is_file():
            hint = self.get or "point --root to their folder"
            raise UserError(f"{self.root} has neither {self.file.name} nor {self.tokens.name}: {hint}.")
        captions_of, listed = self._captions(), []
        for split, path in self.lists.items():
            if not path.is_file():
                raise UserError(f"the list of images {path} is missing: {self.get or 'put it there'}.")
            # Flickr30k's lists omit .jpg.
            names = [f"{name.removesuffix('.jpg')}.jpg" for name in _text(path).split()]
            for name in names:
                if name not in captions_of:
                    hint = "remove it from the list, or complete the captions"
                    raise UserError(f"{path} lists {name}, which has no caption in {self.tokens}: {hint}.")
            images = [self._image({"filename": name}) for name in names]
            refuse_repeats(path, images)
            for image in images:
                captions = [caption._replace(image_id=image.id) for caption in captions_of[image.path.name]]
                listed.append((split, image, captions))
        # An image may be in two splits: eval.py refuses to test on training images.
        refuse_repeats(self.root, {image.path.name: image for _, image, _ in listed}.values())
        return listed

    def _captions(self):
        """Read the token file, {image name: captions}; a few names are not images, and no split lists them."""
        captions, lines = {}, {}
        for number, line in enumerate(_text(self.tokens).split("\n")):
            name, tab, text = line.partition("\t")
            if name in lines:
                both = f"lines {lines[name] + 1} and {number + 1} are both '{name}'"
                raise UserError(f"{self.tokens}: {both}: leave one of them out.")
            if tab and "#" in name:
                lines[name] = number
                captions.setdefault(name.rpartition("#")[0], []).append(Caption(number, 0, " ".join(text.split())))
            elif line.strip():
                form = "'name.jpg#0', a tab and a caption"
                raise UserError(f"{self.tokens}: line {number + 1} is not {form}: download the file again.")
        return captions

    def _image(self, entry):
        name = entry["filename"]
        photo = re.match(r"(\d+)[_.]", name)
        if not photo:
            raise UserError(f"the file name '{name}' in {self.root} does not begin with a Flickr photo id: fix it.")
        return Image(int(photo[1]), self._folder / name)

    @cached_property
    def _folder(self):
        return next((folder for folder in self.folders if folder.is_dir()), self.folders[0])


def _text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): download it again.") from None
