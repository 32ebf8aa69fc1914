"""Your own pairs in one table, a row per caption: .csv, .tsv, .jsonl (an object per line) or .parquet.

The columns:

    image     a file's path, relative to the table's folder (or `image_root`); rows of one image are its captions
    caption   text
    split     optional: train, test, ...; without it images are split at random

Other columns are ignored. Rows are counted from 0.
"""

import codecs
import csv
import io
import itertools
import json
import os
from functools import lru_cache
from pathlib import Path

from datasets import Caption, Described, Image, check_folds, fold_splits, name_id
from utils.errors import UserError

# Default names of the columns.
COLUMNS = {
    "image": ("image", "image_path", "filepath", "path", "file_name"),
    "caption": ("caption", "text", "title"),
    "split": ("split",),
}


class PairsFile(Described):
    """Pairs listed in a table; images in the order in which they first occur.

    root: the file. image_root: the folder that paths are relative to, by default that of the file. image_column,
    caption_column, split_column: by default the first of COLUMNS that the file has. folds, seed: see `fold_splits`,
    which splits the images if there is no column of splits.
    """

    def __init__(self, root, image_root="", image_column="", caption_column="", split_column="", folds=5, seed=0):
        check_folds(folds, seed)
        self.file, self.folds, self.seed = Path(root), folds, seed
        self.folder = Path(image_root or self.file.parent).resolve()
        self.columns = {"image": image_column, "caption": caption_column, "split": split_column}

    def id_space(self, split):
        """Return "files": an id is a hash of the path, as two tables can list the same file."""
        return "files"

    def pairs(self, split):
        """List images with their captions, whose ids are rows; raises UserError if the file cannot be read."""
        splits = self._read()
        if split not in splits:
            hint = "choose one with --splits here, --set data.train_split=NAME in train.py and --split in eval.py"
            raise self._error(f"it has no split '{split}'; it has {', '.join(splits)}: {hint}.")
        return splits[split]

    def _error(self, message):
        return UserError(f"{self.file}: {message}")

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self):
        """Read the table as {split: [(image, captions)]}."""
        names, rows = self._open()
        image_column, caption_column, split_column = (self._column(names, kind) for kind in COLUMNS)
        images, described = {}, {}
        for number, (where, row) in enumerate(rows):
            for column in filter(None, (image_column, caption_column, split_column)):
                if not isinstance(row.get(column), str):
                    actual = "null or missing" if row.get(column) is None else f"not a string but {row[column]!r:.40}"
                    raise self._error(f"'{column}' of {where} is {actual}: fix the row, or remove it.")
            image, text = row[image_column].strip(), row[caption_column]
            split = row[split_column].strip() if split_column else ""
            if not image:
                raise self._error(f"'{image_column}' of {where} is empty: fix the row.")
            if split_column and not split:
                raise self._error(f"'{split_column}' of {where} is empty: fix the row.")
            if image not in images:
                images[image] = self._image(image, where)
            pairs = described.setdefault(split, {})
            caption = Caption(number, images[image].id, " ".join(text.split()))
            pairs.setdefault(images[image].id, (images[image], []))[1].append(caption)
        if not images:
            raise self._error("it holds no pairs: write a row per caption.")
        splits = {split: list(pairs.values()) for split, pairs in described.items()}
        if split_column:
            return splits
        pairs = splits[""]
        masks = fold_splits(len(pairs), self.folds, self.seed, self.file)
        return {split: list(itertools.compress(pairs, mask)) for split, mask in masks.items()}

    def _image(self, name, where):
        """Make an image of a path; one file has one id, however its path is spelled."""
        if "://" in name:
            raise self._error(f"the image of {where} is a URL, {name}: download it, and give the path of its file.")
        path = Path(os.path.normpath(self.folder / name))
        return Image(name_id(path.as_posix()), path)

    def _column(self, names, kind):
        """Return the file's name of a column, or None; raises UserError without one, except for the split."""
        option = self.columns[kind]
        candidates = [option] if option else COLUMNS[kind]
        column = next((name for name in candidates if name in names), None)
        if column is None and (option or kind != "split"):
            hint = f"choose one with --set data.options.{kind}_column=NAME"
            if len(names) == 1 and ";" in names[0]:
                hint = "separate the columns by commas, or by tabs in a .tsv"
            wanted = " or ".join(f"'{name}'" for name in candidates)
            raise self._error(f"it has no column {wanted}; it has {', '.join(names):.200}: {hint}.")
        return column

    def _open(self):
        """Open the table: returns the column names, and an iterator of ("line 2" or "row 0", {column: value})."""
        formats = {
            ".csv": lambda: self._csv(","),
            ".tsv": lambda: self._csv("\t"),
            ".jsonl": self._jsonl,
            ".parquet": self._parquet,
        }
        if self.file.is_dir():
            raise self._error("it is a folder: point --root to the file of pairs itself.")
        if self.file.suffix.lower() not in formats:
            raise self._error(f"its name must end in {', '.join(formats)}, which tells its format.")
        if not self.file.is_file():
            raise self._error(f"it is missing: {self.get or 'point --root to the file of pairs'}.")
        return formats[self.file.suffix.lower()]()

    def _text(self):
        data = self.file.read_bytes().removeprefix(codecs.BOM_UTF8)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self._error(
                f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8."
            ) from None
        if not text.strip():
            raise self._error("it is empty: write a row per caption.")
        return text

    def _csv(self, delimiter):
        csv.field_size_limit(2**31 - 1)  # the default refuses captions of 10,000 words and more
        # Strict, because an unclosed quote would otherwise turn the following rows into one caption.
        reader = csv.reader(io.StringIO(self._text(), newline=""), delimiter=delimiter, strict=True)

        def lines():
            width = 0
            try:
                for row in filter(None, reader):
                    width = width or len(row)
                    if len(row) != width:
                        hint = f"put captions with a {'comma' if delimiter == ',' else 'tab'} in quotes"
                        raise self._error(
                            f"line {reader.line_num} has {len(row)} fields, but the header has {width}: {hint}."
                        )
                    yield f"line {reader.line_num}", row
            except csv.Error as error:
                hint = 'put fields that contain quotes in quotes, and double those inside ("say ""this""")'
                raise self._error(f"line {reader.line_num} cannot be read ({error}): {hint}.") from None

        rows = lines()
        header = [name.strip() for name in next(rows)[1]]
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise self._error(f"it has two columns '{repeated[0]}': write a row per caption, and each column once.")
        return header, ((where, dict(zip(header, row))) for where, row in rows)

    def _jsonl(self):
        rows = []
        for number, line in enumerate(self._text().split("\n"), start=1):  # captions may hold other line ends
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self._error(f"line {number} is not valid JSON ({error}): fix the line.") from None
                if not isinstance(row, dict):
                    raise self._error(f"line {number} is not an object: write one per line, with the columns as keys.")
                rows.append((f"line {number}", row))
        return list(dict.fromkeys(name for _, row in rows for name in row)), rows

    def _parquet(self):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            hint = "run `pip install -r requirements-extra.txt`, or save the table as .csv"
            raise self._error(f"Parquet files are read with pyarrow, which is not installed: {hint}.") from None
        errors = (pyarrow.ArrowException, OSError, ValueError)

        def unreadable(error):
            message = " ".join(str(error).split())
            return self._error(f"it is not a Parquet file that pyarrow can read ({message}): write it again.")

        def records():
            try:
                # Other columns are skipped: some tables hold the bytes of the images.
                used = {*itertools.chain(*COLUMNS.values()), *self.columns.values()}
                number = 0
                for batch in file.iter_batches(columns=[name for name in names if name in used]):
                    for row in batch.to_pylist():
                        yield f"row {number}", row
                        number += 1
            except errors as error:
                raise unreadable(error) from None

        try:
            file = pyarrow.parquet.ParquetFile(self.file)
            names = file.schema_arrow.names
        except errors as error:
            raise unreadable(error) from None
        return names, records()
