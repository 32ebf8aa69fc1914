"""Hostile input: whatever a file, a flag or a prompt holds, a reader returns or says one sentence, within seconds.

A few hundred cases here; with -m slow, `make test-fuzz`, more than 10,000.
"""

import contextlib
import copy
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import PIL.Image
import pyarrow
import pytest
import safetensors.numpy
import yaml
from hypothesis import strategies as st
from pyarrow import parquet
from studies import make_result, write_trace

import cache_embeddings
import eval as evaluation
import train
import uncertainty
from datasets.arrays import Arrays
from datasets.coco import Coco
from datasets.embeddings import encoder_fingerprint
from datasets.flickr import Flickr
from datasets.hierarcaps import HierarCaps
from datasets.karpathy import Karpathy
from datasets.listing import files_fingerprint, fingerprint, list_split
from datasets.pairs import PairsFile
from datasets.shards import Shards
from models.asymvlm import AsymVLM
from models.backbones import make_backbone
from reporting import evaluations, studies, traces
from reporting.tables import formats
from utils import config as configuration
from utils.config import Config, load_backbone, load_config, make_adaptor, make_source
from utils.errors import UserError

FEW, MANY = 12, 350  # cases of a kind, here and in the slow run
SECONDS = 20  # that a case may compute

NUMBERS = [0, -1, 1, 3, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True]
TEXTS = [
    "", " ", "a", "\ud800", "\x00", "\u202e", "é\u0301", "a\nb", "../../x", "/etc/passwd", "a" * 3000, "=1+1", "1e999",
    "['a', 'b']", '["a"', "[" * 1500, "{}", "{a}", "%s", "http://x/y.jpg", "\\", '"', "nan", "null", "9" * 5000,
]  # fmt: skip
DEEP = json.loads("[" * 300 + "]" * 300)
NESTS = [[], {}, [None], [[]], {"": None}, {"a": {"b": []}}, DEEP, ["a", 1, None], [float("nan")]]
SCALARS = st.sampled_from([None, *NUMBERS, *TEXTS]) | st.text(max_size=8) | st.integers() | st.floats()
HOSTILE = SCALARS | st.sampled_from(NESTS).map(copy.deepcopy)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def spoiled(draw, tree):
    """A nest of dicts and lists with one to three values replaced, removed, wrapped, repeated or called otherwise."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], dict | list) or not node[key] or draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        if not isinstance(node, dict | list) or not node:
            return draw(HOSTILE)
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "key", "repeat"]))
        if change == "replace":
            node[key] = draw(HOSTILE)
        elif change == "wrap":
            node[key] = draw(st.sampled_from([[node[key]], {"a": node[key]}, str(node[key]), [[node[key]]]]))
        elif change == "repeat" and isinstance(node, list):
            node.insert(0, copy.deepcopy(node[key]))
        elif change == "key" and isinstance(node, dict):
            node[draw(st.sampled_from(TEXTS) | st.text(max_size=5))] = node.pop(key)
        else:
            del node[key]
    return tree


@st.composite
def damaged(draw, data):
    """Bytes with up to four flips, cuts, insertions and repetitions."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["flip", "flip", "set", "cut", "drop", "insert", "repeat"]))
        if change == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "set" and data:
            data[place] = draw(st.sampled_from([0, 255, 127, 128, 34, 44, 10, 13, 91, 123, 48, 57]))
        elif change == "cut":
            del data[place:]
        elif change == "drop":
            del data[place : place + draw(st.integers(1, 64))]
        elif change == "insert":
            data[place:place] = draw(
                st.binary(max_size=12) | st.sampled_from([b"[" * 100_000, b'"', b"NaN", b"9" * 5000])
            )
        else:
            data[place:place] = data[place : place + draw(st.integers(1, 600))]
    return bytes(data)


def spelled(tree):
    """JSON as Python writes it, with NaN and lone surrogates; what JSON has no key or number for stays a text."""
    return json.dumps(tree).encode()


@st.composite
def json_files(draw, tree, spell=spelled):
    """A JSON file like a valid one: values, text or bytes spoiled, a key repeated, or any other tree."""
    kind = draw(st.sampled_from(["values", "values", "values", "bytes", "text", "repeat", "other"]))
    data = spell(draw(spoiled(tree)) if kind == "values" else draw(TREES) if kind == "other" else tree)
    if kind == "bytes":
        return draw(damaged(data))
    if kind == "text":
        old = draw(st.sampled_from([b"1", b'"', b"[", b"]", b"{", b":", b","]))
        new = draw(
            st.sampled_from(
                [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 20_000, b"'", b"\xff", b"\\ud800", b""]
            )
        )
        return data.replace(old, new, draw(st.integers(1, 3)))
    if kind == "repeat":
        keys = [key for key in tree if isinstance(tree, dict)] or ["a"]
        entry = json.dumps({draw(st.sampled_from(keys)): draw(HOSTILE)})[1:-1]
        return data.replace(b"{", b"{" + entry.encode() + b", ", 1)
    return data


@contextlib.contextmanager
def limited():
    """End the block after SECONDS of computation; others may use the machine, too."""

    def late(*_):
        raise TimeoutError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def must_answer(call, *arguments):
    """Call a function, which may return, or raise what a script turns into one sentence; returns that, or None."""
    try:
        with limited():
            call(*arguments)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 3000, str(error)[:3000]
        return str(error)
    except TimeoutError:
        raise
    except OSError as error:
        assert error.strerror and error.filename
        return error.strerror


def picture(folder, *names):
    """Write small pictures."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4), (90, 10, 10)).save(folder / name)


def list_all(source, split):
    """List a split as cache_embeddings.py does, strictly and not, and open what is listed."""
    for on_error in ("stop", "skip"):
        listing = list_split(source, split, on_error)
        fingerprint(source, listing)
        files_fingerprint(listing)
        for image in listing.images if listing.embeddings is None else ():
            with contextlib.suppress(OSError, PIL.Image.DecompressionBombError):  # of Pillow, which workers handle
                source.open(image)


def from_file(path, strategy, read):
    """Bytes of a file that is written anew, and what reads it."""

    def check(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return must_answer(read)

    return strategy, check


# The kinds of input: each makes what is valid in a folder, which is the working folder, and returns a strategy of cases
# and the check of one.


def coco(folder):
    picture(folder / "val2017", *(f"{id:012d}.jpg" for id in (1, 2, 3)))
    tree = {
        "info": {"year": 2017}, "licenses": [],
        "images": [{"id": id, "file_name": f"{id:012d}.jpg", "height": 4, "width": 4} for id in (1, 2, 3)],
        "annotations": [{"id": 10 + i, "image_id": 1 + i % 3, "caption": f"a thing {i}"} for i in range(6)],
    }  # fmt: skip
    path = folder / "annotations/captions_val2017.json"
    return from_file(path, json_files(tree), lambda: list_all(Coco(folder), "val"))


def karpathy(folder):
    names = [f"COCO_val2014_{id:012d}.jpg" for id in (1, 2, 3)]
    picture(folder / "val2014", *names)
    tree = {
        "images": [
            {
                "split": split, "cocoid": id, "filepath": "val2014", "filename": name, "imgid": id,
                "sentences": [{"sentid": 2 * id + i, "raw": f"a thing {i}", "tokens": ["a"]} for i in range(2)],
            }
            for id, (name, split) in enumerate(zip(names, ("val", "val", "restval"), strict=True), start=1)
        ],
        "dataset": "coco",
    }  # fmt: skip
    path = folder / "dataset_coco.json"
    return from_file(path, json_files(tree), lambda: list_all(Karpathy(folder), "val"))


def flickr(folder):
    picture(folder / "images", "11_a.jpg", "12_b.jpg")
    lists = {split: f"{split}.txt" for split in ("train", "val", "test")}
    for name in lists.values():
        (folder / name).write_text("11_a.jpg\n12_b\n" if name == "val.txt" else "")
    lines = [["11_a.jpg#0", "A man."], ["11_a.jpg#1", "A man runs."], ["12_b.jpg#0", "A dog ."]]
    options = {"file": "dataset_flickr30k.json", "tokens": "t.token", "lists": lists, "folders": ["images"]}
    read = lambda: list_all(Flickr(folder, **options), "val")  # noqa: E731
    return from_file(folder / "t.token", tables(lines, "\t"), read)


@st.composite
def tables(draw, rows, delimiter=",", quoted=False):
    """A table like a valid one, with cells, bytes or the delimiter spoiled."""
    if draw(st.integers(0, 2)) == 0:
        data = io.StringIO(newline="")
        csv.writer(data, delimiter=delimiter).writerows(rows)
        return draw(damaged(data.getvalue().encode()))
    rows = draw(spoiled(rows))
    rows = [row if isinstance(row, list) else [row] for row in rows] if isinstance(rows, list) else [[rows]]
    rows = [[cell if isinstance(cell, str) else json.dumps(cell) for cell in row] for row in rows]
    data = io.StringIO(newline="")
    if draw(st.booleans()):
        with contextlib.suppress(csv.Error):  # one empty field cannot be written without quotes
            csv.writer(data, delimiter=draw(st.sampled_from([delimiter, delimiter, "\t", ";", "|"]))).writerows(rows)
    else:
        data.write("\n".join(delimiter.join(row) for row in rows))
    return data.getvalue().encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"])))


ROWS = [
    ["image", "caption", "split"],
    ["a.png", "A red circle", "test"], ["a.png", "['one', 'two']", "test"], ["b.png", "", "train"],
    ["c.png", 'Say "x", twice', "test"],
]  # fmt: skip


def hierarcaps(folder):
    picture(folder / "val2014", "COCO_val2014_000000000007.jpg")
    url = "http://images.cocodataset.org/val2014/COCO_val2014_{:012d}.jpg"
    rows = [["id", "captions", "image_url"]] + [[str(i), "bird => blue bird", url.format(7 + i)] for i in range(3)]
    return from_file(folder / "hierarcaps_test.csv", tables(rows), lambda: list_all(HierarCaps(folder), "test"))


def table(folder):
    """A .csv."""
    picture(folder, "a.png", "b.png", "c.png")
    return from_file(folder / "pairs.csv", tables(ROWS), lambda: list_all(PairsFile(folder / "pairs.csv"), "test"))


def tabbed(folder):
    """A .tsv without splits, split at random."""
    picture(folder, "a.png", "b.png", "c.png")
    rows, path = [row[:2] for row in ROWS], folder / "pairs.tsv"
    return from_file(path, tables(rows, "\t"), lambda: list_all(PairsFile(path, folds=2), "test"))


def lines(folder):
    """A .jsonl."""
    picture(folder, "a.png", "b.png", "c.png")
    tree = [dict(zip(ROWS[0], row, strict=True)) for row in ROWS[1:]]

    def spell(tree):
        return b"\n".join(map(spelled, tree)) if isinstance(tree, list) else spelled(tree)

    path = folder / "pairs.jsonl"
    return from_file(path, json_files(tree, spell), lambda: list_all(PairsFile(path), "test"))


COLUMN = st.sampled_from(
    [
        pyarrow.array(["a.png", "b.png", "a.png"]), pyarrow.array(["a", None, "test"]), pyarrow.array([1, 2, 3]),
        pyarrow.array([b"a.png", b"\xff", None]), pyarrow.array([None, None, None]), pyarrow.array([1.5, None, 0.0]),
        pyarrow.array([["a", "b"], [], None]), pyarrow.array([[1], [None], [2]]), pyarrow.array([["\n"], ["x"], [""]]),
        pyarrow.array([{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": None}, None]),
        pyarrow.array([{"bytes": None, "path": "a.png"}] * 3), pyarrow.array([{"x": 1}, {"x": 2}, None]),
        pyarrow.array(["a.png", "b.png", "a.png"]).dictionary_encode(),
        pyarrow.array([0, 1, 2], pyarrow.timestamp("s")),
        pyarrow.array([True, False, None]), pyarrow.array([b"a", b"b", b"c"], pyarrow.large_binary()),
        pyarrow.array(["test"] * 3), pyarrow.array(["test", "train", "test"]),
        pyarrow.array([[b"\xff"], [b"a"], None]), pyarrow.array([[["a"]], [], None]),
    ]
)  # fmt: skip


@st.composite
def parquets(draw):
    """A Parquet file of columns of any type, some with bytes spoiled."""
    names = draw(st.lists(st.sampled_from([*ROWS[0], "caption_0", "caption_1", "x"]), unique=True, min_size=1))
    names = list(dict.fromkeys([*names, *draw(st.sampled_from([ROWS[0], ROWS[0][:2], []]))]))
    data = io.BytesIO()
    parquet.write_table(pyarrow.table({name: draw(COLUMN) for name in names}), data)
    return draw(damaged(data.getvalue())) if draw(st.integers(0, 2)) == 0 else data.getvalue()


def parquet_table(folder):
    picture(folder, "a.png", "b.png")
    path = folder / "pairs.parquet"
    return from_file(path, parquets(), lambda: list_all(PairsFile(path), "test"))


@st.composite
def tars(draw):
    """A shard of members of any name, type and content, some with bytes spoiled."""
    data = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    picture = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(picture, "png")
    contents = [
        picture.getvalue(),
        b"a caption",
        b'{"caption": "a caption"}',
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b"null",
    ]
    contents += [spelled({"caption": value}) for value in (None, 3, ["a", None], {"a": 1}, "\ud800", float("nan"))]
    with tarfile.open(fileobj=data, mode="w", format=form) as tar:
        for _ in range(draw(st.integers(1, 6))):
            key = draw(st.sampled_from(["000", "001", "a/b", "../c", "/d", ".e", "f.g", "", "x" * 120, "\udcff", "."]))
            suffix = draw(st.sampled_from([".png", ".jpg", ".txt", ".json", ".TXT", ".input.png", "", "."]))
            member = tarfile.TarInfo(key + suffix)
            kind = draw(
                st.sampled_from(
                    [tarfile.REGTYPE] * 6
                    + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
                )
            )
            member.type, content = kind, draw(st.sampled_from(contents))
            member.linkname = (
                draw(st.sampled_from(["000.png", "../../etc/passwd", "", key + suffix]))
                if kind != tarfile.REGTYPE
                else ""
            )
            if form == tarfile.PAX_FORMAT and draw(st.booleans()):
                member.pax_headers = {
                    draw(st.sampled_from(["comment", "path", "size", "GNU.sparse.map"])): draw(
                        st.sampled_from(TEXTS[2:3] + ["7", "-1", "x", "9" * 30])
                    )
                }
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            with contextlib.suppress(ValueError, UnicodeError):
                tar.addfile(member, io.BytesIO(content))
    return draw(damaged(data.getvalue())) if draw(st.integers(0, 2)) == 0 else data.getvalue()


def shards(folder):
    path = folder / "shards/0.tar"
    return from_file(path, tars(), lambda: list_all(Shards(path.parent, folds=2), "test"))


N, DIM = 12, 6
VALUES = np.random.default_rng(0).standard_normal((N, DIM)).astype(np.float32)
EMBEDDINGS = {
    "image": VALUES, "text": VALUES[::-1], "image_of_text": np.arange(N), "image_id": np.arange(N) + 5,
    "caption": np.array([f"text {row}" for row in range(N)]),
}  # fmt: skip
CLASSES = {
    "image": VALUES, "text": VALUES[:3], "label": np.arange(N) % 3, "class_of_text": np.arange(3),
    "class_name": np.array(["a", "b", "c"]),
}  # fmt: skip
ARRAY = st.sampled_from([None, *EMBEDDINGS.values(), *CLASSES.values()]) | st.sampled_from(
    [
        *(VALUES.astype(kind) for kind in (float, "f2", ">f4", complex, np.longdouble, bool, int, "M8[s]")),
        *(np.full((N, DIM), value) for value in (np.nan, 1e30, 1e-9, 0.0)), np.asfortranarray(VALUES),
        *(np.zeros(shape, "f4") for shape in ((), (0, 3), (N, 0), (N,), (N, 2, 2))), np.zeros(N, [("a", "f4")]),
        np.arange(N, dtype=np.uint64) + 2**63, np.arange(N) * 2**40, np.full(N, -1), np.arange(N).astype("M8[s]"),
        np.array(["a\0", "\ud800", ""] * 4), np.array([b"a"] * N), np.array(["x"] * N, object),
    ]
)  # fmt: skip


@st.composite
def npys(draw, array):
    """A .npy like a valid one, with its header or its bytes spoiled."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    data = data.getvalue()
    if draw(st.booleans()):
        return draw(damaged(data))
    start = 10 + int.from_bytes(data[8:10], "little")
    header = {
        "descr": array.dtype.str if array.dtype.names is None else "f4",
        "fortran_order": False,
        "shape": array.shape,
    }
    shapes = [
        (10**12, 6),
        (2**63,),
        (-1, 6),
        (N, DIM, 1),
        (),
        (N,),
        (0, 0),
        (10**400,),
        (1.5, 2),
        ("a",),
        None,
        (10**6,) * 33,
    ]
    types = [
        "<f4",
        "|O",
        "<U5",
        ">f8",
        "<f2",
        "<c16",
        "|V8",
        "f999",
        "",
        None,
        [("a", "<f4")],
        "<M8[s]",
        "<U999999999",
        ("<f4", (2, 2)),
    ]
    for key, values in (("shape", shapes), ("descr", types), ("fortran_order", [True, 1, None, "x"]), ("x", [1])):
        if draw(st.integers(0, 2)) == 0:
            header[key] = draw(st.sampled_from(values))
    text = draw(
        st.sampled_from(
            [repr(header), repr(header), "(" * 500, "{" * 9, repr(header)[:-3], "lambda: 1", "1" * 5000, ""]
        )
    )
    version = draw(st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\0"]))
    size = len(text) + draw(st.sampled_from([0, 0, 0, 1, -1, 20_000]))
    length = (max(0, size) % 2**16).to_bytes(2 if version[:1] == b"\1" else 4, "little")
    return b"\x93NUMPY" + version + length + text.encode() + data[start:]


def zipped(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files:
            file.writestr(f"{name}.npy", content)
    return data.getvalue()


@st.composite
def npzs(draw):
    """An .npz of arrays of any type, or with one of its .npy or its bytes spoiled."""
    files = dict(draw(st.sampled_from([EMBEDDINGS, CLASSES])))
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from([*EMBEDDINGS, *CLASSES, "coco_image_id"]), min_size=1, max_size=2)):
            files[name] = draw(ARRAY)
    contents = []
    for name, array in files.items():
        if array is not None:
            data = io.BytesIO()
            np.save(data, array, allow_pickle=True)
            contents.append((name, draw(npys(array)) if draw(st.integers(0, 4)) == 0 else data.getvalue()))
    data = zipped(contents)
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


def list_arrays(path):
    source = Arrays(path, folds=3)
    list_all(source, "test")
    source.embeddings("train")


def npz(folder):
    return from_file(folder / "pairs.npz", npzs(), lambda: list_arrays(folder / "pairs.npz"))


def npy(folder):
    np.save(folder / "text.npy", VALUES)
    return from_file(folder / "image.npy", npys(VALUES), lambda: list_arrays(folder))


@st.composite
def tensors(draw):
    """A .safetensors like a valid one, with its header or its bytes spoiled."""
    strings = {"caption": json.dumps(EMBEDDINGS["caption"].tolist())}
    plain = {name: np.ascontiguousarray(value) for name, value in EMBEDDINGS.items() if name != "caption"}
    data = safetensors.numpy.save(plain, strings)
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(data))
    size = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw(st.booleans()):
        header["__metadata__"]["caption"] = draw(
            st.sampled_from([*TEXTS, "[1]", "[[]]", '["a"]', "null", '["a", ["b"]]', "{}"])
        )
    else:
        header = draw(spoiled(header))
    text = draw(json_files(header))
    return (
        draw(st.sampled_from([len(text), len(text), len(text), 2**63, 0, max(0, len(text) - 1)])).to_bytes(8, "little")
        + text
        + content
    )


def safetensor(folder):
    path = folder / "pairs.safetensors"
    return from_file(path, tensors(), lambda: list_arrays(path))


def clip_retrieval(folder):
    """The layout of clip-retrieval with its table of captions."""
    for name in ("img_emb", "text_emb"):
        (folder / name).mkdir()
        np.save(folder / name / f"{name}_0.npy", VALUES[:3])
    path = folder / "metadata/metadata_0.parquet"

    def read():
        source = Arrays(folder, folds=2)
        list_all(source, "test")

    return from_file(path, parquets(), read)


def scripts(*calls):
    """Call scripts, which may print and end with exit code 2, and then do not go on."""
    for script, *flags in calls:
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            try:
                script.main([*flags, "--quiet", "--device", "cpu"])
            except SystemExit as stop:
                assert stop.code == 2, errors.getvalue()
                raise UserError(errors.getvalue().strip()) from None


RUN = ["--dataset", "embeddings", "--method"]
CAST = [cache_embeddings, "--dataset", "embeddings", "--root", "pairs.npz"]
NOTHING = {"--val-fraction": "0"}


def cached(folder, name="train0", method="clip"):
    """Cache some embeddings, train on them and evaluate; returns the folder of the cache."""
    values = np.random.default_rng(0).standard_normal((40, DIM)).astype(np.float32)
    np.savez(folder / "pairs.npz", image=values, text=values[::-1])
    scripts(CAST, [train, *RUN, method, "--val-fraction", "0"], [evaluation, *RUN, method])
    return folder / "embeddings/embeddings/given" / name


def metadata_of_training(folder):
    """The meta.json of a cache, read where it is trained on, and where it is cached again."""
    path = cached(folder) / "meta.json"
    again = [[train, *RUN, method, "--overwrite"] for method in ("clip", "knn")]
    strategy = json_files(json.loads(path.read_text()))
    return from_file(path, strategy, lambda: [must_answer(scripts, call) for call in (CAST, *again)])


def metadata_of_evaluation(folder):
    path = cached(folder, "test0") / "meta.json"
    return from_file(path, json_files(json.loads(path.read_text())), lambda: scripts([evaluation, *RUN, "clip"]))


def items(folder):
    """The image paths and captions of a cache."""
    path = cached(folder, "test0") / "items.jsonl"
    tree = [json.loads(line) for line in path.read_text().splitlines()]
    strategy = json_files(tree, lambda tree: b"\n".join(map(spelled, tree if isinstance(tree, list) else [tree])))
    return from_file(path, strategy, lambda: scripts([evaluation, *RUN, "clip"]))


def cached_array(name, split, read):
    """A kind: an array of a cache, as any array, or with its header or bytes spoiled."""

    def kind(folder):
        path = cached(folder, split) / name
        array = np.load(path)

        def saved(array):
            data = io.BytesIO()
            np.save(data, array, allow_pickle=True)
            return data.getvalue()

        others = ARRAY.filter(lambda array: array is not None).map(saved)
        changed = st.sampled_from(
            [array[:-1], array[::-1], array.astype(">f4"), array.astype(np.float64), array * 0, array - 9]
        ).map(saved)
        return from_file(path, npys(array) | others | changed, lambda: scripts(*read))

    return kind


def results(folder):
    """A result of eval.py, as report.py and reproduce.py read it."""
    cached(folder, method="knn")
    (path,) = folder.glob("results/**/*-retrieval.json")

    def read():
        parts = evaluations.read(folder / "results/embeddings")
        for write in (formats.to_text, formats.to_markdown, formats.to_latex, formats.to_csv):
            write(parts)
        [(part.facts, part.warnings, part.gallery, [run.arrays for run in part.runs]) for part in parts]

    return from_file(path, json_files(json.loads(path.read_text())), read)


def result_arrays(folder):
    cached(folder, method="knn")
    (path,) = folder.glob("results/**/*-retrieval.npz")

    def read():
        [dict(run.arrays) for part in evaluations.read(folder / "results/embeddings") for run in part.runs]

    return from_file(path, damaged(path.read_bytes()) | npzs(), read)


def study(folder):
    """A result of active_learning.py."""
    tree = make_result("random", 0)
    path = folder / "shapes/tiny/active/shifted-test/random-seed0.json"
    return from_file(path, json_files(tree), lambda: formats.to_text(studies.read(folder / "shapes")))


def trace(folder):
    path = write_trace(folder)
    tree = json.loads(path.read_text())
    return from_file(path, json_files(tree), lambda: formats.to_text(traces.read(folder / "shapes")))


def checkpoint(folder):
    """The weights of a run."""
    cached(folder)
    path = folder / "checkpoints/embeddings/given/clip/seed0/adaptor.pt"
    return from_file(path, damaged(path.read_bytes()), lambda: scripts([evaluation, *RUN, "clip"]))


def yaml_text(tree):
    try:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return json.dumps(tree).encode()


@st.composite
def yaml_files(draw, tree):
    """A YAML file like a valid one, with values, bytes or syntax spoiled."""
    data = draw(json_files(tree, yaml_text))
    if draw(st.integers(0, 4)) == 0:
        tricks = [
            b"&a [*a]", b"a: &a [b, *a]", b"a: &x {b: *x}", b"!!python/object:os.system x", b"<<: 3", b"? [1, 2]\n: 3",
            b"{[1]: 2}", b"2001-99-99", b"!!timestamp x", b"!!binary x", b"!!float x", b"!!int 0x", b"!!int ''", b"1_0",
            b"12:30:99", b"0b", b"0o9", b"1e", b".inf", b"~: ~", b"!!set {a}", b"!!omap [a]", b"!!pairs [a: 1]", b"?",
            b"---\n---", b"\t", b"%YAML 9.9", b"- a",
        ]  # fmt: skip
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.sampled_from(tricks)) + data[place:]
    return data


def say(answers):
    """Raise UserError with all sentences that were answered."""
    if sentences := list(filter(None, answers)):
        raise UserError(" ".join(sentences))


def run_configuration(folder):
    """The config.yaml of a run, where it is evaluated and where it is trained on."""
    cached(folder)
    path = folder / "checkpoints/embeddings/given/clip/seed0/config.yaml"
    calls = [evaluation, *RUN, "clip"], [train, *RUN, "clip", "--val-fraction", "0"]
    strategy = yaml_files(yaml.safe_load(path.read_text()))
    return from_file(path, strategy, lambda: say(must_answer(scripts, call) for call in calls))


def configuration_of(kind, name):
    """A kind: a YAML of configs/, where a run is configured and its adaptor and source are made."""

    def make(folder):
        shutil.copytree(configuration.HOME / "configs", folder / "configs")
        path = folder / f"configs/{kind}/{name}.yaml"

        def read():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(configuration, "HOME", folder)
                use(load_config("pairs", "pcmepp", "ViT-B-32-quickgelu"))
                configuration.contract_of("pcmepp")

        return from_file(path, yaml_files(yaml.safe_load(path.read_text())), read)

    return make


def use(config):
    """Do with a configuration what scripts do."""
    config.settle(100)
    assert config.checkpoint != config.result("a", "retrieval")
    config.save("config.yaml")
    must_answer(make_adaptor, config, 8)
    must_answer(make_source, config)
    must_answer(encoder_fingerprint, config.encoder)
    assert Config.load("config.yaml") == config or config != config  # NaN


KEYS = [
    *(f"data.{name}" for name in ("source", "root", "options", "options.folds", "options.seed", "options.x", "get")),
    *(f"encoder.{name}" for name in ("library", "model", "pretrained", "architecture", "preprocess", "precision")),
    *(f"model.{name}" for name in ("adaptor", "hidden", "mean", "scale", "vib", "start", "floor", "width", "pseudo")),
    *(f"optim.{name}" for name in ("lr", "min_lr", "momentum", "weight_decay", "name", "decay_scalars")),
    *(f"train.{name}" for name in ("epochs", "epochs.x", "batch_size", "val_fraction", "save_every", "patience", "")),
    "data", "model", "seed", "score", "hubs", "ordered", "", ".", "a..b", "__class__", "presets", "on", "contract",
]  # fmt: skip


def set_strings(folder):
    """--set key=value."""
    values = st.sampled_from(TEXTS) | st.text(max_size=12) | SCALARS.map(str) | st.sampled_from(NESTS).map(json.dumps)
    values |= yaml_files({"a": 1}).map(lambda data: data.decode("utf-8", "surrogateescape"))
    pairs = st.tuples(st.sampled_from(KEYS) | st.text(max_size=6), st.sampled_from(["=", "=", "=", ""]), values).map(
        "".join
    )

    def check(case):
        return must_answer(lambda: use(load_config("pairs", "pcmepp", settings=case)))

    return st.lists(pairs, min_size=1, max_size=3), check


def prompts(folder):
    """What is given to uncertainty.py, through the built-in backbone's tokenizer and an untrained method."""
    backbone, adaptor = make_backbone(load_backbone("shapes-tiny"), "cpu"), AsymVLM(64, width=8)

    def answer(case):
        uncertainty.measure(case, uncertainty.adapted(case, adaptor, backbone, "cpu"), "asymvlm-psd")

    def check(case):
        return must_answer(answer, case)

    pieces = st.sampled_from(
        [
            *TEXTS,
            "a photo of a circle",
            "<start_of_text>",
            "<|endoftext|>",
            "&amp;lt;",
            "\u0130" * 9,
            "👩‍👩‍👧",
            "C:\\x",
            ".",
        ]
    )
    text = (pieces | st.text(max_size=30)).filter(
        lambda text: text.strip() and "\0" not in text
    )  # as a command line has them
    return st.lists(text, min_size=1, max_size=3), check


KINDS = {
    kind.__name__: kind
    for kind in (
        coco, karpathy, flickr, hierarcaps, table, tabbed, lines, parquet_table, shards, npz, npy, safetensor,
        clip_retrieval, metadata_of_training, metadata_of_evaluation, items, results, result_arrays, study, trace,
        checkpoint, run_configuration, set_strings, prompts,
    )
} | {
    "method_yaml": configuration_of("methods", "pcmepp"),
    "dataset_yaml": configuration_of("datasets", "pairs"),
    "backbone_yaml": configuration_of("backbones", "ViT-B-32-quickgelu"),
    "cached_image": cached_array("image.npy", "train0", [[train, *RUN, "knn", "--overwrite"]]),
    "cached_rows": cached_array("image_of_text.npy", "test0", [[evaluation, *RUN, "clip"]]),
    "cached_ids": cached_array("image_id.npy", "test0", [[evaluation, *RUN, "clip"]]),
}  # fmt: skip


def with_header(header, array):
    """A .npy of an array under another header."""
    data = io.BytesIO()
    np.save(data, array)
    rest = data.getvalue()[10 + int.from_bytes(data.getvalue()[8:10], "little") :]
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + rest


def changed(path, **entries):
    """A case: a JSON file with some entries replaced, or removed by None."""

    def case(folder):
        values = json.loads(next(folder.glob(path)).read_text()) | entries
        return spelled({name: value for name, value in values.items() if value is not None})

    return case


def saved(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 6)}"
TEST_META = "embeddings/embeddings/given/test0/meta.json"
SHOWN = {  # what fuzzing has shown: the kind, the case and what the sentence holds
    "an open bracket in a header": ("npy", with_header("(" * 500, VALUES), "image.npy is not an .npy of plain numbers"),
    "a header of 5,000 digits": ("npy", with_header("1" * 5000, VALUES), "Cannot parse header: '111"),
    "an array of 22 TB": ("npy", with_header(HUGE, VALUES), "image.npy is not an .npy of plain numbers"),
    "an array of 22 TB in an .npz": ("npz", zipped([("image", with_header(HUGE, VALUES))]), "is not an .npz of plain"),
    "a member that is no array": ("npz", zipped([("image", b"x")]), "'image' is not an .npy"),
    "a cached header without an end": ("cached_image", with_header("{" * 9, VALUES), "image.npy cannot be read"),
    "cached rows of floats": ("cached_rows", saved(np.arange(8.0)), "holds float64 of shape (8,)"),
    "cached rows out of range": ("cached_rows", saved(np.arange(8) + 1), "holds numbers outside of 0 to 7: delete"),
    "an image without a caption": ("cached_rows", saved(np.arange(8) // 2), "has images without a caption: delete"),
    "cached ids of another size": ("cached_ids", saved(np.arange(7)), "image_id.npy cannot be read (it holds int64 of"),
    "metadata without a scale": ("metadata_of_evaluation", changed(TEST_META, logit_scale=None), "json is damaged"),
    "metadata with a text for a count": ("metadata_of_evaluation", changed(TEST_META, skipped="0"), "json is damaged"),
    "metadata without its files": ("metadata_of_evaluation", changed(TEST_META, files=3), "meta.json is damaged"),
    "metadata of deep brackets": ("metadata_of_evaluation", b"[" * 100_000, "meta.json is damaged"),
    "captions that are numbers": ("items", b'{"kind": "text", "value": 0.5}\n' * 16, "items.jsonl cannot be read"),
    "a result with a text for a count": (
        "results", changed("results/**/*-retrieval.json", repeated_captions="a"), "is damaged or not a result of"
    ),
    "a result's array without an end": (
        "result_arrays", zipped([("x", with_header("{" * 9, VALUES))]), "is missing or damaged: delete"
    ),
    "a line break in a column's name": ("hierarcaps", b'id,"a\nb",image_url\n', "it has id, a b, image_url"),
    "5,000 letters in --set": ("set_strings", ["a" * 5000], "aaa ... aaa"),
    "a line break in --set": ("set_strings", ["a\nb"], "--set takes key=value, not 'a b'"),
    "a run of no score": ("run_configuration", b"score: x", "config.yaml: score must be log_likelihood or similarity"),
    "a time that is none": ("dataset_yaml", b"data: !!timestamp x", "pairs.yaml is not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case", "sentence"), SHOWN.values(), ids=SHOWN)
def test_what_fuzzing_has_shown_is_named(tmp_path, monkeypatch, kind, case, sentence):
    monkeypatch.chdir(tmp_path)
    _, check = KINDS[kind](tmp_path)
    assert sentence in check(case(tmp_path) if callable(case) else case)


@pytest.mark.parametrize("headers", [{"GNU.sparse.map": "a"}, {"size": "9" * 30}], ids=["text", "beyond the file"])
def test_a_shard_with_a_size_that_is_none_is_named(tmp_path, headers):
    data, member = io.BytesIO(), tarfile.TarInfo("0.txt")
    member.pax_headers = headers
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("1.txt"))
    _, check = shards(tmp_path)
    assert "0.tar is not a complete .tar" in check(data.getvalue())


def test_an_unpickler_that_finds_nothing_names_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, check = checkpoint(tmp_path)
    data = next(tmp_path.glob("checkpoints/**/adaptor.pt")).read_bytes()
    start = data.index(b"\x80\x02}q\x00")
    assert "adaptor.pt is damaged or truncated" in check(data[:start] + b"\x80\x020q\x00" + data[start + 5 :])


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_ends_in_a_traceback(tmp_path, monkeypatch, kind, many):
    monkeypatch.chdir(tmp_path)
    strategy, check = KINDS[kind](tmp_path)
    tried = []

    @hypothesis.settings(
        max_examples=MANY if many else FEW, derandomize=not many, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def try_all(case):
        tried.append(0)
        check(case)

    try_all()
    if many:
        print(f"{kind}: {len(tried):,} cases")


BY_COVERAGE = """
import sys, warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["datasets", "tarfile", "zipfile", "numpy.lib", "csv", "json"]):
    import test_fuzz

kind, runs = sys.argv[1:]
strategy, check = test_fuzz.KINDS[kind](Path.cwd())
Path("corpus").mkdir()
warnings.simplefilter("ignore")
for number in range(20):
    Path("corpus", str(number)).write_bytes(strategy.example())
limits = ["-rss_limit_mb=0", "-max_len=20000"]
atheris.Setup([sys.argv[0], f"-runs={runs}", *limits, "corpus"], check)
atheris.Fuzz()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "npy", "safetensor", "shards", "parquet_table", "coco", "table", "lines"])
def test_no_bytes_end_in_a_traceback(tmp_path, kind):
    """The same readers under atheris, which goes after the bytes that reach new lines of Python."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    paths = [str(configuration.HOME), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", BY_COVERAGE, kind, str(MANY)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Done" in run.stderr
    print(f"{kind}: {MANY:,} more cases by coverage")
