"""Embeddings that were computed elsewhere, as arrays by these names:

    image (N, D), text (M, D)   floats, as the model gives them; normalized or not
    image_of_text (M,)          the row of `image` that each text describes; without it, row i describes row i
    image_id (N,)               ids of the images, or `coco_image_id`, known as COCO's; without them, their rows
    caption (M,)                strings; without them, "text 0", "text 1", ...
    label (N,), class_of_text (M,), class_name (C,)   in place of image_of_text, for zero-shot classification: the class
                                numbers of images and of prompts, and what the classes are called

Rows are counted from 0; other names are not read. They lie in one .npz; in one .safetensors, with `caption` and
`class_name` as JSON lists in its metadata; in a folder, one .npy each; or in a folder as clip-retrieval writes it:
img_emb/img_emb_0.npy, text_emb/text_emb_0.npy and metadata/metadata_0.parquet, from which `caption` is read.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from datasets import Caption, Classes, Image, Source, check_folds, fold_splits
from datasets.embeddings import UNREADABLE
from utils.errors import UserError

IDS = ("image_id", "coco_image_id")
STRINGS = ("caption", "class_name")
KEYS = ("image", "text", "image_of_text", *IDS, "label", "class_of_text", *STRINGS)
ROUNDING = 1e-3  # of a row's length, twice what float16 does to numbers in its normal range


class Arrays(Source):
    """Pairs of embeddings, split by image: `test0`, ... are random parts, `train0`, ... the other images; `all` is all.

    root: the file or folder. folds: how many parts. seed: of the parts. logit_scale: factor on the cosine that the
    model was trained with. Raises UserError where the file cannot be read or holds something else.
    """

    logit_bias = None

    def __init__(self, root, folds=5, seed=0, logit_scale=100.0):
        check_folds(folds, seed)
        if not 0 < logit_scale < np.inf:
            raise ValueError("logit_scale must be a number above 0")
        self.file, self.logit_scale = Path(root), logit_scale
        arrays = self._read()
        self.image, self.text = (self._rows(arrays, key) for key in ("image", "text"))
        if self.image.shape[1] != self.text.shape[1]:
            sizes = f"size {self.image.shape[1]}, but those of 'text' {self.text.shape[1]}"
            raise self._error(f"the rows of 'image' have {sizes}: give embeddings of one model, after its projections.")
        images, texts = len(self.image), len(self.text)
        self.labeled = {"label", "class_of_text"} & arrays.keys()
        self.said = self._column(arrays, "caption", "U", "strings", texts)
        if self.labeled:
            self._read_classes(arrays, images, texts)
        else:
            self.image_of_text = self._image_of_text(arrays, images, texts)
        self.ids = self._ids(arrays, images)
        self.splits = fold_splits(images, folds, seed, self.file)
        content = hashlib.sha256(self.image)
        content.update(self.text)
        self.version = f"{content.hexdigest()} {logit_scale}"
        self.space = "coco" if "coco_image_id" in arrays and "image_id" not in arrays else f"embeddings {self.version}"

    def images(self, split):
        """List the images of `split`, by row; raises UserError for an unknown split."""
        return [Image(id) for id in self.ids[self._chosen(split)[0]].tolist()]

    def captions(self, split):
        """List the captions of `split`, by image and row, or all prompts, with their rows as ids; raises alike."""
        rows = self._chosen(split)[1]
        said = [f"text {row}" for row in rows] if self.said is None else self.said[rows].tolist()
        owner = self.class_of_text[rows] if self.labeled else self.ids[self.image_of_text[rows]]
        return [Caption(*item) for item in zip(rows.tolist(), owner.tolist(), said)]

    def classes(self, split):
        """Give the classes of the images of `split`, where there are any; raises what `images` raises."""
        return Classes(self.names, [], self.label[self._chosen(split)[0]]) if self.labeled else None

    def id_space(self, split):
        return self.space

    def embeddings(self, split):
        """Give the float16 embeddings of what `images` and `captions` list."""
        images, texts = self._chosen(split)
        return self.image[images], self.text[texts]

    def _chosen(self, split):
        """Rows of the images and of the texts of `split`."""
        if split not in self.splits:
            raise UserError(f"{self.file} has no split '{split}'; it has {', '.join(self.splits)}.")
        chosen = self.splits[split]
        if self.labeled:
            return np.flatnonzero(chosen), np.arange(len(self.text))
        by_image = np.argsort(self.image_of_text, kind="stable")
        return np.flatnonzero(chosen), by_image[chosen[self.image_of_text[by_image]]]

    def _error(self, said):
        return UserError(f"{self.file}: {said}")

    def _read(self):
        if not self.file.exists():
            way = "name an .npz, a .safetensors or a folder of .npy with --root"
            raise UserError(f"the embeddings {self.file} are missing: {way}.")
        if self.file.is_dir():
            return _read_clip_retrieval(self.file) or _read_folder(self.file)
        if self.file.suffix == ".npy":
            raise self._error("it is one array of several: name the folder that holds image.npy and text.npy.")
        return (_read_safetensors if self.file.suffix == ".safetensors" else _read_npz)(self.file)

    def _read_classes(self, arrays, images, texts):
        """Read what the images are and what the prompts are about."""
        for key in ("label", "class_of_text"):
            if key not in arrays:
                raise self._error(f"it has only one of 'label' and 'class_of_text': '{key}' is missing.")
        self.label = self._column(arrays, "label", "iu", "whole numbers", images).astype(np.int64)
        self.class_of_text = self._column(arrays, "class_of_text", "iu", "whole numbers", texts).astype(np.int64)
        classes = int(self.class_of_text.max()) + 1
        without = set(range(classes)) - set(self.class_of_text.tolist())
        if without or self.class_of_text.min() < 0:
            raise self._error("'class_of_text' must name every class from 0 on: number the classes without a gap.")
        wrong = (self.label < 0) | (self.label >= classes)
        if wrong.any():
            said = f"row {wrong.argmax()} of 'label' is {self.label[wrong.argmax()]}, a class without a text"
            raise self._error(f"{said}: give one for each of the classes.")
        names = self._column(arrays, "class_name", "U", "strings", classes)
        self.names = [f"class {number}" for number in range(classes)] if names is None else names.tolist()

    def _rows(self, arrays, key):
        """Read embeddings as the float16 of the cache, (rows, D)."""
        if key not in arrays:
            raise self._error(f"it has no key '{key}': name the embeddings 'image' and 'text'.")
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


def _read_npz(file):
    key = ""
    try:
        with np.load(file, allow_pickle=False) as given:
            arrays = {}
            for key in KEYS:
                if key in given:
                    arrays[key] = given[key]
            return arrays
    except (*UNREADABLE, AttributeError, NotImplementedError) as error:  # an .npy opens, as something else
        said = " ".join(str(error).split())
        if "Object arrays" in said:
            way = "make it plain, strings with numpy.array(..., dtype=str)"
            raise UserError(f"{file}: '{key}' is an array of Python objects: {way}.") from None
        raise UserError(f"{file}: it is no .npz of plain arrays ({said}): write it with numpy.savez.") from None


def _read_safetensors(file):
    try:
        tensors = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            said = opened.metadata() or {}
        # NumPy has no bfloat16.
        arrays = {key: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for key, t in tensors.items()}
        return {key: arrays[key] for key in KEYS if key in arrays} | {
            key: np.array(json.loads(said[key]), dtype=str) for key in STRINGS if key in said
        }
    except (*UNREADABLE, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: it is no .safetensors of plain arrays ({' '.join(str(error).split())}).") from None


def _load(path):
    """Read one .npy."""
    try:
        return np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(
            f"{path} is no .npy of plain numbers ({' '.join(str(error).split())}): write it again."
        ) from None


def _read_folder(folder):
    return {key: _load(folder / f"{key}.npy") for key in KEYS if (folder / f"{key}.npy").is_file()}


def _read_clip_retrieval(folder):
    """Read what `clip-retrieval inference` writes, part by part; nothing where the folder is none of its."""
    parts = {
        int(re.findall(r"\d+", path.stem)[-1]): path
        for where in (folder, folder / "img_emb")
        for path in where.glob("img_emb_*.npy")
        if re.search(r"\d+$", path.stem)
    }
    arrays = {"image": [], "text": [], "caption": []}
    for number in sorted(parts):
        image = parts[number]
        text, about = (
            next((path for where in (folder, folder / kind) for path in where.glob(f"{name}_*{suffix}")
                  if re.fullmatch(rf"{name}_0*{number}", path.stem)), None)
            for kind, name, suffix in (("text_emb", "text_emb", ".npy"), ("metadata", "metadata", ".parquet"))
        )  # fmt: skip
        if text is None:
            raise UserError(f"{folder}: {image.name} has no text_emb_{number}.npy beside it: embed the captions, too.")
        arrays["image"].append(_load(image))
        arrays["text"].append(_load(text))
        if about is not None:
            arrays["caption"].append(_captions(about))
        lengths = {len(rows[-1]) for rows in arrays.values() if rows}
        if len(lengths) > 1:
            raise UserError(
                f"{folder}: part {number} has {' and '.join(map(str, sorted(lengths)))} rows: embed it again."
            )
    if len(arrays["caption"]) not in (0, len(parts)):
        raise UserError(f"{folder}: some parts have a metadata_*.parquet and some have none: complete them.")
    return {key: np.concatenate(rows) for key, rows in arrays.items() if rows}


def _captions(file):
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow: `pip install -r requirements-extra.txt`.") from None
    try:
        table = parquet.read_table(file)
    except Exception as error:  # pyarrow has errors of its own
        raise UserError(f"{file} is no Parquet file ({' '.join(str(error).split())}): write it again.") from None
    if "caption" not in table.column_names:
        return np.array([f"text {row} of {file.name}" for row in range(len(table))])
    return np.array([str(caption or "") for caption in table["caption"].to_pylist()])
