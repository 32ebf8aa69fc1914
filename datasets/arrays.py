"""Embeddings that were computed elsewhere, read from arrays by their names.

The names:

    image (N, D), text (M, D)   floats, as the model outputs them; normalized or not
    image_of_text (M,)          the row of `image` that each text describes; without it, row i describes row i
    image_id (N,)               ids of the images, or `coco_image_id` if they are COCO's; without them, row numbers
    caption (M,)                strings; without them, "text 0", "text 1", ...
    split (N,)                  strings, the split of each image, such as "train"; without it, fifths by chance
    match (P, 2)                rows of `image` and of `text`: each text is true of that image as well as of its own
    label (N,), class_of_text (M,), class_name (C,)   in place of image_of_text, for zero-shot classification: the class
                                numbers of images and of prompts, and the names of the classes
    human (N, C)                with these: shares, or counts, of people's answers

Rows are counted from 0; other names are ignored. The arrays are read from one .npz; one .safetensors, with `caption`,
`class_name` and `split` as JSON lists in its metadata; a folder with one .npy each; or a folder in clip-retrieval's
layout: img_emb/img_emb_0.npy, text_emb/text_emb_0.npy and metadata/metadata_0.parquet, which holds `caption`.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from scipy import sparse

from datasets import Caption, Classes, Image, Source, check_folds, check_splits, fold_splits
from datasets.embeddings import name_rows, stamp_of
from datasets.parts import Parts, choose
from utils.errors import UserError
from utils.files import UNREADABLE, is_name, reason

IDS = ("image_id", "coco_image_id")
STRINGS = ("caption", "class_name", "split")
KEYS = ("image", "text", "image_of_text", "match", *IDS, "label", "class_of_text", "human", *STRINGS)
BLOCK = 2**16  # rows that are read at once
ROUNDING = 1e-3  # largest rounding error relative to a row's norm: twice that of float16 in its normal range


class Arrays(Source):
    """Pairs of embeddings, split by image: by the array `split`, or at random, where `fold_splits` names the splits.

    root: the file or folder. folds: number of random parts. seed: of the parts. logit_scale: factor on the cosine that
    the model was trained with. Raises UserError if the file cannot be read or holds something else.
    """

    logit_bias = None

    def __init__(self, root, folds=5, seed=0, logit_scale=100.0):
        check_folds(folds, seed)
        if not 0 < logit_scale < np.inf:
            raise ValueError("logit_scale must be a positive number")
        self.file, self.logit_scale = Path(root), logit_scale
        arrays = self._read()
        self.image, self.text = (self._read_embeddings(arrays, key) for key in ("image", "text"))
        if self.image.shape[1] != self.text.shape[1]:
            sizes = f"rows of size {self.image.shape[1]}, but 'text' of size {self.text.shape[1]}"
            raise self._error(f"'image' has {sizes}: give embeddings of one model, after its projections.")
        images, texts = len(self.image), len(self.text)
        self.labeled = {"label", "class_of_text"} & arrays.keys()
        self.caption = self._read_column(arrays, "caption", "UO", "strings", texts)
        if self.labeled:
            self._read_classes(arrays, images, texts)
        else:
            self.image_of_text = self._read_image_of_text(arrays, images, texts)
        self.match = self._read_match(arrays, images, texts)
        self.ids = self._read_ids(arrays, images)
        names = self._read_column(arrays, "split", "U", "strings", images)
        self.splits = fold_splits(images, folds, seed, self.file) if names is None else self._named(names)
        content = hashlib.sha256()
        for array in (self.image, self.text):
            for start in range(0, len(array), BLOCK):
                content.update(array[start : start + BLOCK])
        self.version = f"{content.hexdigest()} {logit_scale}"
        self.space = "coco" if "coco_image_id" in arrays and "image_id" not in arrays else f"embeddings {self.version}"

    def images(self, split):
        """List the images of `split`, by row; raises UserError for an unknown split."""
        return [Image(id) for id in self.ids[self._rows(split)[0]].tolist()]

    def captions(self, split):
        """List the captions of `split` by image and row, or all prompts; ids are rows. Raises what `images` raises."""
        rows = self._rows(split)[1]
        texts = [f"text {row}" for row in rows] if self.caption is None else self.caption[rows].tolist()
        image_ids = self.class_of_text[rows] if self.labeled else self.ids[self.image_of_text[rows]]
        return [Caption(*item) for item in zip(rows.tolist(), image_ids.tolist(), texts)]

    def classes(self, split):
        """Return the classes of the images of `split`, or None; raises what `images` raises."""
        if not self.labeled:
            return None
        rows = self._rows(split)[0]
        return Classes(self.names, [], self.label[rows], None if self.human is None else self.human[rows])

    def matches(self, split):
        """Return which images each caption of `split` is true of, sparse (N, M); None where `match` is not given."""
        if self.match is None:
            return None
        images, texts = self._rows(split)
        return self.match[images][:, texts]

    def id_space(self, split):
        return self.space

    def embeddings(self, split):
        """Return the float16 embeddings of what `images` and `captions` list."""
        images, texts = self._rows(split)
        return choose(self.image, images), choose(self.text, texts)

    def _rows(self, split):
        """Return the rows of the images and of the texts of `split`."""
        try:
            in_split = self.splits[split]
        except KeyError:
            raise UserError(f"{self.file} has no split '{split}'; it has {', '.join(self.splits)}.") from None
        if self.labeled:
            return np.flatnonzero(in_split), np.arange(len(self.text))
        by_image = np.argsort(self.image_of_text, kind="stable")
        return np.flatnonzero(in_split), by_image[in_split[self.image_of_text[by_image]]]

    def _named(self, names):
        """The splits that an array of names makes of the images, and all of them: {split: mask (N,)}."""
        if not all(map(is_name, names.tolist())):
            row = next(row for row, name in enumerate(names.tolist()) if not is_name(name))
            raise self._error(f"row {row} of 'split' is {str(names[row])!r}, but a split names a folder: rename it.")
        check_splits(np.unique(names).tolist(), f"'split' of {self.file}")
        return {"all": np.full(len(names), True)} | {str(name): names == name for name in np.unique(names)}

    def _read_match(self, arrays, images, texts):
        """Read which images each text is true of, its own included: sparse (N, M), or None if `match` is absent."""
        pairs = arrays.get("match")
        if pairs is None:
            return None
        if self.labeled:
            raise self._error("'match' is of captions, but 'label' says that these are classes: leave one out.")
        if pairs.dtype.kind not in "iu" or pairs.ndim != 2 or pairs.shape[1] != 2:
            actual = f"not {pairs.dtype} of shape {pairs.shape}"
            raise self._error(f"'match' must hold rows of 'image' and of 'text', integers of shape (P, 2), {actual}.")
        wrong = ((pairs < 0) | (pairs >= [images, texts])).any(axis=1)
        if wrong.any():
            row = wrong.argmax()
            sizes = f"'image' has {images} rows and 'text' {texts}"
            raise self._error(f"row {row} of 'match' is {pairs[row].tolist()}, but {sizes}: count both from 0.")
        rows = np.concatenate([pairs.astype(np.int64), np.stack([self.image_of_text, np.arange(texts)], axis=1)])
        return sparse.csc_array((np.full(len(rows), True), tuple(rows.T)), shape=(images, texts))

    def _error(self, message):
        return UserError(f"{self.file}: {message}")

    def _read(self):
        if not self.file.exists():
            hint = "point --root to an .npz, a .safetensors or a folder of .npy"
            raise UserError(f"the embeddings {self.file} are missing: {hint}.")
        if self.file.is_dir():
            return _read_clip_retrieval(self.file) or _read_folder(self.file)
        if self.file.suffix == ".npy":
            raise self._error("it is a single array: point --root to the folder that holds image.npy and text.npy.")
        return (_read_safetensors if self.file.suffix == ".safetensors" else _read_npz)(self.file)

    def _read_classes(self, arrays, images, texts):
        """Read the classes of images and prompts, and their names."""
        for key in ("label", "class_of_text"):
            if key not in arrays:
                raise self._error(f"'{key}' is missing: give both 'label' and 'class_of_text', or neither.")
        self.label = self._read_column(arrays, "label", "iu", "integers", images).astype(np.int64)
        self.class_of_text = self._read_column(arrays, "class_of_text", "iu", "integers", texts).astype(np.int64)
        numbers = np.unique(self.class_of_text)
        classes = len(numbers)
        if (numbers != np.arange(classes)).any():
            raise self._error("'class_of_text' must hold every class number from 0: number the classes without a gap.")
        wrong = (self.label < 0) | (self.label >= classes)
        if wrong.any():
            row, hint = wrong.argmax(), "number the classes as in 'class_of_text'"
            raise self._error(f"row {row} of 'label' is {self.label[row]}, a class without a text: {hint}.")
        names = self._read_column(arrays, "class_name", "U", "strings", classes)
        self.names = [f"class {number}" for number in range(classes)] if names is None else names.tolist()
        self.human = arrays.get("human")
        if self.human is not None:
            if self.human.dtype.kind not in "iuf" or self.human.shape != (images, classes):
                actual = f"not {self.human.dtype} of shape {self.human.shape}"
                raise self._error(f"'human' must hold numbers of shape ({images}, {classes}), {actual}.")
            total = self.human.sum(axis=1, keepdims=True, dtype=np.float64)
            wrong = ~((self.human >= 0).all(axis=1) & (total[:, 0] > 0) & np.isfinite(total[:, 0]))
            if wrong.any():
                hint = "give the shares, or the counts, of people's answers"
                raise self._error(f"row {wrong.argmax()} of 'human' is negative, not finite or all zeros: {hint}.")
            self.human = self.human / total

    def _read_embeddings(self, arrays, key):
        """Read embeddings (rows, D) as the float16 of the cache."""
        if key not in arrays:
            raise self._error(f"it has no key '{key}': name the embeddings 'image' and 'text'.")
        array = arrays[key]
        faults, in_parts = [], isinstance(array, Parts)
        for number in range(len(array.parts) if in_parts else 1):
            part, name = (array.opened(number), array.parts[number].name) if in_parts else (array, f"'{key}'")
            if part.ndim != 2 or part.dtype.kind != "f" or not part.size:
                actual = f"not {part.dtype} of shape {part.shape}"
                raise self._error(f"{name} must hold one embedding per row, floats of shape (rows, D), {actual}.")
            if part.shape[1] != array.shape[1]:
                sizes = f"rows of size {part.shape[1]}, the first part of {array.shape[1]}"
                raise self._error(f"{name} has {sizes}: give embeddings of one model.")
            faults += [_faults(part[start : start + BLOCK]) for start in range(0, len(part), BLOCK)]
        faults = [np.concatenate(of_kind) for of_kind in zip(*faults, strict=True)]
        again = "encode these items again, or leave them out"
        is_half = part.dtype == np.float16
        widely = f"{again}; float16 ends at 65,504, so encode in float32" if is_half else again
        scale = "multiply all rows by one number, which changes no cosine"
        problems = (
            ("NaN", again),
            ("infinity", widely),
            ("nothing but zeros", again),
            ("numbers too large for float16, whose maximum is 65,504,", scale),
            ("numbers too small for float16, whose smallest step is 6e-8,", scale),
        )
        for wrong, (problem, hint) in zip(faults, problems, strict=True):
            if wrong.any():
                rows = name_rows(np.flatnonzero(wrong))
                raise self._error(f"'{key}' holds {problem} in {rows} of {len(array):,}: {hint}.")
        return array if in_parts else array.astype(np.float16, order="C")

    def _read_column(self, arrays, key, kinds, values, length):
        """Read one value per row, or None if the key is absent; kinds: NumPy's letters for the types allowed."""
        array = arrays.get(key)
        if array is not None and (array.dtype.kind not in kinds or array.shape != (length,)):
            actual = f"not {array.dtype} of shape {array.shape}"
            raise self._error(f"'{key}' must hold {values} of shape ({length},), {actual}: fix it, or leave it out.")
        return array

    def _read_image_of_text(self, arrays, images, texts):
        rows = self._read_column(arrays, "image_of_text", "iu", "integers", texts)
        if rows is None:
            if images != texts:
                hint = "add 'image_of_text', the row of 'image' that each text describes"
                raise self._error(f"'image' has {images} rows and 'text' {texts}: {hint}.")
            return np.arange(texts)
        outside = (rows < 0) | (rows >= images)
        if outside.any():
            row, hint = outside.argmax(), f"count the rows of 'image' from 0 to {images - 1}"
            raise self._error(f"row {row} of 'image_of_text' is {rows[row]}, which is not a row of 'image': {hint}.")
        return rows.astype(np.int64)

    def _read_ids(self, arrays, images):
        key = next((key for key in IDS if key in arrays), "image_id")
        ids = self._read_column(arrays, key, "iu", "integers", images)
        if ids is None:
            return np.arange(images)
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        first_row = first[inverse]  # at which each id occurs first
        repeated = first_row != np.arange(images)
        if repeated.any():
            row = repeated.argmax()
            hint = "give each image one row, and assign its texts to it with 'image_of_text'"
            raise self._error(f"rows {first_row[row]} and {row} of '{key}' are both {ids[row]}: {hint}.")
        return ids


def _faults(block):
    """Rows (n,) of embeddings (n, D) with NaN, with infinity, of zeros, too large and too small for float16."""
    with np.errstate(all="ignore"):  # overflow is one of them
        half = block.astype(np.float16)
        lost = np.linalg.norm(half - block, axis=1) > ROUNDING * np.linalg.norm(block, axis=1)
    nan, finite, finite_half = np.isnan(block), np.isfinite(block), np.isfinite(half)
    return nan.any(axis=1), ~finite.all(axis=1), ~block.any(axis=1), ~finite_half.all(axis=1), lost


def _read_npz(file):
    key = ""
    try:
        with np.load(file, allow_pickle=False) as npz:
            arrays = {}
            for key in KEYS:
                if key in npz:
                    arrays[key] = npz[key]
                    if not isinstance(arrays[key], np.ndarray):  # NumPy gives the bytes of what is no .npy
                        raise ValueError(f"'{key}' is not an .npy")
            return arrays
    except UNREADABLE as error:  # an .npy by the name of .npz opens as an array
        message = reason(error, file)
        if "Object arrays" in message:
            hint = "store plain values, strings with numpy.array(..., dtype=str)"
            raise UserError(f"{file}: '{key}' is an array of Python objects: {hint}.") from None
        raise UserError(f"{file}: it is not an .npz of plain arrays ({message}): write it with numpy.savez.") from None


def _read_safetensors(file):
    try:
        tensors = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        # NumPy has no bfloat16.
        arrays = {key: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for key, t in tensors.items()}
        strings = {key: np.array(json.loads(metadata[key]), dtype=str) for key in STRINGS if key in metadata}
        return {key: arrays[key] for key in KEYS if key in arrays} | strings
    except (*UNREADABLE, safetensors.SafetensorError) as error:
        message = reason(error, file)
        raise UserError(f"{file}: it is not a .safetensors of plain arrays ({message}): write it again.") from None


def _load(path, mode=None):
    """Read one .npy; mode: "r" to open it as a memory map."""
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(f"{path} is not an .npy of plain numbers ({reason(error, path)}): write it again.") from None


def _read_folder(folder):
    return {key: _load(folder / f"{key}.npy") for key in KEYS if (folder / f"{key}.npy").is_file()}


def _read_clip_retrieval(folder):
    """Open what `clip-retrieval inference` writes, where it is; returns {} if the folder has another layout.

    Parts without rows are left out.
    """
    image_files = _numbered(folder, "img_emb", ".npy")
    text_files, metadata_files = _numbered(folder, "text_emb", ".npy"), _numbered(folder, "metadata", ".parquet")
    files, stamps = {"image": [], "text": []}, {"image": [], "text": []}
    captions, counts = [], []
    for number, image in sorted(image_files.items()):
        if number not in text_files:
            raise UserError(f"{folder}: {image.name} has no text_emb_{number}.npy beside it: embed the captions, too.")
        part = {"image": image.absolute(), "text": text_files[number].absolute()}
        stamp = {side: stamp_of(path) for side, path in part.items()}  # a change while they are read is noticed later
        named = [_captions(metadata_files[number])] if number in metadata_files else []
        lengths = {len(_load(path, "r")) for path in part.values()} | {len(of_part) for of_part in named}
        if len(lengths) > 1:
            raise UserError(
                f"{folder}: part {number} has {' and '.join(map(str, sorted(lengths)))} rows: embed it again."
            )
        if lengths == {0}:
            continue
        for side, path in part.items():
            files[side].append(path)
            stamps[side].append(stamp[side])
        captions += named
        counts += lengths
    if len(captions) not in (0, len(counts)):
        raise UserError(f"{folder}: some parts have a metadata_*.parquet and some have none: complete them.")
    if not image_files:
        return {}
    if not counts:
        raise UserError(f"{folder}: its parts have no rows: embed them again.")
    arrays = {side: Parts(paths, counts, stamps=stamps[side]) for side, paths in files.items()}
    return arrays | ({"caption": np.concatenate(captions)} if captions else {})


def _numbered(folder, name, suffix):
    """List the parts of one kind, in `folder` or its folder `name`, as {number: file}."""
    files = [*folder.glob(f"{name}_*{suffix}"), *(folder / name).glob(f"{name}_*{suffix}")]
    return {int(file.stem.rsplit("_", 1)[1]): file for file in files if re.fullmatch(rf"{name}_\d+", file.stem)}


def _captions(file):
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} is read with pyarrow: run `pip install -r requirements-extra.txt`.") from None
    try:
        table = parquet.read_table(file)
        named = table["caption"].to_pylist() if "caption" in table.column_names else None
    except Exception as error:  # pyarrow has errors of its own
        message = " ".join(str(error).split())
        raise UserError(f"{file} is not a Parquet file ({message}): write it again.") from None
    if named is None:
        captions = [f"text {row} of {file.name}" for row in range(len(table))]
    else:
        captions = [str(caption or "") for caption in named]
    return np.array(captions, dtype=object)  # as strings of one length they would take the memory of the longest
