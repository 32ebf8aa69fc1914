"""Pairs of your own in one table, a row per caption: .csv, .tsv, .jsonl (an object per line) or .parquet with columns

    image     a file's path, from the table's folder (or `image_root`); rows of one image are its several captions
    caption   text
    split     optional: train, test, ...; without it images are split at random

and any others, which are not read. Rows are counted from 0.
"""

import codecs
import csv
import io
import json
import os
from functools import lru_cache
from itertools import chain, compress
from pathlib import Path

from datasets import Caption, Image, Source, check_folds, fold_splits, name_id
from utils.errors import UserError

# What columns are called, where an option does not say.
COLUMNS = {
    "image": ("image", "image_path", "filepath", "path", "file_name"),
    "caption": ("caption", "text", "title"),
    "split": ("split",),
}


class PairsFile(Source):
    """Pairs that a table lists; images in the order in which they first occur.

    root: the file. image_root: the folder that paths start from, by default the file's. image_column, caption_column,
    split_column: by default the first of COLUMNS that the file has. folds, seed: of the random parts that images are
    put into where there is no column of splits: all, train and test, train0 and test0, ...
    """

    def __init__(self, root, image_root="", image_column="", caption_column="", split_column="", folds=5, seed=0):
        check_folds(folds, seed)
        self.file, self.folds, self.seed = Path(root), folds, seed
        self.folder = Path(image_root or self.file.parent).resolve()
        self.columns = {"image": image_column, "caption": caption_column, "split": split_column}

    def images(self, split):
        """List the images of `split`; raises UserError for an unknown split and where the file cannot be read."""
        return [image for image, _ in self._chosen(split)]

    def captions(self, split):
        """List the captions of `split`, by image, with their rows as ids; raises what `images` raises."""
        return [caption for _, captions in self._chosen(split) for caption in captions]

    def id_space(self, split):
        """An image is known by its path: two tables can name the same file."""
        return "files"

    def _chosen(self, split):
        splits = self._read()
        if split not in splits:
            way = "name one with --splits here, --set data.train_split=NAME in train.py and --split in eval.py"
            raise self._error(f"it has no split '{split}'; it has {', '.join(splits)}: {way}.")
        return splits[split]

    def _error(self, said):
        return UserError(f"{self.file}: {said}")

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _read(self):
        """Read the table as {split: [(image, captions)]}."""
        names, rows = self._open()
        columns = [self._column(names, kind) for kind in COLUMNS]
        images, described = {}, {}
        for number, (where, row) in enumerate(rows):
            for column in filter(None, columns):
                if not isinstance(row.get(column), str):
                    found = "null or missing" if row.get(column) is None else f"no string but {row[column]!r:.40}"
                    raise self._error(f"'{column}' of {where} is {found}: mend the row, or take it out.")
            image, text, split = (row.get(column, "").strip() for column in columns)
            if not image or (columns[2] and not split):
                raise self._error(f"'{columns[2] if image else columns[0]}' of {where} is empty: mend the row.")
            if image not in images:
                images[image] = self._image(image, where)
            of_split = described.setdefault(split, {})
            caption = Caption(number, images[image].id, " ".join(text.split()))
            of_split.setdefault(images[image].id, (images[image], []))[1].append(caption)
        if not images:
            raise self._error("it holds no pairs: give it a row per caption.")
        splits = {split: list(pairs.values()) for split, pairs in described.items()}
        if columns[2]:
            return splits
        pairs = splits[""]
        masks = fold_splits(len(pairs), self.folds, self.seed, self.file)
        return {split: list(compress(pairs, mask)) for split, mask in masks.items()}

    def _image(self, written, where):
        """Make an image of a path; one file has one id, whichever way its path is written."""
        if "://" in written:
            raise self._error(f"the image of {where} is an address, {written}: download it, and name its file.")
        path = Path(os.path.normpath(self.folder / written))
        return Image(name_id(path.as_posix()), path)

    def _column(self, names, kind):
        """Find what the file calls a column; only the split may be left out."""
        option = self.columns[kind]
        column = next((name for name in ([option] if option else COLUMNS[kind]) if name in names), None)
        if column is None and (option or kind != "split"):
            wanted, has = option or " or ".join(COLUMNS[kind]), ", ".join(names)
            way = f"name it with --set data.options.{kind}_column=NAME"
            if len(names) == 1 and ";" in names[0]:
                way = "separate the columns by commas, or by tabs in a .tsv"
            raise self._error(f"no column is called {wanted}; it has {has:.200}: {way}.")
        return column

    def _open(self):
        """Open the table: its columns' names, and an iterator of (where a row stands, {column: value})."""
        formats = {
            ".csv": lambda: self._csv(","),
            ".tsv": lambda: self._csv("\t"),
            ".jsonl": self._jsonl,
            ".parquet": self._parquet,
        }
        if self.file.is_dir():
            raise self._error("it is a folder: name the file of pairs itself with --root.")
        if self.file.suffix.lower() not in formats:
            raise self._error(f"its name must end in {', '.join(formats)}, which says how it is to be read.")
        if not self.file.is_file():
            raise self._error(f"it is missing: {self.get or 'name the file of pairs with --root'}.")
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
            raise self._error("it is empty: give it a row per caption.")
        return text

    def _csv(self, delimiter):
        csv.field_size_limit(2**31 - 1)  # by default a caption of 10,000 words may be too long
        # Strict, because a quote that is never closed would else take the rows after it for one caption.
        reader = csv.reader(io.StringIO(self._text(), newline=""), delimiter=delimiter, strict=True)

        def lines():
            width = 0
            try:
                for row in filter(None, reader):
                    width = width or len(row)
                    if len(row) != width:
                        way = f"captions with a {'comma' if delimiter == ',' else 'tab'} must be in quotes"
                        raise self._error(
                            f"line {reader.line_num} has {len(row)} fields, but the header {width}: {way}."
                        )
                    yield f"line {reader.line_num}", row
            except csv.Error as error:
                way = 'put fields that hold quotes between quotes, and write their own twice ("say ""this""")'
                raise self._error(f"line {reader.line_num} cannot be read ({error}): {way}.") from None

        rows = lines()
        header = [name.strip() for name in next(rows)[1]]
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise self._error(f"it has two columns '{twice[0]}': write a row per caption, and name each column once.")
        return header, ((where, dict(zip(header, row))) for where, row in rows)

    def _jsonl(self):
        rows = []
        for number, line in enumerate(self._text().split("\n"), start=1):  # captions may hold other line ends
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self._error(f"line {number} is not valid JSON ({error}): mend the line.") from None
                if not isinstance(row, dict):
                    raise self._error(f"line {number} is no object: write one per line, with keys for the columns.")
                rows.append((f"line {number}", row))
        return list(dict.fromkeys(name for _, row in rows for name in row)), rows

    def _parquet(self):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            way = "`pip install -r requirements-extra.txt`, or save the table as .csv"
            raise self._error(f"Parquet files are read with pyarrow, which is not installed: {way}.") from None
        refused = (pyarrow.ArrowException, OSError, ValueError)

        def failed(error):
            return self._error(f"it is no Parquet file that pyarrow reads ({' '.join(str(error).split())}): mend it.")

        def records():
            try:
                # Others are left alone: some tables have the images' own bytes in them.
                columns = [name for name in names if name in {*sum(COLUMNS.values(), ()), *self.columns.values()}]
                rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(columns=columns))
                yield from ((f"row {number}", row) for number, row in enumerate(rows))
            except refused as error:
                raise failed(error) from None

        try:
            file = pyarrow.parquet.ParquetFile(self.file)
            names = file.schema_arrow.names
        except refused as error:
            raise failed(error) from None
        return names, records()
