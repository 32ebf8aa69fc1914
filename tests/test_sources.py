"""Sources of pairs: the images and captions that each layout lists, their order and ids, and the errors."""

import io
import json
import multiprocessing
import pickle
import sys
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch

import cache_embeddings
from datasets import fold_splits, name_id
from datasets.coco import Coco
from datasets.flickr import Flickr
from datasets.karpathy import Karpathy
from datasets.listing import list_split
from datasets.pairs import PairsFile
from datasets.shards import Shards
from utils.config import load_config, make_source
from utils.errors import UserError


def source_of(dataset, root, **options):
    """Make a source from its YAML, as the scripts do."""
    config = load_config(dataset)
    config.data.root = str(root)
    config.data.options |= options
    return make_source(config)


def path_id(folder, name):
    """Id of an image that is identified by its path."""
    return name_id((folder.resolve() / name).as_posix())


def ids(items):
    return [item.id for item in items]


def texts(source, split):
    """Return {image id: captions}; checks that captions are grouped by image in the order of images."""
    images, captions = source.images(split), source.captions(split)
    row = {image.id: number for number, image in enumerate(images)}
    assert len(row) == len(images) and len(set(ids(captions))) == len(captions)
    assert (np.diff([row[caption.image_id] for caption in captions]) >= 0).all()
    return {id: [caption.text for caption in captions if caption.image_id == id] for id in row}


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        ("coco", "captions_train2017.json is missing: unpack annotations_trainval2017.zip, train2017.zip and"),
        ("coco-karpathy", "dataset_coco.json is missing: unpack dataset_coco.json from https://cs.stanford.edu"),
        ("flickr30k", "has neither dataset_flickr30k.json nor results_20130124.token: put flickr30k-images"),
        ("flickr8k", "has neither dataset_flickr8k.json nor Flickr8k.token.txt: unpack Flickr8k_Dataset.zip"),
        ("cc3m", "cc3m-train-*.tar: download the shards cc3m-train-*.tar and cc3m-validation-*.tar"),
        ("webdataset", "*.tar: point --root to a folder of plain .tar shards, or to a pattern of them"),
    ],
)
def test_errors_for_missing_data_say_where_to_get_them(tmp_path, dataset, sentence):
    if ".tar" in sentence:
        pytest.importorskip("webdataset")
    with pytest.raises(UserError) as error:
        source_of(dataset, tmp_path).images(load_config(dataset).data.train_split)
    assert sentence in str(error.value) and "--root" in str(error.value) and "\n" not in str(error.value)


# Karpathy's JSON


def entry(id, split, year="val2014", captions=2, **more):
    name = f"COCO_{year}_{id:012d}.jpg"
    sentences = [{"raw": f" {split} {id}\n {i} ", "sentid": 10 * id + i, "tokens": []} for i in range(captions)]
    return {"cocoid": id, "split": split, "filepath": year, "filename": name, "sentences": sentences} | more


def karpathy(root, *entries, file="dataset_coco.json"):
    (root / file).write_text(json.dumps({"images": entries, "dataset": "x"}))
    return Karpathy(root)


SPLITS = ("test", "restval", "train", "val", "restval", "train")


@pytest.fixture
def four_splits(tmp_path):
    return karpathy(tmp_path, *(entry(90 - i, split) for i, split in enumerate(SPLITS)))


def test_karpathy_trains_on_restval_too(four_splits):
    assert ids(four_splits.images("train")) == [89, 88, 86, 85]  # the file's order
    assert ids(four_splits.images("train_only")) == [88, 85]
    assert ids(four_splits.images("restval")) == [89, 86]
    assert ids(four_splits.images("val")) == [87]
    assert texts(four_splits, "test") == {90: ["test 90 0", "test 90 1"]}
    assert ids(four_splits.captions("test")) == [900, 901]
    with pytest.raises(UserError, match="has no split 'dev'; it has restval, test, train, train_only, val"):
        four_splits.images("dev")


def test_karpathy_finds_images_of_2014_and_2017(tmp_path):
    entries = [entry(1, "train", "train2014"), entry(2, "train"), entry(3, "train")]
    names = [[image.path.relative_to(tmp_path).as_posix() for image in karpathy(tmp_path, *entries).images("train")]]
    for path in ("train2017/000000000001.jpg", "train2017/000000000002.jpg", "val2017/000000000003.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    names.append([image.path.relative_to(tmp_path).as_posix() for image in Karpathy(tmp_path).images("train")])
    (tmp_path / "val2017/000000000003.jpg").unlink()
    (tmp_path / "train2014").mkdir()
    names.append([image.path.relative_to(tmp_path).as_posix() for image in Karpathy(tmp_path).images("train")])
    first, second, third = (f"{item['filepath']}/{item['filename']}" for item in entries)
    assert names == [
        [first, second, third],
        ["train2017/000000000001.jpg", "train2017/000000000002.jpg", "val2017/000000000003.jpg"],
        [first, "train2017/000000000002.jpg", "train2017/000000000003.jpg"],
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.pop("cocoid"),
        lambda entry: entry.update(cocoid="7"),
        lambda entry: entry.pop("split"),
        lambda entry: entry.pop("filepath"),
        lambda entry: entry.update(filename=None),
        lambda entry: entry["sentences"][0].pop("sentid"),
        lambda entry: entry.update(sentences=3),
    ],
)
def test_karpathy_files_of_another_kind_are_named(tmp_path, spoil):
    item = entry(7, "train")
    spoil(item)
    with pytest.raises(UserError, match=r"dataset_coco\.json is not a file of Karpathy's splits \(images\[1\]: .*: d"):
        karpathy(tmp_path, entry(1, "train"), item).images("train")


def test_karpathy_files_that_hold_nothing_are_named(tmp_path):
    for content in (b"[]", b"{", b"caf\xe9" * 1000, b""):
        (tmp_path / "dataset_coco.json").write_bytes(content)
        with pytest.raises(UserError, match="is not a file of Karpathy's splits") as error:
            Karpathy(tmp_path).images("train")
        assert len(str(error.value)) < 300
    with pytest.raises(UserError, match="lists no images"):
        karpathy(tmp_path).images("train")
    with pytest.raises(UserError, match=r"lists (COCO_val2014_0+7\.jpg) and \1 with the same image id, 7"):
        karpathy(tmp_path, entry(7, "train"), entry(7, "test")).images("train")


def test_karpathy_over_real_coco_lists_what_coco_lists(shared, tmp_path):
    root = shared / "data" / "coco"
    coco = Coco(root)
    listing = json.loads((root / "annotations" / "captions_val2017.json").read_text())
    sentences = {}
    for annotation in sorted(listing["annotations"], key=lambda annotation: annotation["id"]):
        sentence = {"raw": annotation["caption"], "sentid": annotation["id"]}
        sentences.setdefault(annotation["image_id"], []).append(sentence)
    entries = [entry(id, "test", sentences=sentences[id]) for id in sorted(sentences)]
    (tmp_path / "train2017").symlink_to(root / "train2017")
    (tmp_path / "val2017").symlink_to(root / "val2017")
    source = karpathy(tmp_path, *entries)
    assert source.captions("test") == coco.captions("val")
    assert ids(source.images("test")) == ids(coco.images("val"))
    assert source.id_space("test") == coco.id_space("train") == "coco"
    present = [image.path.name for image in source.images("test") if image.path.is_file()]
    assert present == [image.path.name for image in coco.images("val") if image.path.is_file()] and len(present) == 1000


# Flickr


PHOTOS = {"flickr30k": ("1000092795", "36979", "65567"), "flickr8k": ("1000268201_693b08cb0e", "17_a", "3_0b")}
FILES = {
    "flickr30k": ("dataset_flickr30k.json", "results_20130124.token", ("train.txt", "val.txt", "test.txt")),
    "flickr8k": (
        "dataset_flickr8k.json",
        "Flickr8k.token.txt",
        [f"Flickr_8k.{split}Images.txt" for split in ("train", "dev", "test")],
    ),
}


def tokens(root, dataset):
    """Write the publisher's files for three photos, one per split, with the oddities of the real files."""
    _, file, lists = FILES[dataset]
    lines = [f"{photo}.jpg#{i}\tA caf\u00e9 \u0085 of {photo} , {i} .\n" for photo in PHOTOS[dataset] for i in range(2)]
    lines.insert(2, "2258277193_586949ec62.jpg.1#0\tAn image that is none .\n")
    lines.append("99_unlisted.jpg#0\tAn image in no split .\n")
    (root / file).write_text("".join(lines), encoding="utf-8")
    for photo, name in zip(PHOTOS[dataset], lists):
        (root / name).write_text(f"{photo}.jpg\n" if dataset == "flickr8k" else f"{photo}\n")


def flickr_json(root, dataset, photos=None):
    entries = []
    for number, (photo, split) in enumerate(zip(photos or PHOTOS[dataset], ("train", "val", "test"))):
        sentences = [{"raw": f"A caf\u00e9 of {photo} , {i} .", "sentid": 5 * number + i} for i in range(2)]
        entries.append({"filename": f"{photo}.jpg", "imgid": number, "split": split, "sentences": sentences})
    (root / FILES[dataset][0]).write_text(json.dumps({"images": entries}))


@pytest.mark.parametrize("dataset", ["flickr30k", "flickr8k"])
def test_both_kinds_of_flickr_files_list_the_same_pairs(tmp_path, dataset):
    tokens(tmp_path, dataset)
    original = source_of(dataset, tmp_path)
    listed = {split: (original.images(split), texts(original, split)) for split in ("train", "val", "test")}
    flickr_json(tmp_path, dataset)
    source = source_of(dataset, tmp_path)
    assert listed == {split: (source.images(split), texts(source, split)) for split in ("train", "val", "test")}
    photo = PHOTOS[dataset][0]
    assert listed["train"][1] == {int(photo.split("_")[0]): [f"A caf\u00e9 of {photo} , {i} ." for i in range(2)]}
    assert ids(original.captions("val")) == [3, 4] and ids(source.captions("val")) == [5, 6]
    with pytest.raises(UserError, match="has no split 'dev'; it has test, train, val"):
        original.images("dev")


def test_flickr_sources_share_their_ids_and_find_their_folders(tmp_path):
    for dataset, folder in (("flickr30k", "images"), ("flickr8k", "Flicker8k_Dataset")):
        root = tmp_path / dataset
        (root / folder).mkdir(parents=True)
        flickr_json(root, dataset, ["12345_ab" if dataset == "flickr8k" else "12345"])
        source = source_of(dataset, root)
        (image,) = source.images("train")
        assert (image.id, source.id_space("train"), image.path.parent) == (12345, "flickr", root / folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("Flickr8k.token.txt", b"1_a.jpg#0 no tab\n", "line 1 is not 'name.jpg#0', a tab and a caption"),
        ("Flickr8k.token.txt", b"1_a.jpg\tno number\n", "line 1 is not 'name.jpg#0', a tab and a caption"),
        ("Flickr8k.token.txt", b"1_a.jpg#0\tcaf\xe9\n", "is not UTF-8"),
        ("Flickr8k.token.txt", b"1_a.jpg#0\tone\n\n1_a.jpg#0\ttwo\n", "lines 1 and 3 are both '1_a.jpg#0': leave one"),
        ("Flickr_8k.devImages.txt", b"2_a.jpg\n", "devImages.txt lists 2_a.jpg, which has no caption in .*token.txt"),
        ("Flickr_8k.devImages.txt", b"99_unlisted.jpg\n" * 2, r"lists (99_unlisted.jpg) and \1 with the same image id"),
        ("Flickr_8k.testImages.txt", None, "testImages.txt is missing: unpack Flickr8k_Dataset.zip"),
    ],
)
def test_broken_flickr_files_are_named(tmp_path, file, content, sentence):
    tokens(tmp_path, "flickr8k")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        source_of("flickr8k", tmp_path).images("train")


def test_photos_that_would_share_an_id_are_refused(tmp_path):
    flickr_json(tmp_path, "flickr8k", ["17_a", "17_b"])
    same_id = r"lists 17_a\.jpg and 17_b\.jpg with the same image id, 17: leave one of them out"
    with pytest.raises(UserError, match=same_id):
        source_of("flickr8k", tmp_path).images("train")
    (tmp_path / "dataset_flickr8k.json").unlink()
    (tmp_path / "Flickr8k.token.txt").write_text("17_a.jpg#0\tone\n17_b.jpg#0\ttwo\n")
    for name, photo in zip(FILES["flickr8k"][2], ("17_a", "17_a", "17_b")):
        (tmp_path / name).write_text(f"{photo}.jpg\n")
    with pytest.raises(UserError, match=same_id):
        source_of("flickr8k", tmp_path).images("train")
    (tmp_path / FILES["flickr8k"][2][2]).write_text("17_a.jpg\n")  # one image in all splits is not an error here
    assert source_of("flickr8k", tmp_path).images("train") == source_of("flickr8k", tmp_path).images("test")
    flickr_json(tmp_path, "flickr8k", ["cat"])
    with pytest.raises(UserError, match=r"'cat\.jpg' in .* does not begin with a Flickr photo id"):
        source_of("flickr8k", tmp_path).images("train")


def test_flickr_is_constructed_as_its_yaml_says(tmp_path):
    assert isinstance(source_of("flickr30k", tmp_path), Flickr)


# Tables of pairs


ROWS = [
    ("b.jpg", "two  cats\n on a mat", "train"),
    ("a.jpg", 'a "dog", red', "test"),
    ("./b.jpg", "caf\u00e9 \u2028 \N{CAT FACE}", "train"),
    ("sub/c.jpg", "", "train"),
    ("b.jpg", "cats", "test"),
    ("/elsewhere/d.jpg", "word " * 10_000 + "end", "val"),
]


def write(path, rows=ROWS, names=("image", "caption", "split")):
    """Write a table in the format that its name says."""
    import csv

    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row)), ensure_ascii=len(row[1]) % 2 == 0) + "\n\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = dict(zip(names, map(list, zip(*rows))))
        parquet.write_table(sys.modules["pyarrow"].table(columns | {"bytes": [b"x"] * len(rows)}), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter={".csv": ",", ".tsv": "\t"}[path.suffix]).writerows([names, *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_a_table_is_read_alike_in_every_format(tmp_path, suffix):
    path = write(tmp_path / f"mine{suffix.lower()}")
    source = source_of("pairs", path.rename(tmp_path / f"mine{suffix}"))
    b, c = source.images("train")
    assert (b.path, c.path) == (tmp_path / "b.jpg", tmp_path / "sub" / "c.jpg")
    assert (b.id, c.id) == (path_id(tmp_path, "b.jpg"), path_id(tmp_path, "sub/c.jpg"))
    assert texts(source, "train") == {b.id: ["two cats on a mat", "caf\u00e9 \N{CAT FACE}"], c.id: [""]}
    assert ids(source.captions("train")) == [0, 2, 3]
    # An image may be in two splits: eval.py refuses to test on training images.
    assert ids(source.images("test")) == [path_id(tmp_path, "a.jpg"), b.id] and ids(source.captions("test")) == [1, 4]
    (d,) = source.images("val")
    assert d.path.as_posix() == "/elsewhere/d.jpg" and len(source.captions("val")[0].text.split()) == 10_001
    assert len(source.images("all")) == 4 and sorted(ids(source.captions("all"))) == [*range(6)]  # an image once
    with pytest.raises(UserError, match="it has no split 'dev'; it has train, test, val"):
        source.images("dev")


def test_images_without_a_split_are_put_into_parts(tmp_path):
    path = write(tmp_path / "mine.csv", [(f"{i % 20}.jpg", f"caption {i}") for i in range(60)], ("path", "title"))
    source = PairsFile(path, seed=3)
    everything = source.images("all")
    assert ids(everything) == [path_id(tmp_path, f"{i}.jpg") for i in range(20)]
    assert ids(source.captions("all"))[:6] == [0, 20, 40, 1, 21, 41]
    masks = fold_splits(20, 5, 3, "here")
    for split in ("train", "test", "test4"):
        assert source.images(split) == [image for image, is_in in zip(everything, masks[split]) if is_in]
    train, test = texts(source, "train"), texts(source, "test")
    assert not train.keys() & test.keys() and {**train, **test} == texts(source, "all")
    with pytest.raises(UserError, match="has 20 images, too few for 21 parts"):
        PairsFile(path, folds=21).images("train")
    for options in ({"folds": 1}, {"seed": -1}, {"folds": "5"}):
        with pytest.raises(UserError, match="folds must be an integer of at least 2"):
            source_of("pairs", path, **options)


def test_columns_and_folder_can_be_named(tmp_path, monkeypatch):
    names = ("image", "photo", "text", "caption", "part", "split")
    path = write(tmp_path / "mine.csv", [("x.jpg", "a.jpg", "right", "wrong", "dev", "train")], names)
    options = {"image_column": "photo", "caption_column": "text", "split_column": "part", "image_root": "images"}
    monkeypatch.chdir(tmp_path)
    source = source_of("pairs", "mine.csv", **options)
    assert source.images("dev")[0].path == tmp_path / "images" / "a.jpg"
    assert source.captions("dev")[0].text == "right"
    assert source.id_space("dev") == source_of("pairs", path).id_space("train") == "files"
    assert source_of("pairs", path).captions("train")[0].text == "wrong"
    for kind in ("image", "caption", "split"):
        with pytest.raises(UserError, match=f"it has no column 'nothing'; it has image, photo, .*{kind}_column=NAME"):
            source_of("pairs", path, **{f"{kind}_column": "nothing"}).images("train")


def test_one_file_has_one_id_however_its_path_is_written(tmp_path):
    rows = [("a.jpg", "one"), ("sub/../a.jpg", "two"), (f"{tmp_path}/a.jpg", "three"), (" a.jpg ", "four")]
    source = PairsFile(write(tmp_path / "mine.csv", [*rows, ("b.jpg", "x")], ("image", "caption")), folds=2)
    assert texts(source, "all")[path_id(tmp_path, "a.jpg")] == ["one", "two", "three", "four"]


def test_names_are_found_in_either_spelling_of_unicode(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    rows = [(f"{composed}/{composed}.jpg", "one"), (f"{decomposed}/b.jpg", "two"), (f"{composed}/absent.jpg", "three")]
    path = write(tmp_path / "mine.csv", rows, ("image", "caption"))
    (tmp_path / decomposed).mkdir()
    for name in (f"{decomposed}.jpg", "b.jpg"):
        (tmp_path / decomposed / name).touch()
    listing = list_split(source_of("pairs", path, folds=2), "all", "skip")
    assert [image.path.relative_to(tmp_path).as_posix() for image in listing.images] == [
        f"{decomposed}/{decomposed}.jpg", f"{decomposed}/b.jpg",
    ]  # fmt: skip
    assert [item["reason"] for item in listing.skipped] == ["absent"]
    assert listing.images[0].id == path_id(tmp_path, rows[0][0])


def test_lone_surrogates_are_left_as_they_are(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"image": "\\ud800.jpg", "caption": "a \\ud800 b", "split": "train"}')
    source = PairsFile(tmp_path / "mine.jsonl")
    assert source.captions("train")[0].text == "a \ud800 b" and not source.images("train")[0].path.is_file()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("m.csv", b"", "it is empty"),
        ("m.jsonl", b"\xef\xbb\xbf \n\n", "it is empty"),
        ("m.csv", b"image,caption\n", "it holds no pairs"),
        ("m.csv", "image,caption".encode("utf-16"), "line 1 is not UTF-8"),
        ("m.csv", b"img;caption\n", "it has img;caption: separate the columns by commas"),
        ("m.csv", b"image,words\n", "it has no column 'caption' or .*; it has image, words: choose .*caption_column="),
        ("m.csv", b"image,caption,caption\n", "it has two columns 'caption'"),
        ("m.csv", b"image,caption\n\na.jpg,red, blue\n", "line 3 has 3 fields, but the header has 2: put .* comma in"),
        ("m.tsv", b"image\tcaption\na.jpg\tone\ttwo\n", "line 2 has 3 fields, but the header has 2: put .* a tab in"),
        ("m.csv", b"a.jpg,a dog\nb.jpg,a cat\n", "it has a.jpg, a dog: choose .*, or write the names above it"),
        (
            "m.csv",
            b'image,caption\na.jpg,"one\nb.jpg,two\n',
            "line 2 cannot be read .a quote in it is never closed.: put fields that contain quotes in quotes",
        ),
        ("m.csv", b"image,caption\n,one\n", "'image' of line 2 is empty"),
        ("m.csv", b"image,caption,split\na.jpg,one,\n", "'split' of line 2 is empty"),
        ("m.csv", b"image,caption\nhttps://x.org/a.jpg,one\n", "line 2 is a URL, https://x.org/a.jpg: download"),
        ("m.jsonl", b'{"image": "a"}\n\n{"image": 1,}', "line 3 is not valid JSON"),
        ("m.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
        ("m.jsonl", b'["a.jpg", "one"]', "line 1 is not an object"),
        ("m.jsonl", b'{"image": null, "caption": "x"}', "'image' of line 1 is null or missing: fix the row, or rem"),
        ("m.jsonl", b'{"image": 1, "caption": "x"}\n' * 3, "'image' of line 1 is not a string but 1, like all 3: "),
        ("m.jsonl", b'{"image": "a", "caption": "", "split": "x"}\n{"image": "b", "caption": ""}', "'split' of line 2"),
        ("m.parquet", b"PAR1", "it is not a Parquet file that pyarrow can read"),
        ("m.xlsx", b"PK", r"its name must end in \.csv, \.tsv, \.jsonl, \.parquet"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read_are_named(tmp_path, name, content, sentence):
    if "pyarrow" in sentence:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        PairsFile(tmp_path / name).images("train")
    assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)


def test_parquet_of_another_kind_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "m.parquet", [("a.jpg", "one"), (None, "two")], ("image", "caption"))
    with pytest.raises(UserError, match="'image' of row 1 is null or missing"):
        PairsFile(path).images("train")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extra\.txt"):
        PairsFile(path).images("train")


def captions_of(path, on_error="stop", **options):
    """Captions by image name, of a table whose images exist."""
    source = source_of("pairs", path, folds=2, **options)
    for image in source.images("all"):
        image.path.touch()
    listing = list_split(source, "all", on_error)
    name = {image.id: image.path.name for image in listing.images}
    captions = [(name[caption.image_id], caption.text) for caption in listing.captions]
    return captions, [item["reason"] for item in listing.skipped]


THREE = [("a.jpg", "one"), ("a.jpg", "it's two"), ("b.jpg", "three")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", "image_name| comment_number| comment\na.jpg| 0| one\na.jpg| 1| it's two\nb.jpg| 0| three\n"),
        ("m.csv", "image;caption\na.jpg;one\na.jpg;it's two\nb.jpg;three\n"),
        ("m.csv", "image\tcaption\na.jpg\tone\na.jpg\tit's two\nb.jpg\tthree\n"),
        ("m.tsv", "image,caption\na.jpg,one\na.jpg,it's two\nb.jpg,three\n"),
        ("m.csv", 'raw,sentids,filename\n"[""one"", ""it\'s two""]","[0, 1]",a.jpg\nthree,[2],b.jpg\n'),
        ("m.csv", 'image,caption\na.jpg,"[\'one\', ""it\'s two""]"\nb.jpg,[\'three\']\n'),
        ("m.csv", 'image,caption\na.jpg,"[\'one\'\n ""it\'s two""]"\nb.jpg,[\'three\']\n'),  # as pandas writes arrays
        ("m.csv", "image,caption_0,caption_1\na.jpg,one,it's two\nb.jpg,three,\n"),
        ("m.jsonl", '{"image": "a.jpg", "caption": ["one", "it\'s two"]}\n{"image": "b.jpg", "caption": "three"}'),
        (
            "m.jsonl",
            '{"image": "a.jpg", "text 1": "one", "text 2": "it\'s two"}\n{"image": "b.jpg", "text 1": "three"}',
        ),
    ],
)
def test_usual_layouts_of_tables_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert captions_of(tmp_path / name) == (THREE, [])


def test_captions_of_tables_that_are_none_are_left_out_one_by_one(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [*THREE, ("b.jpg", None), ("c.jpg", "x"), ("b.jpg", "three")]
    lines = [json.dumps({"image": image, "caption": text}).encode() for image, text in rows]
    lines[4] = lines[4].replace(b'"x"', b'"caf\xe9"')
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    csv = "image|caption\n" + "\n".join(image if text is None else f"{image}|{text}" for image, text in rows)
    (tmp_path / "m.csv").write_bytes(csv.replace("|x", "|caf\xe9").encode("latin-1"))
    import pyarrow.parquet

    broken = pyarrow.array([text and text.replace("x", "caf\xe9").encode("latin-1") for _, text in rows])
    broken = pyarrow.StringArray.from_buffers(len(rows), *broken.buffers()[1:], broken.buffers()[0])
    table = pyarrow.table({"image": [image for image, _ in rows], "text": broken})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    for name, where in (("m.jsonl", "line 4"), ("m.csv", "line 5"), ("m.parquet", "row 3")):
        sentence = rf"caption 3 of 'all' \({where}\), of .*b\.jpg, is null or missing \(and 1 more\)"
        with pytest.raises(UserError, match=sentence):
            captions_of(tmp_path / name)
        captions, reasons = captions_of(tmp_path / name, "skip")
        assert captions == THREE and reasons[:2] == ["is null or missing", "is listed twice"]
        assert "not UTF-8" in reasons[2] and reasons[3:] == ["no caption"]


def test_images_inside_a_parquet_file_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": jpeg(10 * row), "path": "same.jpg"} for row in range(5)]
    images.append({"bytes": None, "path": "other.jpg"})
    (tmp_path / "other.jpg").write_bytes(jpeg(50))
    captions = [[f"{row} a", f"{row} b"] for row in range(6)]
    for inside in (images, [image["bytes"] or jpeg(50) for image in images]):
        table = sys.modules["pyarrow"].table({"image": inside, "caption": captions, "split": ["test"] * 6})
        parquet.write_table(table, tmp_path / "m.parquet", row_group_size=2)
        source = source_of("pairs", tmp_path / "m.parquet")
        listed = source.images("test")
        assert [caption.text for caption in source.captions("test")] == [text for texts in captions for text in texts]
        assert [image.place for image in listed] == [f"m.parquet row {row}" for row in range(6)]
        sent = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
        for row in (0, 5, 3, 2):
            assert color(source.open(listed[row])) == color(sent.open(listed[row])) == 10 * row
        assert len(list_split(source, "test").captions) == 12
    for empty in (None, {"bytes": None, "path": None}):
        cells = [images[0] if isinstance(empty, dict) else jpeg(0), empty]
        table = sys.modules["pyarrow"].table({"image": cells, "caption": ["a", "b"], "split": ["test"] * 2})
        parquet.write_table(table, tmp_path / "e.parquet")
        source = source_of("pairs", tmp_path / "e.parquet")
        with pytest.raises(OSError, match="its cell in the table is empty"):  # found by fuzzing: a TypeError
            source.open(source.images("test")[1])


def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    """As on the hub: names tell the split, images lie inside or beside, rows are counted by file."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002-0f9", "test-00000-of-00001")):
        table = {"image": [jpeg(40 * number), jpeg(40 * number + 20)], "text": [f"{name} a", f"{name} b"]}
        parquet.write_table(sys.modules["pyarrow"].table(table), tmp_path / f"{name}.parquet", row_group_size=1)
    source = pickle.loads(pickle.dumps(source_of("pairs", tmp_path)))
    images = source.images("train")
    assert [image.place for image in images] == [
        f"{name}.parquet row {row}" for name in ("train-00000-of-00002", "train-00001-of-00002-0f9") for row in (0, 1)
    ]
    assert [color(source.open(image)) for image in reversed(images)] == [60, 40, 20, 0]
    assert [caption.text[-1] for caption in source.captions("test")] == ["a", "b"]
    assert len(list_split(source, "train").captions) == 4
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "val.parquet")  # names that tell no split
    assert len(source_of("pairs", tmp_path).images("all")) == 6
    other = sys.modules["pyarrow"].table({"image": [jpeg(0)], "words": ["c"]})
    parquet.write_table(other, tmp_path / "val.parquet")
    with pytest.raises(UserError, match=r"val\.parquet: .*\"text\""):
        source_of("pairs", tmp_path).images("all")


def test_captions_in_text_files_beside_pictures(tmp_path):
    for name, text in (("a.jpg", "one\ntwo\n\n"), ("sub/b.PNG", "\ufeffthree"), ("sub/c.heic", "four")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(10))
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    for name in ("a.json", "README.txt", ".hidden.jpg"):
        (tmp_path / name).write_text("other")
    listing = list_split(source_of("pairs", tmp_path, folds=2), "all")
    assert [caption.text for caption in listing.captions] == ["one", "two", "three", "four"]
    assert [image.path.relative_to(tmp_path).as_posix() for image in listing.images] == [
        "a.jpg",
        "sub/b.PNG",
        "sub/c.heic",
    ]
    (tmp_path / "d.jpg").write_bytes(jpeg(10))  # without a caption
    with pytest.raises(UserError, match=r"d\.jpg, is null or missing: fix it, or leave it out"):
        list_split(source_of("pairs", tmp_path, folds=2), "all")


def test_no_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"it is a folder without .* beside them: point --root to the file of pairs"):
        source_of("pairs", tmp_path).images("train")
    with pytest.raises(UserError, match=r"mine\.csv: it is missing: point --root to a \.csv, \.tsv"):
        source_of("pairs", tmp_path / "mine.csv").images("train")


# Shards


def jpeg(color):
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (color, 0, 0)).save(file, format="JPEG")
    return file.getvalue()


def shard(path, members, mode="w", **format):
    with tarfile.open(path, mode, **format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, color, caption):
    return {f"{key}.jpg": jpeg(color), f"{key}.json": b'{"other": "of json"}', f"{key}.txt": caption.encode()}


@pytest.fixture
def shards(tmp_path):
    """Two shards that use the same keys for different samples, with members that webdataset skips."""
    pytest.importorskip("webdataset")
    long = "deep/" * 30 + "0" * 90
    first = sample("000", 10, " two\n cats ") | sample("001", 20, "caf\u00e9") | sample(long, 30, "long name")
    shard(tmp_path / "a-0.tar", first | {"__index__": b"1", "README": b"no suffix", "._x.txt": b""})
    second = {"000.PNG": jpeg(40), "000.seg.png": b"?", "000.txt": b"png"}
    second |= {"dir/001.JPEG": jpeg(50), "dir/001.json": b'{"caption": "of json", "alt": "other"}', "1.webp": jpeg(60)}
    with tarfile.open(shard(tmp_path / "a-1.tar", second), "a") as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    return tmp_path


def color(image):
    return round(image.convert("RGB").getpixel((4, 4))[0], -1)


def test_shards_list_images_and_captions(shards):
    source = source_of("webdataset", shards, folds=2)
    images = source.images("all")
    keys = ["000", "001", "deep/" * 30 + "0" * 90]
    names = [f"a-0.tar/{key}.jpg" for key in keys] + ["a-1.tar/000.png", "a-1.tar/dir/001.jpeg", "a-1.tar/1.webp"]
    assert [image.place for image in images] == names
    assert ids(images) == [path_id(shards, name.rsplit(".", 1)[0]) for name in names]
    assert [image.path.name for image in images] == ["a-0.tar"] * 3 + ["a-1.tar"] * 3
    captions = source.captions("all")
    assert [caption.text for caption in captions] == ["two cats", "caf\u00e9", "long name", "png", "of json", ""]
    assert ids(captions) == ids(images)
    assert [color(source.open(image)) for image in images] == [10, 20, 30, 40, 50, 60]
    other = Shards(shards, caption_key="alt")
    assert [caption.text for caption in other.captions("all")] == ["", "", "", "", "other", ""]


def test_shards_list_what_webdataset_streams(shards):
    import webdataset

    stream = webdataset.WebDataset([str(shards / "a-0.tar"), str(shards / "a-1.tar")], shardshuffle=False)
    source = Shards(shards)
    images, captions = source.images("all"), source.captions("all")
    streamed = list(stream)
    assert len(streamed) == len(images) == 6
    for item, image, caption in zip(streamed, images, captions):
        assert image.name.startswith(f"{image.path.name}/{item['__key__']}.") and item["__url__"] == str(image.path)
        kind = image.name.rsplit(".", 1)[1]
        assert source.open(image).tobytes() == PIL.Image.open(io.BytesIO(item[kind])).tobytes()
        if "txt" in item:
            assert caption.text == " ".join(item["txt"].decode().split())


def test_a_sample_has_one_id_in_every_split(shards):
    everything = Shards(shards)
    assert ids(Shards(f"{shards}/a-{{0..1}}.tar").images("all")) == ids(everything.images("all"))
    assert ids(Shards(f"{shards}/a-1.tar", folds=2).images("all")) == ids(everything.images("all"))[3:]
    assert ids(Shards(f"{shards}/*-[0].tar", folds=2).images("all")) == ids(everything.images("all"))[:3]
    split = Shards(shards, splits={"train": "a-{0..1}.tar", "val": "./?-1.tar"})
    assert ids(split.images("val")) == ids(split.images("train"))[3:] == ids(everything.images("all"))[3:]
    spaces = {source.id_space(name) for source in (everything, split) for name in ("train", "val")}
    assert spaces == {"shards"}
    train, test = ids(everything.images("train")), ids(everything.images("test"))
    masks = fold_splits(6, 5, 0, "here")
    assert [id in test for id in ids(everything.images("all"))] == masks["test"].tolist()
    assert not set(train) & set(test) and ids(everything.captions("test")) == test
    with pytest.raises(UserError, match="has no split 'dev'; it has train, val"):
        split.images("dev")
    with pytest.raises(UserError, match="has no split 'dev'; it has all, train, test, train0"):
        everything.images("dev")
    with pytest.raises(UserError, match="has 6 images, too few for 7 parts"):
        Shards(shards, folds=7).images("train")


def test_cc3m_takes_its_splits_by_name(tmp_path):
    pytest.importorskip("webdataset")
    for name, caption in (("cc3m-train-0000", "one"), ("cc3m-train-0001", "two"), ("cc3m-validation-0000", "three")):
        shard(tmp_path / f"{name}.tar", sample("000", 10, caption))
    source = source_of("cc3m", tmp_path)
    assert [caption.text for caption in source.captions("train")] == ["one", "two"]
    assert [caption.text for caption in source.captions("val")] == ["three"]


class Colors(torch.utils.data.Dataset):
    def __init__(self, source, images):
        self.source, self.images = source, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return color(self.source.open(self.images[row]))


@pytest.mark.parametrize("start", ["fork", "forkserver"])  # the latter without an open file, like spawn
def test_workers_open_images(shards, start):
    multiprocessing.set_forkserver_preload(["torch"])  # as in fresh.py, whose server it shares
    source = Shards(shards)
    images = source.images("all")
    data = Colors(source, images)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context=start)
    assert torch.cat(list(loader)).tolist() == [10, 20, 30, 40, 50, 60]
    assert color(pickle.loads(pickle.dumps(source)).open(images[4])) == 50


def test_a_file_that_is_not_an_image_raises_what_pillow_raises(tmp_path):
    pytest.importorskip("webdataset")
    shard(tmp_path / "a.tar", {"0.jpg": b"no image", "0.txt": b"x"})
    source = Shards(tmp_path)
    with pytest.raises(PIL.UnidentifiedImageError):
        source.open(source._samples("*.tar")[0][0])


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"0.txt": b"x", "0.cls": b"1"}, r"no sample of .*a\.tar has an image, but \.cls, \.txt: make it again"),
        ({"0.a.jpg": b"", "0.b.jpg": b""}, r"a\.tar: sample '0' has \.a\.jpg and \.b\.jpg: a key ends at the first"),
        ({"0.jpg": b"", "0.JPG": b""}, r"a\.tar has the file 0\.JPG twice"),
        ({"0.jpg": b"", "0.json": b"{"}, r"a\.tar: 0\.json is not a JSON object"),
        ({"0.jpg": b"", "0.json": b"[]"}, r"a\.tar: 0\.json is not a JSON object"),
        ({}, r"\*\.tar holds no samples"),
    ],
)
def test_shards_that_hold_something_else_are_named(tmp_path, members, sentence):
    pytest.importorskip("webdataset")
    shard(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=sentence) as error:
        Shards(tmp_path).images("all")
    assert "\n" not in str(error.value)


def test_shards_as_they_are_found_are_read(tmp_path):
    pytest.importorskip("webdataset")
    first = {"./0.jpg": jpeg(10), "a/2.jpg": jpeg(30), "1.input.jpg": jpeg(20)}  # not in the order of their captions
    hidden = {"./._0.jpg": b"macOS", "a/._2.jpg": b"", "__MACOSX/0.jpg": b"", ".DS_Store": b"", "Thumbs.db": b""}
    last = {"a/2.txt": b"two", "1.txt": b"one", "./0.json": b'{"caption": ["null", "zero"]}', "index.json": b"{}"}
    last |= {"README.md": b"read"}
    bmp = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (40, 0, 0)).save(bmp, "BMP")
    shard(tmp_path / "a.tar", first | hidden | last | {"3.bmp": bmp.getvalue(), "3.txt": b"three"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, target, kind in (("4.jpg", "0.jpg", tarfile.LNKTYPE), ("b/5.jpg", "../3.bmp", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    source = source_of("webdataset", tmp_path)
    pairs = source.pairs("all")
    assert [image.place.removeprefix("a.tar/") for image, _ in pairs] == [
        "./0.jpg", "a/2.jpg", "1.input.jpg", "3.bmp", "4.jpg", "b/5.jpg",
    ]  # fmt: skip
    assert [[caption.text for caption in captions] for _, captions in pairs] == [
        ["null", "zero"], ["two"], ["one"], ["three"], [""], [""],
    ]  # fmt: skip
    assert [color(source.open(image)) for image, _ in pairs] == [10, 30, 20, 40, 10, 40]
    assert pairs[0][1][0].id == pairs[0][0].id != pairs[0][1][1].id


def test_samples_of_shards_that_lack_something_are_left_out_one_by_one(tmp_path):
    pytest.importorskip("webdataset")
    whole = sample("0", 10, "zero") | sample("1", 20, "one")
    odd = {"2.txt": b"no image", "3.jpg": b"", "3.txt": b"caf\xe9", "4.jpg": b"", "4.json": b'{"caption": NaN}'}
    shard(tmp_path / "a.tar", whole | odd)
    source = Shards(tmp_path)
    with pytest.raises(UserError, match=r"1 of the 5 images of 'all' are absent from .*a\.tar \(the first is 2\)"):
        list_split(source, "all")
    listing = list_split(source, "all", "skip")
    assert [caption.text for caption in listing.captions] == ["zero", "one"]
    reasons = [item["reason"] for item in listing.skipped]
    assert reasons[0] == "absent" and "not UTF-8" in reasons[1] and reasons[2] == "is null or missing"
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("5.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"a\.tar: 5\.jpg is a link to elsewhere\.jpg, which is no file of"):
        Shards(tmp_path).images("all")


def test_damaged_shards_are_named(tmp_path):
    pytest.importorskip("webdataset")
    path = shard(tmp_path / "a.tar", {"0.jpg": jpeg(1), "0.txt": b"one", "1.jpg": jpeg(2), "1.txt": b"two"})
    whole = path.read_bytes()
    assert len(Shards(tmp_path, folds=2).images("all")) == 2
    with tarfile.open(path) as tar:
        second = tar.getmember("1.jpg")
    spoiled = bytearray(whole)
    spoiled[second.offset : second.offset + 20] = b"\xff" * 20
    # Cut in an image, in a header, between two members; a header damaged in the middle; nothing; something else.
    cut = [whole[: second.offset_data + 100], whole[: second.offset + 200], whole[: second.offset]]
    for content in (*cut, bytes(spoiled), b"", b"no tar " * 200):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar is not a complete \.tar \(.*\): download or make it again"):
            Shards(tmp_path).images("all")


def test_shards_that_are_not_there_or_not_plain_are_named(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    for url in ("pipe:curl -s https://x.org/a.tar", "https://x.org/a-{0..9}.tar", "s3://bucket/a.tar", "gs://x/a.tar"):
        with pytest.raises(UserError, match="are not on this computer: download them"):
            source_of("webdataset", url)
        with pytest.raises(UserError, match="are not on this computer: download them"):
            Shards(tmp_path, splits={"train": url})
    shard(tmp_path / "a-0.tar", sample("000", 10, "one"))
    missing = r"there is no shard .*a-1\.tar: point --root to a folder of plain \.tar shards"
    with pytest.raises(UserError, match=missing):
        source_of("webdataset", tmp_path / "a-{0..2}.tar").images("all")
    with pytest.raises(UserError, match=r"the pattern a-\{0 cannot be read .*: close its braces"):
        source_of("webdataset", tmp_path / "a-{0").images("all")
    with pytest.raises(UserError, match="splits must give a pattern of shards for each split"):
        source_of("webdataset", tmp_path, splits=["a-0.tar"])
    shard(tmp_path / "b.tar", sample("000", 10, "one"), "w:gz")
    with pytest.raises(UserError, match=r"b\.tar is compressed, which rules out random access: gunzip"):
        Shards(tmp_path / "b.tar").images("all")
    for mode in ("w:xz", "w:bz2"):
        shard(tmp_path / "b.tar", sample("000", 10, "one"), mode)
        with pytest.raises(UserError, match=r"b\.tar is not a complete \.tar"):
            Shards(tmp_path / "b.tar").images("all")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extra\.txt"):
        Shards(tmp_path).images("all")


# By the script


def test_a_table_of_pairs_is_cached_by_one_command(tmp_path, monkeypatch, refusal, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        PIL.Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(f"{number}.png")
    rows = [(f"{row % 6}.png", "" if row == 8 else f"caption {row}") for row in range(12)]
    write(tmp_path / "mine.csv", rows, ("image", "caption"))
    command = ["--dataset", "pairs", "--root", "mine.csv", "--backbone", "shapes-tiny", "--quiet", "--splits", "all"]
    assert "caption 8 of 'all' (line 10), of " in refusal(cache_embeddings.main, *command)
    cache_embeddings.main([*command, "--on-error", "skip"])
    assert "6 images, 11 captions" in capsys.readouterr().out
    folder = tmp_path / "embeddings" / "pairs" / "shapes-tiny" / "all"
    assert np.load(folder / "text_id.npy").tolist() == [0, 6, 1, 7, 2, 3, 9, 4, 10, 5, 11]


def test_shards_are_cached_by_one_command(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["--dataset", "webdataset", "--root", str(shards), "--backbone", "shapes-tiny", "--quiet"]
    cache_embeddings.main([*command, "--splits", "all", "--on-error", "skip"])
    assert "5 images, 5 captions" in capsys.readouterr().out


# What strangers' files hold, by the kinds of public bug reports


ROWS = [("a.jpg", ["one", "two"]), ("b.jpg", ["three"])]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),  # Kaggle's Flickr8k
        ("m.csv", "Image,Caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),
        ("m.csv", "image,caption,caption.1,Caption.2\na.jpg,one,two,\nb.jpg,three,,\n"),  # pandas, of one name each
        ("m.csv", "image,caption\na.jpg,one,\na.jpg,two,,\nb.jpg,three\n"),  # separators at the ends of lines
        ("m.csv", "sep=;\r\nimage;caption\r\na.jpg;one\r\na.jpg;two\r\nb.jpg;three\r\n"),
        ("m.json", json.dumps([{"image": image, "caption": texts} for image, texts in ROWS])),
    ],
)
def test_tables_of_other_programs_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    pairs = source_of("pairs", tmp_path / name, folds=2).pairs("all")
    assert [(image.path.name, [caption.text for caption in captions]) for image, captions in pairs] == ROWS


def test_a_column_that_is_named_is_the_only_one(tmp_path):
    (tmp_path / "m.csv").write_text("image,caption,caption.1\na.jpg,one,two\nb.jpg,three,four\n")
    source = source_of("pairs", tmp_path / "m.csv", folds=2, caption_column="caption")
    assert [caption.text for caption in source.captions("all")] == ["one", "three"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "m.csv",
            b"version https://git-lfs.github.com/spec/v1\noid x\n",
            "it is a pointer of Git LFS, which `git lfs p",
        ),
        ("m.jsonl", b"\n<!DOCTYPE html><html>", "it is a web page: download the table itself"),
        (
            "m.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid x\n",
            "pyarrow can read .it is a pointer of Git",
        ),
        ("m.json", b'{"image": "a.jpg"}', "it is not a list: write"),
        ("m.json", b'["a.jpg"]', "entry 0 is not an object: write a list of them"),
        ("m.json", b"[", "it is not valid JSON"),
        ("m.csv", b"image,caption,split\na.jpg,one,train\nb.jpg,two,Train\n", "splits 'train' and 'Train': write them"),
    ],
)
def test_tables_that_are_something_else_are_named(tmp_path, name, content, sentence):
    if "pyarrow" in sentence:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        source_of("pairs", tmp_path / name, folds=2).images("all")


def test_a_table_that_is_not_utf8_is_to_be_saved_as_that(tmp_path):
    (tmp_path / "m.csv").write_bytes("image,caption\na.jpg,caf\u00e9\nb.jpg,th\u00e9\n".encode("cp1252"))
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    sentence = (
        r"it holds bytes that are not UTF-8, .*: save the file that holds them as UTF-8; the first \(line 2\) is of"
    )
    with pytest.raises(UserError, match=sentence):
        list_split(source_of("pairs", tmp_path / "m.csv", folds=2), "all")
    (tmp_path / "m.csv").write_bytes("image,caption\n\u00e9.jpg,one\n\u00e8.jpg,two\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"the name of .* is not UTF-8: save the file that lists them as UTF-8\.$"):
        list_split(source_of("pairs", tmp_path / "m.csv", folds=2), "all")


def test_paths_of_windows_are_found(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).write_bytes(jpeg(0))
    (tmp_path / "m.csv").write_text("image,caption\nphotos\\a.jpg,one\nphotos/a.jpg,two\nphotos\\b.jpg,two\n")
    images = list_split(source_of("pairs", tmp_path / "m.csv", folds=2), "all").images
    assert [image.path.relative_to(tmp_path).as_posix() for image in images] == ["photos/a.jpg", "photos/b.jpg"]


def test_parts_of_a_split_that_are_missing_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    new = int(pyarrow.__version__.split(".")[0]) > 18  # older ones write no views
    pictures = pyarrow.array([jpeg(0), jpeg(9)], pyarrow.binary_view() if new else pyarrow.binary())
    table = pyarrow.table({"image": pictures, "text": ["a", "b"]})
    for name in ("train-00000-of-00002", "test-00000-of-00001"):
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    for split in ("train", "all"):
        with pytest.raises(UserError, match="it has 1 of the 2 parts of 'train': download the others, or move those"):
            source_of("pairs", tmp_path).images(split)
    assert len(source_of("pairs", tmp_path).images("test")) == 2
    (tmp_path / "b").mkdir()
    parquet.write_table(table, tmp_path / "b/train-00001-of-00002-ab.parquet")
    assert len(source_of("pairs", tmp_path).images("train")) == 4
    source = source_of("pairs", tmp_path / "train-00000-of-00002.parquet", folds=2)  # alone, by its name
    assert [color(source.open(image)) for image in source.images("all")] == [0, 10]


def test_pictures_with_texts_come_before_the_metadata_of_img2dataset(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].table({"url": ["x"], "caption": ["y"]}), tmp_path / "00000.parquet")
    for name in ("0", "1"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(0))
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    captions = source_of("pairs", tmp_path, folds=2).captions("all")
    assert [caption.text for caption in captions] == ["caption 0", "caption 1"]


def test_a_table_comes_before_texts_beside_its_pictures(tmp_path):
    """As where labels of another task lie beside them."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(0))
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1")
    table = sys.modules["pyarrow"].table({"file_name": ["a.jpg", "b.jpg"], "text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert [caption.text for caption in source_of("pairs", tmp_path, folds=2).captions("all")] == ["one", "two"]


def test_a_column_of_another_case_or_number_is_another(tmp_path):
    rows = "image,caption,caption_1,Split\na.jpg,one,4.5,0\nb.jpg,two,3,1\n"
    (tmp_path / "m.csv").write_text(rows)
    source = source_of("pairs", tmp_path / "m.csv", folds=2)
    assert [caption.text for caption in source.captions("all")] == ["one", "two"]


def test_texts_of_shards_may_begin_with_a_mark(tmp_path):
    pytest.importorskip("webdataset")
    members = {"0.jpg": jpeg(0), "0.txt": "\ufeffone".encode(), "1.jpg": jpeg(0)}
    shard(tmp_path / "a.tar", members | {"1.json": '\ufeff{"caption": "two"}'.encode()})
    assert [caption.text for caption in Shards(tmp_path, folds=2).captions("all")] == ["one", "two"]


def test_a_folder_of_shards_may_look_like_a_pattern(tmp_path):
    pytest.importorskip("webdataset")
    (tmp_path / "sh [a]").mkdir()
    shard(tmp_path / "sh [a]/s-0.tar", sample("0", 0, "one") | sample("1", 0, "two"))
    assert len(Shards(f"{tmp_path}/sh [a]/s-{{0..0}}.tar", folds=2).images("all")) == 2


def test_shards_whose_samples_would_be_lost_or_changed_are_refused(tmp_path):
    pytest.importorskip("webdataset")
    first = shard(tmp_path / "a.tar", sample("0", 0, "one")).read_bytes()
    second = shard(tmp_path / "a.tar", sample("1", 0, "two")).read_bytes()
    (tmp_path / "a.tar").write_bytes(first + second)
    with pytest.raises(
        UserError, match=r"a\.tar holds another archive after its end: unpack it with tar --ignore-zeros, and"
    ):
        Shards(tmp_path, folds=2).images("all")
    for more in (bytes(10**5), b"\n", bytes(512) + b"-----BEGIN PGP SIGNATURE-----" + 500 * b"x"):
        (tmp_path / "a.tar").write_bytes(first + more)
        assert len(Shards(tmp_path, folds=2)._samples("*.tar")) == 1
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.bmp")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9999"}
        content = b"1\n0\n5\n".ljust(512, b"\0") + b"BM123"
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"0\.bmp is stored without its zeros: make the shard without tar --sparse"):
        Shards(tmp_path, folds=2).images("all")


def test_karpathy_names_the_splits_that_there_are(tmp_path):
    source = karpathy(tmp_path, entry(1, "restval"), entry(2, "test"))
    assert ids(source.images("train")) == [1]
    with pytest.raises(UserError, match="has no split 'train_only'; it has restval, test, train"):
        source.images("train_only")
    with pytest.raises(UserError, match="has the splits 'train' and 'Train': write them alike"):
        karpathy(tmp_path, entry(1, "train"), entry(2, "Train")).images("train")


def test_coco_without_captions_is_named(tmp_path):
    listing = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps(listing))
    with pytest.raises(
        UserError, match=r"captions_val2017\.json: no annotation has a 'caption': put a file of captions"
    ):
        Coco(tmp_path).images("val")


@pytest.mark.parametrize("batch", [2, 256])
def test_pictures_that_repeat_are_counted(tmp_path, monkeypatch, capsys, batch):
    """As where a table has a row per caption, each with the picture; or a shard was downloaded twice."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("webdataset")
    for name in ("a.tar", "a (1).tar"):
        shard(tmp_path / name, sample("0", 0, "one") | sample("1", 90, "two") | {"2.jpg": b"?", "2.txt": b"three"})
    cache = ["--dataset", "webdataset", "--root", ".", "--backbone", "shapes-tiny", "--device", "cpu", "--workers", "1"]
    cache += ["--splits", "all", "--on-error", "skip", "--quiet", "--set", f"encoder.batch_size={batch}"]
    cache_embeddings.main(cache)
    line = "4 images, 4 captions, D = 64, 2 that the backbone sees as an earlier one, 2 left out"
    assert line in capsys.readouterr().out


def test_every_line_of_a_shard_may_be_a_caption(tmp_path):
    pytest.importorskip("webdataset")
    members = sample("0", 0, "one\ntwo\n") | sample("1", 0, "three\n\nfour ") | sample("2", 0, "\n")
    shard(tmp_path / "a.tar", members | sample("3", 0, "five"))
    for lines, wanted in (
        (True, [["one", "two"], ["three", "four"], [""], ["five"]]),
        (False, [["one two"], ["three four"], [""], ["five"]]),
    ):
        assert list(texts(Shards(tmp_path, folds=2, lines=lines), "all").values()) == wanted
