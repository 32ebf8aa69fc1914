"""Embeddings that were computed elsewhere, in one .npz:

    image (N, D), text (M, D)   floats, as the model gives them; normalized or not
    image_of_text (M,)          the row of `image` that each text describes; without it, row i describes row i
    image_id (N,)               ids of the images, also as `coco_image_id`; without them, their rows
    caption (M,)                strings; without them, "text 0", "text 1", ...

Rows are counted from 0; other keys are not read.
"""

import hashlib
from pathlib import Path

import numpy as np

from datasets import Caption, Image, Source
from datasets.embeddings import UNREADABLE
from utils.errors import UserError

IDS = ("image_id", "coco_image_id")
KEYS = ("image", "text", "image_of_text", *IDS, "caption")
ROUNDING = 1e-3  # of a row's length, twice what float16 does to numbers in its normal range


class Arrays(Source):
    """Pairs of embeddings, split by image: `test0`, ... are random parts, `train0`, ... the other images; `all` is all.

    root: the file. folds: how many parts. seed: of the parts. logit_scale: factor on the cosine that the model was
    trained with. Raises UserError where the file cannot be read or holds something else.
    """

    logit_bias = None

    def __init__(self, root, folds=5, seed=0, logit_scale=100.0):
        if not (isinstance(folds, int) and folds >= 2 and seed >= 0 and 0 < logit_scale < np.inf):
            raise ValueError("folds must be a whole number from 2 on, seed one from 0 on, logit_scale above 0")
        self.file, self.logit_scale = Path(root), logit_scale
        arrays = self._read()
        self.image, self.text = (self._rows(arrays, key) for key in ("image", "text"))
        if self.image.shape[1] != self.text.shape[1]:
            sizes = f"size {self.image.shape[1]}, but those of 'text' {self.text.shape[1]}"
            raise self._error(f"the rows of 'image' have {sizes}: give embeddings of one model, after its projections.")
        images, texts = len(self.image), len(self.text)
        self.image_of_text = self._image_of_text(arrays, images, texts)
        self.ids = self._ids(arrays, images)
        self.said = self._column(arrays, "caption", "U", "strings", texts)
        if images < folds:
            way = "give more images, or fewer parts with --set data.options.folds=2."
            raise self._error(f"'image' has {images} rows, too few for {folds} parts: {way}")
        fold = np.empty(images, dtype=np.int64)
        for number, rows in enumerate(np.array_split(np.random.default_rng(seed).permutation(images), folds)):
            fold[rows] = number
        self.splits = {"all": np.full(images, True)}
        self.splits |= {f"train{number}": fold != number for number in range(folds)}
        self.splits |= {f"test{number}": fold == number for number in range(folds)}
        content = hashlib.sha256(self.image)
        content.update(self.text)
        self.version = f"{content.hexdigest()} {logit_scale}"

    def images(self, split):
        """List the images of `split`, by row; raises UserError for an unknown split."""
        return [Image(id) for id in self.ids[self._chosen(split)[0]].tolist()]

    def captions(self, split):
        """List the captions of `split`, by image and row, with their rows as ids; raises what `images` raises."""
        rows = self._chosen(split)[1]
        said = [f"text {row}" for row in rows] if self.said is None else self.said[rows].tolist()
        described = self.ids[self.image_of_text[rows]]
        return [Caption(*item) for item in zip(rows.tolist(), described.tolist(), said)]

    def embeddings(self, split):
        """Give the float16 embeddings of what `images` and `captions` list."""
        images, texts = self._chosen(split)
        return self.image[images], self.text[texts]

    def _chosen(self, split):
        """Rows of the images and of the texts of `split`."""
        if split not in self.splits:
            raise UserError(f"{self.file} has no split '{split}'; it has {', '.join(self.splits)}.")
        chosen, by_image = self.splits[split], np.argsort(self.image_of_text, kind="stable")
        return np.flatnonzero(chosen), by_image[chosen[self.image_of_text[by_image]]]

    def _error(self, said):
        return UserError(f"{self.file}: {said}")

    def _read(self):
        if not self.file.is_file():
            raise UserError(f"the file of embeddings {self.file} is missing: name an .npz with --root.")
        try:
            with np.load(self.file, allow_pickle=False) as file:
                return {key: file[key] for key in KEYS if key in file}
        except (*UNREADABLE, AttributeError, NotImplementedError) as error:  # an .npy opens, as something else
            said = " ".join(str(error).split())
            raise self._error(f"it is no .npz of plain arrays ({said}): write it with numpy.savez.") from None

    def _rows(self, arrays, key):
        """Read embeddings as the float16 of the cache, (rows, D)."""
        if key not in arrays:
            raise self._error(f"it has no key '{key}': name the embeddings 'image' and 'text' in numpy.savez.")
        array = arrays[key]
        if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
            shape = f"not {array.dtype} of the shape {array.shape}"
            raise self._error(f"'{key}' must hold one embedding per row, floats of the shape (rows, D), {shape}.")
        with np.errstate(all="ignore"):  # what overflows is told of below
            half = array.astype(np.float16, order="C")
            lost = np.linalg.norm(half - array, axis=1) > ROUNDING * np.linalg.norm(array, axis=1)
        scale = "multiply all rows by one number, which changes no cosine"
        for wrong, what in (
            (~np.isfinite(array).all(axis=1), "is not finite: encode that item again, or leave it out"),
            (~array.any(axis=1), "is all zeros: encode that item again, or leave it out"),
            (~np.isfinite(half).all(axis=1), f"is too large for float16, which ends at 65,504: {scale}"),
            (lost, f"is too small for float16, which has steps of 6e-8: {scale}"),
        ):
            if wrong.any():
                raise self._error(f"row {wrong.argmax()} of '{key}' {what}.")
        return half

    def _column(self, arrays, key, kind, what, length):
        """Read one value per row, or None where the key is absent."""
        array = arrays.get(key)
        if array is not None and (array.dtype.kind not in kind or array.shape != (length,)):
            found = f"not {array.dtype} of the shape {array.shape}"
            raise self._error(f"'{key}' must hold {what} of the shape ({length},), {found}: mend it, or leave it out.")
        return array

    def _image_of_text(self, arrays, images, texts):
        rows = self._column(arrays, "image_of_text", "iu", "whole numbers", texts)
        if rows is None:
            if images != texts:
                way = "say with 'image_of_text' which row of 'image' each text describes"
                raise self._error(f"'image' has {images} rows and 'text' {texts}: {way}.")
            return np.arange(texts)
        outside = (rows < 0) | (rows >= images)
        if outside.any():
            row, way = outside.argmax(), f"rows of 'image' are counted from 0 to {images - 1}"
            raise self._error(f"row {row} of 'image_of_text' is {rows[row]}, which is no row of 'image': {way}.")
        return rows.astype(np.int64)

    def _ids(self, arrays, images):
        key = next((key for key in IDS if key in arrays), "image_id")
        ids = self._column(arrays, key, "iu", "whole numbers", images)
        if ids is None:
            return np.arange(images)
        _, first, which = np.unique(ids, return_index=True, return_inverse=True)
        repeated = first[which] != np.arange(images)
        if repeated.any():
            row = repeated.argmax()
            way = "give each image one row, and say with 'image_of_text' which texts are its own"
            raise self._error(f"rows {first[which[row]]} and {row} of '{key}' are both {ids[row]}: {way}.")
        return ids
