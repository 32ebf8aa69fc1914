"""Your own pairs in a table: .csv, .tsv, .txt, .jsonl (an object per line), .json (a list), .parquet; or a folder.

A folder holds the .parquet files of one table, as from the Hugging Face hub, whose names then tell the split (
`train-00000-of-00002.parquet`), or images with a text file of the same name beside each, a caption per line.

The columns:

    image     a file's path, relative to the table's folder (or `image_root`); rows of one image are its captions; in
              .parquet also the file itself, bytes or {bytes, path}, as the Hugging Face hub has it
    caption   text, or a list of texts; or several columns, caption_0, caption_1, ..., of which some may be empty; a
              first one may have no number, as pandas writes columns of one name: caption, caption.1, ...
    split     optional: train, test, ...; without it images are split at random

Other columns are ignored. Rows and captions are counted from 0.
"""

import collections
import contextlib
import csv
import io
import itertools
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from datasets import Caption, Described, Image, check_folds, check_splits, fold_splits, name_id, visible
from datasets.captions import captions_in, folded
from utils.errors import UserError
from utils.files import UNREADABLE, not_downloaded, reason

# Default names of the columns.
COLUMNS = {
    "image": ("image", "image_path", "filepath", "path", "file_name", "filename", "image_name"),
    "caption": ("caption", "text", "title", "captions", "comment", "raw"),
    "split": ("split",),
}


# Of pictures that a text file may lie beside, some of them such as Pillow cannot read, which is said then.
PICTURES = re.compile(r"\.(avif|bmp|gif|hei[cf]|j(fif|pe?g|p2|xl)|png|ppm|tiff?|webp)", re.IGNORECASE)
SEPARATORS = {",": "a comma", "\t": "a tab", "|": "a bar", ";": "a semicolon"}


PART = re.compile(r"(.+?)-(\d+)-of-(\d+)(-[0-9a-f]+)?")  # the stem of a .parquet of the hub: split, number, hash


class _Inside(NamedTuple):
    """In place of a path: the image is inside the table, in this row of this file."""

    file: Path
    row: int


class PairsFile(Described):
    """Pairs listed in a table; images in the order in which they first occur.

    root: the file. image_root: the folder that paths are relative to, by default that of the file. image_column,
    caption_column, split_column: by default the first of COLUMNS that the file has. folds, seed: see `fold_splits`,
    which splits the images if there is no column of splits.
    """

    distinct = True

    def __init__(self, root, image_root="", image_column="", caption_column="", split_column="", folds=5, seed=0):
        check_folds(folds, seed)
        self.file, self.folds, self.seed = Path(root), folds, seed
        beside = self.file if self.file.is_dir() else self.file.parent
        self.folder = Path(image_root or beside).resolve()
        self.columns = {"image": image_column, "caption": caption_column, "split": split_column}

    def id_space(self, split):
        """Return "files": an id is a hash of the path, as two tables can list the same file."""
        return "files"

    def pairs(self, split):
        """List images with their captions, numbered over the file; raises UserError if the file cannot be read."""
        splits = self._read()
        self._refuse_incomplete(split)
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
        image_column, caption_columns = self._columns(names, "image")[0], self._columns(names, "caption")
        split_column = next(iter(self._columns(names, "split")), None)
        images, described, wrong = {}, {}, {"image": [], "split": []}
        count, numbers = 0, itertools.count()
        for where, row in rows:
            count += 1
            image, split = row.get(image_column), row.get(split_column) if split_column else ""
            for kind, column, value in (("image", image_column, image), ("split", split_column, split)):
                if not isinstance(value, str | _Inside):
                    wrong[kind].append((column, where, value))
                elif column and isinstance(value, str) and not value.strip():
                    raise self._error(f"'{column}' of {where} is empty: fix the row.")
            if any(wrong.values()):
                continue  # to count them
            image, split = image.strip() if isinstance(image, str) else image, split.strip()
            if image not in images:
                images[image] = self._image(image, where)
            captions = described.setdefault(split, {}).setdefault(images[image].id, (images[image], []))[1]
            for text in _texts([row.get(column) for column in caption_columns]):
                captions.append(Caption(next(numbers), images[image].id, folded(text), where))
        self._refuse(wrong, count)
        if not images:
            raise self._error("it holds no pairs: write a row per caption.")
        splits = {split: list(pairs.values()) for split, pairs in described.items()}
        check_splits(splits, self.file)
        if split_column:
            every = {}
            for id, (image, captions) in (item for pairs in described.values() for item in pairs.items()):
                every.setdefault(id, (image, []))[1].extend(captions)
            return splits | {"all": splits.get("all", list(every.values()))}
        pairs = splits[""]
        masks = fold_splits(len(pairs), self.folds, self.seed, self.file)
        return {split: list(itertools.compress(pairs, mask)) for split, mask in masks.items()}

    def _refuse(self, wrong, count):
        """Raise UserError if values are no strings: {kind: [(column, where, value)]}, of `count` rows."""
        for kind, values in wrong.items():
            for column, where, value in values[:1]:
                actual = "null or missing" if value is None else f"not a string but {value!r:.40}"
                hint = "fix the row, or remove it"
                if len(values) == count > 1:
                    actual += f", like all {count:,}"
                    hint = f"name another column with --set data.options.{kind}_column=NAME"
                raise self._error(f"'{column}' of {where} is {actual}: {hint}.")

    def open(self, image):
        """Open an image from its file, or from its row of the table; raises what the reader raises."""
        if not image.name:
            return super().open(image)
        row, starts = int(image.name.rpartition(" ")[2]), self._starts(image.path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        value = self._group(image.path, group)[row - starts[group]].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path is None:
            raise OSError("its cell in the table is empty")
        return PIL.Image.open(self.folder / path if data is None else io.BytesIO(data))

    @lru_cache  # noqa: B019
    def _starts(self, path):
        """The first row of each group of rows of a .parquet."""
        metadata = self._parquet_file(path).metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return [0, *itertools.accumulate(counts)][:-1]

    @lru_cache(maxsize=1)  # noqa: B019  (images are opened in the order of the rows)
    def _group(self, path, number):
        """Read the images of one group of rows of a .parquet."""
        file = self._parquet_file(path)
        (column,) = self._columns(file.schema_arrow.names, "image")
        return file.read_row_group(number, columns=[column], use_threads=False)[column]

    def _image(self, name, where):
        """Make an image of a path or of a row; one file has one id, however its path is spelled."""
        if isinstance(name, _Inside):
            file, name = name.file, f"{name.file.name} row {name.row}"  # which `open` reads
            return Image(name_id(f"{file.resolve()} {name}"), file, name)
        if "://" in name:
            raise self._error(f"the image of {where} is a URL, {name}: download it, and give the path of its file.")
        path = Path(os.path.normpath(self.folder / name))
        if "\\" in name and not os.path.isfile(path):  # as written on Windows
            path = Path(os.path.normpath(self.folder / name.replace("\\", "/")))
        return Image(name_id(path.as_posix()), path)

    def _columns(self, names, kind):
        """List the file's columns of a kind: one, several of captions, or no split; raises UserError without one."""
        option = self.columns[kind]
        candidates = [option] if option else COLUMNS[kind]
        columns = [name for name in candidates if name in names][:1]
        if kind != "split":  # a column of that name in another case may be anything
            columns = columns or [name for one in candidates for name in names if name.lower() == one.lower()][:1]
        if kind == "caption" and not (option and columns):
            stems = "|".join(map(re.escape, columns or candidates))
            number = rf"({stems})\.\d+" if columns else rf"({stems})[ _.-]?\d+"
            columns += [name for name in names if re.fullmatch(number, name, re.IGNORECASE)]
        if not columns and (option or kind != "split"):
            hint = f"choose one with --set data.options.{kind}_column=NAME"
            if len(names) == 1 and ";" in names[0]:
                hint = "separate the columns by commas, or by tabs in a .tsv"
            elif not option and not set(names) & set(itertools.chain(*COLUMNS.values())):
                hint += ", or write the names above it if that is no header"
            wanted = " or ".join(f"'{name}'" for name in candidates)
            raise self._error(f"it has no column {wanted}; it has {', '.join(names):.200}: {hint}.")
        return columns

    def _open(self):
        """Open the table: returns the column names, and an iterator of ("line 2" or "row 0", {column: value})."""
        formats = {
            ".csv": lambda: self._csv(","),
            ".tsv": lambda: self._csv("\t"),
            ".jsonl": self._jsonl,
            ".parquet": lambda: self._parquet([self.file]),
            ".txt": lambda: self._csv(","),
            ".json": self._json,
        }
        if self.file.is_dir():
            return self._of_folder()
        if self.file.suffix.lower() not in formats:
            raise self._error(f"its name must end in {', '.join(formats)}, which tells its format.")
        if not self.file.is_file():
            raise self._error(f"it is missing: {self.get or 'point --root to the file of pairs'}.")
        return formats[self.file.suffix.lower()]()

    def _of_folder(self):
        root = self.file.resolve()
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and visible(path.relative_to(root))]
        parts = [path for path in files if path.suffix.lower() == ".parquet"]
        texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
        pictures = [path for path in files if PICTURES.fullmatch(path.suffix)]
        described = any(path.with_suffix("") in texts for path in pictures)
        if parts and not (described and self._is_metadata(parts[0])):
            return self._parquet(parts)
        if described:
            return ["image", "caption"], self._text_files(pictures, texts)
        lacks = "it is a folder without .parquet, and without pictures that have a .txt beside them"
        raise self._error(f"{lacks}: point --root to the file of pairs itself.")

    def _is_metadata(self, path):
        """Whether a .parquet tells of pictures without naming their files, as img2dataset's beside them."""
        try:
            names = self._parquet_file(path).schema_arrow.names
            return not (self._columns(names, "image") and self._columns(names, "caption"))
        except UserError:
            return True

    def _refuse_incomplete(self, split):
        """Raise UserError if .parquet files whose names count the parts of a split lack one."""
        names = [PART.fullmatch(path.stem) for path in self.file.rglob("*.parquet")]  # none where it is no folder
        numbers = collections.defaultdict(set)
        for name in filter(None, names):
            if split in ("all", name[1]):
                numbers[name[1], int(name[3])].add(int(name[2]))
        for (part_of, whole), present in numbers.items():
            if len(present) < whole:
                hint = f"download the others, or move those of '{part_of}' out of the folder"
                raise self._error(f"it has {len(present)} of the {whole} parts of '{part_of}': {hint}.")

    def _text_files(self, pictures, texts):
        """Yield a row per line of the text file beside each picture; texts: {path without suffix: text file}."""
        for path in pictures:
            text = texts.get(path.with_suffix(""))
            lines = text.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n") if text else []
            for caption in [*filter(str.strip, lines)] or [None]:
                yield (text or path).name, {"image": str(path), "caption": caption}

    def _text(self, header=False):
        if other := not_downloaded(self.file):
            raise self._error(f"{other}: download the table itself.")
        data = self.file.read_bytes()
        # A caption that is not UTF-8 must not spoil the others: datasets/listing.py names it.
        text = data.decode("utf-8-sig", "surrogateescape")
        top = text.split("\n", 1)[0] if header else ""
        wrong = re.search("[\udc80-\udcff]", top)
        if wrong:
            raise self._error(f"line 1 is not UTF-8 (byte 0x{ord(wrong[0]) - 0xDC00:02x}): save the file as UTF-8.")
        if not text.strip():
            raise self._error("it is empty: write a row per caption.")
        return text

    def _csv(self, delimiter):
        csv.field_size_limit(2**31 - 1)  # the default refuses captions of 10,000 words and more
        text = re.sub(r"\Asep=.\r?\n", "\n", self._text(header=True))  # the first line of some programs' tables
        delimiter = next((one for one in (delimiter, *SEPARATORS) if self._separates(text, one)), delimiter)
        # Strict, because an unclosed quote would otherwise turn the following rows into one caption.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

        def lines():
            width, start = 0, 1
            try:
                for row in reader:
                    width = width or len(row)
                    row = row if any(field.strip() for field in row[width:]) else row[:width]  # only separators
                    if len(row) > width:
                        hint = f"put captions with {SEPARATORS[delimiter]} in quotes"
                        raise self._error(f"line {start} has {len(row)} fields, but the header has {width}: {hint}.")
                    if row:
                        yield f"line {start}", row
                    start = reader.line_num + 1
            except csv.Error as error:
                reason = "a quote in it is never closed" if "end of data" in str(error) else error
                hint = 'put fields that contain quotes in quotes, and double those inside ("say ""this""")'
                raise self._error(f"line {start} cannot be read ({reason}): {hint}.") from None

        rows = lines()
        header = [name.strip() for name in next(rows)[1]]
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise self._error(f"it has two columns '{repeated[0]}': write a row per caption, and each column once.")
        # A row that is too short lacks its last columns.
        return header, ((where, dict(zip(header, row))) for where, row in rows)

    def _separates(self, text, delimiter):
        """Whether `delimiter` cuts the header of a table into known columns."""
        names = [name.strip() for name in text.lstrip().split("\n", 1)[0].replace('"', "").split(delimiter)]
        with contextlib.suppress(UserError):
            return bool(self._columns(names, "image") and self._columns(names, "caption"))

    def _jsonl(self):
        rows = []
        for number, line in enumerate(self._text().split("\n"), start=1):  # captions may hold other line ends
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise self._error(f"line {number} is not valid JSON ({error}): fix the line.") from None
        return self._objects(rows, "write one per line")

    def _json(self):
        try:
            entries = json.loads(self._text())
        except (ValueError, RecursionError) as error:
            raise self._error(f"it is not valid JSON ({error}): fix it; an object per line is a .jsonl.") from None
        if not isinstance(entries, list):
            raise self._error("it is not a list: write [{...}, {...}], an object per caption or image.")
        if not entries:
            raise self._error("it holds no pairs: write an object per caption or image.")
        return self._objects([(f"entry {number}", row) for number, row in enumerate(entries)], "write a list of them")

    def _objects(self, rows, hint):
        for where, row in rows:
            if not isinstance(row, dict):
                raise self._error(f"{where} is not an object: {hint}, with the columns as keys.")
        return list(dict.fromkeys(name for _, row in rows for name in row)), rows

    def _parquet(self, parts):
        """Open the files of one table; where it has no column of splits, names of the hub tell them."""
        file = self._parquet_file(parts[0])
        import pyarrow

        names = file.schema_arrow.names
        (image,), captions, split = (self._columns(names, kind) for kind in COLUMNS)
        type = file.schema_arrow.field(image).type
        inside = pyarrow.types.is_struct(type) or str(type).endswith(("binary", "binary_view"))
        # Other columns are skipped, and images inside the table are read when they are opened.
        read = [*captions, *split] if inside else [image, *captions, *split]
        split_of = {} if split or len(parts) == 1 else {path: PART.fullmatch(path.stem) for path in parts}
        named = bool(split_of) and all(split_of.values())

        def records(path):
            more = {"split": split_of[path][1]} if named else {}
            among = f" of {path.name}" if len(parts) > 1 else ""
            numbers = itertools.count()
            try:
                for batch in self._parquet_file(path).iter_batches(columns=read):
                    for values in zip(*(_values(batch.column(name)) for name in read)):
                        number = next(numbers)
                        picture = {image: _Inside(path, number)} if inside else {}
                        yield f"row {number}{among}", dict(zip(read, values)) | picture | more
            except (pyarrow.ArrowException, *UNREADABLE) as error:
                raise self._unreadable(error, path) from None

        return [*names, *(["split"] if named else [])], itertools.chain.from_iterable(map(records, parts))

    def _parquet_file(self, path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            hint = "run `pip install -r requirements-extra.txt`, or save the table as .csv"
            raise self._error(f"Parquet files are read with pyarrow, which is not installed: {hint}.") from None
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, *UNREADABLE) as error:
            raise self._unreadable(error, path) from None

    def _unreadable(self, error, path):
        return UserError(
            f"{path}: it is not a Parquet file that pyarrow can read ({reason(error, path)}): write it again."
        )


def _texts(values):
    """List the captions that the fields of a row hold; only if all are empty, one that is none."""
    texts = [text for value in values for text in captions_in(value)]
    filled = [text for text in texts if text is not None and text == text and text != ""]
    return (filled if len(values) > 1 else texts) or [None]


def _values(column):
    """Return the values of a column of a Parquet batch as Python objects, strings even if they are not UTF-8."""
    import pyarrow

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        listed = pyarrow.types.is_list(column.type)
        values = column.cast(pyarrow.list_(pyarrow.binary()) if listed else pyarrow.binary()).to_pylist()
    return [_decoded(value) for value in values]


def _decoded(value):
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
