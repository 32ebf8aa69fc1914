"""HierarCaps: chains of captions of COCO's images, as read from its file, and the errors."""

import csv
import json
import re

import numpy as np
import PIL.Image
import pytest

import cache_embeddings
from datasets.coco import Coco
from datasets.hierarcaps import HierarCaps
from datasets.listing import fingerprint, list_split
from utils.config import load_config, make_source
from utils.errors import UserError

NAMES = ["id", "captions", "image_url"]
CHAINS = {
    30: ["bird", "blue bird", "blue bird on a branch", "A blue bird sits on a branch, singing"],
    10: ["food", "pizza", "pizza with  olives ", 'A pizza "with olives"'],
    20: [
        "street",
        "caf\u00e9 in a street",
        "caf\u00e9 in a street at night",
        "A caf\u00e9 in a street at night, in rain",
    ],
}


def url(id):
    return f"http://images.cocodataset.org/val2014/COCO_val2014_{id:012d}.jpg"


def write(root, rows=None, names=NAMES):
    """Write the file; by default CHAINS in rows with the ids 0, 1, 2."""
    if rows is None:
        rows = [(number, " => ".join(chain), url(id)) for number, (id, chain) in enumerate(CHAINS.items())]
    with open(root / "hierarcaps_test.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return HierarCaps(root)


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (20, 20), (len(path.name), 0, 99)).save(path)


def test_the_real_file(shared):
    source = HierarCaps(shared / "data" / "hierarcaps", images=shared / "data" / "coco")
    images, captions, chains = source.images("test"), source.captions("test"), source.chains("test")
    assert len(images) == len(captions) == len(chains) == 1000 and {len(chain) for chain in chains} == {4}
    assert chains[0] == [
        "table",
        "table with plates",
        "table with three plates, with man and woman holding utensil",
        "A table with three plates with food and a man and a woman both holding utensil near plates.",
    ]
    assert images[0].id == 301718 and images[0].path.name == "000000301718.jpg"
    assert [caption.text for caption in captions] == [chain[-1] for chain in chains]
    assert [caption.id for caption in captions] == list(range(1000))
    assert [caption.image_id for caption in captions] == [image.id for image in images]
    assert all(image.path.is_file() for image in images)  # they are among those of val2017
    coco = Coco(shared / "data" / "coco")
    assert source.id_space("test") == coco.id_space("val")
    assert {image.id for image in images} < {image.id for image in coco.images("val")}


def test_rows_keep_their_order_and_white_space_is_folded(tmp_path):
    source = write(tmp_path)
    assert [image.id for image in source.images("test")] == [30, 10, 20]
    assert [caption.id for caption in source.captions("test")] == [0, 1, 2]
    assert source.chains("test")[1] == ["food", "pizza", "pizza with olives", 'A pizza "with olives"']
    assert source.captions("test")[2].text == "A caf\u00e9 in a street at night, in rain"
    for listed in (source.images, source.captions, source.chains):
        with pytest.raises(UserError, match=r"hierarcaps_test\.csv: it has no split 'train'; it has test"):
            listed("train")


def test_images_are_found_in_the_folders_of_2014_and_2017(tmp_path):
    def paths(**options):
        return [image.path.relative_to(tmp_path).as_posix() for image in HierarCaps(tmp_path, **options).images("test")]

    write(tmp_path)
    of_2014 = [f"val2014/COCO_val2014_{id:012d}.jpg" for id in CHAINS]
    of_2017 = ["val2017/000000000030.jpg", "train2017/000000000010.jpg", "train2017/000000000020.jpg"]
    assert paths() == of_2014
    for name in of_2017[:2]:
        draw(tmp_path / name)
        draw(tmp_path / "elsewhere" / name)
    assert paths() == of_2017
    assert paths(images=tmp_path / "elsewhere") == [f"elsewhere/{name}" for name in of_2017]
    (tmp_path / "val2014").mkdir()
    assert paths() == of_2014
    write(tmp_path, [(0, "a => b", "https://images.cocodataset.org/val2017/000000000030.jpg")])
    assert paths() == of_2017[:1]


def test_other_chains_are_another_version(tmp_path):
    first = write(tmp_path)
    draw(tmp_path / "val2017" / "000000000030.jpg")
    listing = list_split(first, "test", "skip")
    fingerprints = {fingerprint(first, listing), fingerprint(HierarCaps(tmp_path), listing)}
    rows = [(number, "thing => " + chain[-1], url(id)) for number, (id, chain) in enumerate(CHAINS.items())]
    other = write(tmp_path, rows)
    assert list_split(other, "test", "skip").captions == listing.captions
    assert len(fingerprints) == 1 and fingerprint(other, listing) not in fingerprints


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (("7", "bird", url(7)), "'captions' of line 3 is not a chain, 'bird': write at least two captions with ' => '"),
        (("7", "", url(7)), "'captions' of line 3 is not a chain, '': write"),
        (("7", "a =>  => b", url(7)), "'captions' of line 3 has an empty caption, 'a => => b': write"),
        (("7", "a => b => ", url(7)), "'captions' of line 3 has an empty caption"),
        (("7", "a => b", "http://x.org/bird.jpg"), "'image_url' of line 3 is 'http://x.org/bird.jpg', not of the form"),
        (("7", "a => b", ""), "'image_url' of line 3 is '', not of the form"),
        (("7", "a => b", url(1)), r"lists (COCO_val2014_0+1.jpg) and \1 with the same image id, 1: leave"),
        (("x", "a => b", url(7)), "'id' of line 3 is 'x', which is not a number or not unique: give each row"),
        (("9" * 30, "a => b", url(7)), "'id' of line 3 is '9+', which is not a number"),
        (("0", "a => b", url(7)), "'id' of line 3 is '0', which is not a number or not unique"),
        (("7", "a => b"), "'image_url' of line 3 is ''"),
    ],
)
def test_invalid_rows_are_named(tmp_path, row, sentence):
    source = write(tmp_path, [("0", "one => two", url(1)), row])
    for listed in (source.images, source.captions, source.chains):
        with pytest.raises(UserError, match=sentence) as error:
            listed("test")
    assert str(error.value).startswith(str(tmp_path / "hierarcaps_test.csv")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b"id,captions,image_url\n", "it holds no chains: download it again"),
        (b"id,captions,url\n", "it has no column 'image_url'; it has id, captions, url: download it again"),
        (b"\x89PNG\r\n\x1a\n", r"line 1 is not UTF-8 \(byte 0x89\)"),
        (b'id,captions,image_url\n0,"a => b,x\n', "line 2 cannot be read"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, sentence):
    (tmp_path / "hierarcaps_test.csv").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        HierarCaps(tmp_path).images("test")
    assert "\n" not in str(error.value)


def test_a_chain_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "hierarcaps_test.csv").write_bytes(
        f"id,captions,image_url\n0,caf\xe9 => b,{url(1)}\n".encode("latin-1")
    )
    with pytest.raises(UserError, match=r"the prompt 'caf\\udce9' of a chain of 'test' is not valid Unicode"):
        list_split(HierarCaps(tmp_path), "test")


def test_the_error_for_a_missing_file_says_where_to_get_it(tmp_path):
    config = load_config("hierarcaps")
    config.data.root = str(tmp_path)
    error = (
        "hierarcaps_test.csv: it is missing: put data/hierarcaps_test.csv of https://github.com/TAU-VAILab/hierarcaps"
    )
    with pytest.raises(UserError, match=re.escape(error)):
        make_source(config).images(config.data.eval_split)


def test_chains_are_cached_whole_by_one_command(tmp_path, monkeypatch, refusal, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    write(tmp_path / "lists")
    for id in (30, 20):
        draw(tmp_path / "coco" / "val2017" / f"{id:012d}.jpg")
    command = ["--dataset", "hierarcaps", "--root", "lists", "--backbone", "shapes-tiny", "--quiet"]
    command += ["--set", "data.options.images=coco"]
    error = refusal(cache_embeddings.main, *command)
    assert "1 of the 3 images of 'test' are absent" in error and "000000000010.jpg" in error
    cache_embeddings.main([*command, "--on-error", "skip"])
    assert "2 images, 2 captions" in capsys.readouterr().out
    folder = tmp_path / "embeddings" / "hierarcaps" / "shapes-tiny" / "test"
    assert np.load(folder / "image_id.npy").tolist() == [30, 20] and np.load(folder / "text_id.npy").tolist() == [0, 2]
    # The chain of the skipped image stays: prompts need no image.
    chains = np.load(folder / "chains.npz")
    assert chains["text"].shape == (12, 64) and chains["text"].any(axis=1).all()
    assert chains["chain"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and chains["depth"].tolist() == [0, 1, 2, 3] * 3
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [" ".join(prompt.split()) for chain in CHAINS.values() for prompt in chain]
    assert [item["value"] for item in items if item["kind"] == "prompt"] == prompts
    # The last prompt of a chain is the caption of the image.
    text = np.load(folder / "text.npy").astype(float)
    np.testing.assert_allclose(chains["text"][[3, 11]].astype(float), text, rtol=2e-3, atol=2e-3)
    assert json.loads((folder / "meta.json").read_text())["id_space"] == "coco"
