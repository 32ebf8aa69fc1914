"""The cache of embeddings: complete or absent, resumable, and its errors."""

import json
import os
import platform
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from check_method import SMALL_WORLD

import cache_embeddings
from datasets import Caption, Image, Source, blocks, caching, embeddings
from datasets.coco import Coco
from datasets.embeddings import Pairs
from datasets.listing import list_split
from models.backbones.openclip import Backbone
from utils import checkpoint
from utils.config import load_backbone, load_config, make_source
from utils.errors import UserError
from utils.files import locked, save_array, save_arrays, write_text

SHAPES = ["--dataset", "shapes", "--quiet", "--device", "cpu", "--workers", "1", "--set", *SMALL_WORLD]
VAL = ["--splits", "val"]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def backbone():
    return Backbone(load_backbone("shapes-tiny"))


@pytest.fixture
def world_copy(world, small_world):
    """The small world with a copy of its cache that the test may change."""
    (world / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", world / "embeddings")
    (world / "data").unlink()
    shutil.copytree(small_world / "data", world / "data")
    return world


def test_cache_holds_what_the_model_says(world, backbone):
    pairs = Pairs("shapes", "shapes-tiny", "val")
    assert pairs.image.shape == (100, 64) and pairs.text.shape == (500, 64) and pairs.image.dtype == np.float16
    assert (pairs.image_of_text == np.repeat(np.arange(100), 5)).all()
    captions, paths = pairs.items["text"], pairs.items["image"]
    for row in (0, 7, 499):
        text = backbone.encode_texts([captions[row]])[0]
        torch.testing.assert_close(text, torch.tensor(pairs.text[row]).float(), rtol=2e-3, atol=2e-3)
    with PIL.Image.open(paths[42]) as image:
        encoded = backbone.encode_images(backbone.transform(image)[None])[0]
    torch.testing.assert_close(encoded, torch.tensor(pairs.image[42]).float(), rtol=2e-3, atol=2e-3)
    assert pairs.image.astype(np.float32).std() > 0 and not np.allclose(np.linalg.norm(pairs.image, axis=1), 1)
    assert pairs.meta["logit_scale"] == pytest.approx(backbone.logit_scale)
    assert pairs.matches.shape == (100, 500) and pairs.matches[pairs.image_of_text, np.arange(500)].all()
    assert len(pairs.chains["text"]) == 6 * 100


def test_cutting_captions_to_their_length_is_exact(backbone):
    texts = ["a photo", "there is a small purple cross in the upper left corner in front of a striped backdrop", ""]
    with torch.inference_mode():
        whole = backbone.model.encode_text(backbone.tokenizer(texts))
    for i, text in enumerate(texts):
        torch.testing.assert_close(backbone.encode_texts([text])[0], whole[i], rtol=1e-5, atol=1e-6)


def test_force_custom_text_is_the_ordinary_model(monkeypatch):
    """The text tower as a separate module computes what open_clip's plain CLIP does, also on shortened tokens."""
    import open_clip

    name = "ViT-B-32-quickgelu"
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 2
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    backbone = Backbone(load_backbone("ViT-B-32-random"))
    torch.manual_seed(0)
    plain = open_clip.create_model(name, pretrained=None)
    state = {key.removeprefix("text."): value for key, value in backbone.model.state_dict().items()}
    plain.load_state_dict(state)
    texts = ["a photo of a cat", "two dogs run over a green field in the rain"]
    with torch.inference_mode():
        expected = plain.eval().encode_text(backbone.tokenizer(texts))
    torch.testing.assert_close(backbone.encode_texts(texts), expected, rtol=1e-4, atol=1e-5)


SMALL_BATCHES = [*SHAPES, "encoder.batch_size=16", *VAL]


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks so small that 100 images and 500 captions need several."""
    monkeypatch.setattr(blocks, "BLOCK", 32)
    monkeypatch.setattr(blocks, "TEXTS", 100)


def interrupt(*args):
    raise KeyboardInterrupt


def interrupted_after(monkeypatch, name, limit):
    """Raise KeyboardInterrupt, as Ctrl-C does, after `limit` calls of a method of the backbone."""
    calls, original = [], getattr(Backbone, name)

    def call(self, *args):
        calls.append(0)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Backbone, name, call)


@pytest.mark.parametrize(("name", "stop_after"), [("encode_tokens", 1), ("encode_tokens", 9), ("encode_images", 2)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(world_copy, monkeypatch, capsys, small_blocks, name, stop_after):
    folder = world_copy / "embeddings/shapes/shapes-tiny/val"
    shutil.rmtree(folder)
    cache_embeddings.main(SMALL_BATCHES)
    expected = content(folder)
    shutil.rmtree(folder)
    done = 0
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupted_after(patch, name, stop_after)
            with pytest.raises(SystemExit):
                cache_embeddings.main(SMALL_BATCHES)
        assert "the same command resumes from" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"is unfinished: run .* again"):
            Pairs("shapes", "shapes-tiny", "val")
        done, before = len(list((folder / "unfinished").glob("*.npz"))), done
        assert done > before or stop_after == 1  # less than a block
    cache_embeddings.main(SMALL_BATCHES)
    assert content(folder) == expected


def test_finished_blocks_are_not_encoded_again(world_copy, monkeypatch, small_blocks):
    folder = world_copy / "embeddings/shapes/shapes-tiny/val"
    expected = content(folder)
    shutil.rmtree(folder)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(caching, "_join", interrupt)
        cache_embeddings.main(SMALL_BATCHES)
    one = folder / "unfinished" / "image-00000002.npz"
    one.write_bytes(one.read_bytes()[:1000])  # only the damaged block is encoded again
    with monkeypatch.context() as patch:
        interrupted_after(patch, "encode_tokens", 0)
        interrupted_after(patch, "encode_images", 2)
        cache_embeddings.main(SMALL_BATCHES)
    assert content(folder).keys() == expected.keys()
    assert content(folder)["items.jsonl"] == expected["items.jsonl"]


def test_a_second_run_changes_nothing(world, capsys):
    before = content(world / "embeddings/shapes/shapes-tiny/val")
    cache_embeddings.main([*SHAPES, *VAL])
    assert "100 images, 500 captions, D = 64 (already there)" in capsys.readouterr().out
    assert content(world / "embeddings/shapes/shapes-tiny/val") == before


def test_another_backbone_or_list_is_refused(world, refusal):
    assert "made from a different list of images and captions than requested" in refusal(
        cache_embeddings.main, "--dataset", "shapes", "--splits", "val", "--set", "data.options.val_images=90"
    )
    random = ["encoder.pretrained=null"]
    assert "made with a different backbone" in refusal(cache_embeddings.main, *SHAPES, *random, *VAL)
    pooled = ["--features", "pooled"]
    assert "made without the requested pooled features" in refusal(cache_embeddings.main, *SHAPES, *VAL, *pooled)
    half = ["encoder.precision=bfloat16"]
    assert "made in float32, not in bfloat16" in refusal(cache_embeddings.main, *SHAPES, *half, *VAL)
    assert "must be auto, float32" in refusal(cache_embeddings.main, *SHAPES, "encoder.precision=int8", *VAL)


def test_the_drawings_of_shapes_are_part_of_the_identity_of_a_cache(world, refusal):
    smaller = [*SHAPES, "data.options.image_size=32", *VAL]
    assert "made from a different list" in refusal(cache_embeddings.main, *smaller)


def test_replacing_a_cache_needs_a_flag_and_resumes_too(world_copy, monkeypatch, capsys):
    other = ["--dataset", "shapes", "--quiet", "--splits", "val", "--overwrite", "--set", "data.options.val_images=90"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_after(patch, "encode_images", 0)
        cache_embeddings.main(other)
    assert len(Pairs("shapes", "shapes-tiny", "val").image) == 100  # until the other is complete
    with monkeypatch.context() as patch:
        interrupted_after(patch, "encode_tokens", 0)  # all captions are encoded already
        cache_embeddings.main(other)
    assert "90 images, 450 captions" in capsys.readouterr().out


def test_two_processes_do_not_share_a_folder(world_copy, refusal):
    folder = world_copy / "embeddings/shapes/shapes-tiny/val"
    shutil.rmtree(folder)
    with locked(folder):
        assert f"process {os.getpid()} on {platform.node()}, started 20" in refusal(
            cache_embeddings.main, *SHAPES, *VAL
        )


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_image_that_was_fixed_is_read_again(world_copy, monkeypatch, on_error):
    image = sorted(world_copy.glob("data/shapes/*96px/val/*.jpg"))[3]
    good = image.read_bytes()
    folder = world_copy / "embeddings/shapes/shapes-tiny/val"
    expected = content(folder)
    shutil.rmtree(folder)
    image.write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(caching, "_join", interrupt)
        cache_embeddings.main([*SHAPES, *VAL, "--on-error", "skip"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_after(patch, "encode_images", 0)  # no image is read again: the broken one is unchanged
        patch.setattr(caching, "_join", interrupt)
        cache_embeddings.main([*SHAPES, *VAL, "--on-error", "skip"])
    image.write_bytes(good)
    cache_embeddings.main([*SHAPES, *VAL, "--on-error", on_error])
    assert content(folder) == expected


def test_fixing_an_image_keeps_the_blocks_of_the_others(world_copy, monkeypatch, refusal, small_blocks):
    image = sorted(world_copy.glob("data/shapes/*96px/val/*.jpg"))[70]
    good = image.read_bytes()
    folder = world_copy / "embeddings/shapes/shapes-tiny/val"
    shutil.rmtree(folder)
    cache_embeddings.main(SMALL_BATCHES)
    expected = content(folder)
    shutil.rmtree(folder)
    image.write_bytes(b"")
    assert "000070.jpg cannot be read" in refusal(cache_embeddings.main, *SMALL_BATCHES)
    image.write_bytes(good)
    with monkeypatch.context() as patch:
        interrupted_after(patch, "encode_tokens", 0)  # all captions are there
        interrupted_after(patch, "encode_images", 3)  # and two of the four blocks of images
        cache_embeddings.main(SMALL_BATCHES)
    assert content(folder) == expected


def test_weights_are_identified_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = load_backbone("shapes-tiny")
    encoder.pretrained = "mine.safetensors"
    fingerprints = set()
    for text in ("one", "two"):
        (tmp_path / "mine.safetensors").write_text(text)
        fingerprints.add(embeddings.encoder_fingerprint(encoder))
    assert len(fingerprints) == 2


def test_captions_keep_their_rows_whatever_they_hold(tmp_path, monkeypatch):
    """Line ends that JSON does not escape must not be taken for the ends of items."""
    monkeypatch.chdir(tmp_path)
    coco_folder(tmp_path / "coco", captions=("a dog", "cats", "a bird"))
    odd = "two\u2028cats\u0085on\u001ca mat \N{CAT FACE}"
    caption = Coco.captions
    monkeypatch.setattr(Coco, "captions", lambda self, split: [c._replace(text=odd) for c in caption(self, split)])
    command = ["--dataset", "coco", "--root", "coco", "--backbone", "shapes-tiny", "--splits", "val", "--quiet"]
    cache_embeddings.main([*command, "--on-error", "skip"])
    assert Pairs("coco", "shapes-tiny", "val").items["text"] == [odd, odd]


def test_damaged_cache_is_named(world_copy):
    folder = world_copy / "embeddings/shapes/shapes-tiny/val"
    (folder / "image.npy").write_bytes((folder / "image.npy").read_bytes()[:200])
    with pytest.raises(UserError, match=r"image\.npy cannot be read"):
        Pairs("shapes", "shapes-tiny", "val")
    with pytest.raises(UserError, match=r"is missing: run `python cache_embeddings\.py --dataset nowhere"):
        Pairs("nowhere", "shapes-tiny", "val")


def test_images_that_cannot_be_read_stop_or_are_left_out(world_copy, refusal, capsys):
    images = sorted(world_copy.glob("data/shapes/*96px/val/*.jpg"))
    images[3].write_bytes(b"not a picture")
    images[50].write_bytes(images[50].read_bytes()[:300])
    shutil.rmtree(world_copy / "embeddings/shapes/shapes-tiny/val")
    error = refusal(cache_embeddings.main, *SHAPES, *VAL)
    assert str(images[3].name) in error and "--on-error skip" in error
    cache_embeddings.main([*SHAPES, *VAL, "--on-error", "skip"])
    assert "98 images, 490 captions" in capsys.readouterr().out
    pairs = Pairs("shapes", "shapes-tiny", "val")
    lines = (pairs.folder / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == [3, 50]
    kept = [row for row in range(100) if row not in (3, 50)]
    assert np.load(pairs.folder / "image_id.npy").tolist() == kept
    assert pairs.matches.shape == (98, 490) and pairs.matches[pairs.image_of_text, np.arange(490)].all()
    # No row has shifted: each caption still belongs to its image, file and encoding.
    text_id = np.load(pairs.folder / "text_id.npy")
    assert (np.array(kept)[pairs.image_of_text] == text_id // 5).all()
    assert [path.rsplit("/", 1)[-1] for path in pairs.items["image"]] == [f"{row:06d}.jpg" for row in kept]


def coco_folder(root, captions=("a dog \n", " two\ncats ", "a bird")):
    """Write a COCO layout of two images, one of them absent, with ids that are not rows."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    PIL.Image.new("RGB", (60, 40), (200, 30, 30)).save(root / "val2017" / "000000000139.jpg")
    listing = {
        "images": [{"id": 285, "file_name": "000000000285.jpg"}, {"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [
            {"id": 900 - i, "image_id": (139, 139, 285)[i], "caption": caption} for i, caption in enumerate(captions)
        ],
    }
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(listing))


def test_coco_layout(tmp_path):
    coco_folder(tmp_path)
    source = Coco(tmp_path)
    assert [image.id for image in source.images("val")] == [139, 285]
    assert [(c.id, c.image_id, c.text) for c in source.captions("val")] == [
        (899, 139, "two cats"), (900, 139, "a dog"), (898, 285, "a bird"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"captions_train2017\.json is missing: point --root to its folder"):
        source.images("train")
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{")
    with pytest.raises(UserError, match="is not a file of COCO captions"):
        Coco(tmp_path).images("val")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda listing: listing["images"][0].pop("file_name"), r"images\[0\] has no 'file_name'"),
        (lambda listing: listing.pop("images"), "is not a file of COCO captions"),
        (lambda listing: listing.pop("annotations"), "is not a file of COCO captions"),
        (lambda listing: listing["annotations"].clear(), "lists no images or no captions"),
        (lambda listing: listing["images"].pop(), r"annotations\[0\] describes image 139, which is not among"),
        (lambda listing: listing["images"][1].update(id=285), r"images\[1\] has the id of images\[0\], 285: leave one"),
        (lambda listing: listing["annotations"][2].update(id=900), r"annotations\[2\] has the id of annotations\[0\]"),
        (lambda listing: listing["images"][0].update(id="285"), r"images\[0\] has the 'id' '285', which is not an int"),
        (
            lambda listing: listing["annotations"][1].update(id=2**63),
            r"annotations\[1\] has the 'id' 9223372",
        ),
        (lambda listing: listing["annotations"][1].pop("id"), r"annotations\[1\] has the 'id' None"),
    ],
)
def test_coco_files_of_another_kind_are_named(tmp_path, spoil, sentence):
    coco_folder(tmp_path)
    path = tmp_path / "annotations" / "captions_val2017.json"
    listing = json.loads(path.read_text())
    spoil(listing)
    path.write_text(json.dumps(listing))
    with pytest.raises(UserError, match=rf"captions_val2017\.json:? {sentence}"):
        Coco(tmp_path).images("val")


def test_absent_images_stop_or_are_left_out(tmp_path, monkeypatch, refusal, capsys):
    monkeypatch.chdir(tmp_path)
    coco_folder(tmp_path / "coco")
    command = ["--dataset", "coco", "--root", "coco", "--backbone", "shapes-tiny", "--splits", "val", "--quiet"]
    error = refusal(cache_embeddings.main, *command)
    assert "1 of the 2 images of 'val' are absent" in error and "000000000285.jpg" in error
    assert not (tmp_path / "embeddings").exists()
    cache_embeddings.main([*command, "--on-error", "skip"])
    assert "1 images, 2 captions" in capsys.readouterr().out
    (tmp_path / "coco" / "val2017" / "000000000139.jpg").unlink()
    assert "nothing is left to cache" in refusal(cache_embeddings.main, *command, "--on-error", "skip", "--overwrite")


def test_empty_captions_stop_or_are_left_out(tmp_path, monkeypatch, refusal, capsys):
    monkeypatch.chdir(tmp_path)
    coco_folder(tmp_path / "coco", captions=("a dog", " \n ", "a bird"))
    PIL.Image.new("L", (50, 50)).save(tmp_path / "coco" / "val2017" / "000000000285.jpg")
    command = ["--dataset", "coco", "--root", "coco", "--backbone", "shapes-tiny", "--splits", "val", "--quiet"]
    assert "caption 899 of 'val', of coco/val2017/000000000139.jpg, is empty" in refusal(
        cache_embeddings.main, *command
    )
    cache_embeddings.main([*command, "--on-error", "skip"])
    assert "2 images, 2 captions" in capsys.readouterr().out


class Three(Source):
    """Three pairs of an image without a file and a caption, with these ids and captions."""

    def __init__(self, ids=(0, 1, 2), texts=("a", "b", "c"), caption_ids=(0, 1, 2)):
        self.items = list(zip(ids, texts, caption_ids))

    def images(self, split):
        return [Image(id, name=f"picture {row}") for row, (id, _, _) in enumerate(self.items)]

    def captions(self, split):
        return [Caption(caption_id, id, text) for id, text, caption_id in self.items]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Three(["a", "b", "c"]), "the image of 'all' 'picture 0' has the id 'a', no integer of 64 bits"),
        (Three([0, 1, 2**63]), "the image of 'all' 'picture 2' has the id 9223372036854775808, no integer"),
        (Three([0, [1], 2]), r"the image of 'all' 'picture 1' has the id \[1\], no integer"),
        (Three(caption_ids=[0, 1.5, 2]), "the caption of 'all' 'b' has the id 1.5, no integer"),
        (Three([0, 7, 7]), "one image of 'all' and another, 'picture 1' and 'picture 2', have the same id, 7"),
        (Three(caption_ids=[5, 1, 5]), "one caption of 'all' and another, 'a' and 'c', have the same id, 5"),
    ],
)
def test_ids_that_the_cache_cannot_hold_and_repeats_are_named(source, sentence):
    with pytest.raises(UserError, match=sentence):
        list_split(source, "all")


def test_a_caption_of_an_image_that_is_not_listed_is_named(monkeypatch):
    monkeypatch.setattr(Three, "captions", lambda self, split: [Caption(0, "0", "a")])
    with pytest.raises(UserError, match="caption 0 of 'all' describes image '0', which is not among the images: list"):
        list_split(Three(), "all")


def test_what_is_no_caption_stops_or_is_left_out():
    odd = None, float("nan"), ["a", "b"], 5, "caf\udce9"
    reasons = ["is null or missing"] * 2 + ["is not a string but ['a', 'b']", "is not a string but 5"]
    source = Three(range(7), ["a", *odd, "c"], range(7))
    with pytest.raises(UserError, match=r"^caption 1 of 'all', of picture 1, is null or missing \(and 4 more\): fix"):
        list_split(source, "all")
    listing = list_split(source, "all", "skip")
    assert [caption.text for caption in listing.captions] == ["a", "c"] and [i.id for i in listing.images] == [0, 6]
    skipped = [item["reason"] for item in listing.skipped if "text_id" in item]
    assert skipped[:4] == reasons and skipped[4].startswith("is not valid Unicode (it holds bytes that are not UTF-8")
    with pytest.raises(UserError, match="no caption of 'all' can be read, as the first is not a string but 5: name"):
        list_split(Three(texts=[5, 6, 7]), "all")


@pytest.mark.parametrize("dataset", ["coco", "coco-karpathy"])
def test_captions_of_json_that_are_none_are_left_out_one_by_one(tmp_path, dataset):
    if dataset == "coco":
        coco_folder(tmp_path)
        path, split = tmp_path / "annotations" / "captions_val2017.json", "val"
    else:
        path, split = tmp_path / "dataset_coco.json", "test"
        entries = [
            {"cocoid": id, "split": "test", "filepath": "val2017", "filename": f"{id:012d}.jpg", "sentences": sentences}
            for id, sentences in (
                (139, [{"sentid": 899, "raw": " two\ncats "}, {"sentid": 900, "raw": "a dog \n"}]),
                (285, [{"sentid": 898, "raw": "a bird"}]),
            )
        ]
        path.write_text(json.dumps({"images": entries}))
    (tmp_path / "val2017").mkdir(exist_ok=True)
    for id in (139, 285):
        PIL.Image.new("L", (50, 50)).save(tmp_path / "val2017" / f"{id:012d}.jpg")
    whole = path.read_bytes()
    for wrong in (b"null", b"NaN", b'["a", "b"]', b'"caf\xe9"'):
        path.write_bytes(whole.replace(b'"a dog \\n"', wrong))
        source = make_source(config_of(dataset, tmp_path))
        with pytest.raises(UserError, match=rf"caption 900 of '{split}', of .*0139\.jpg, is n"):
            list_split(source, split)
        assert [caption.text for caption in list_split(source, split, "skip").captions] == ["two cats", "a bird"]


def config_of(dataset, root):
    config = load_config(dataset)
    config.data.root = str(root)
    return config


def test_real_coco_annotations(shared, tmp_path):
    source = Coco(shared / "data" / "coco")
    images, captions = source.images("val"), source.captions("val")
    assert (len(images), len(captions)) == (5000, 25014)
    assert sum(image.path.is_file() for image in images) == 1000
    assert all(caption.text == " ".join(caption.text.split()) for caption in captions)
    raw = json.loads((shared / "data/coco/annotations/captions_val2017.json").read_text())["annotations"]
    expected = {annotation["id"]: (annotation["image_id"], annotation["caption"].split()) for annotation in raw}
    assert {caption.id: (caption.image_id, caption.text.split()) for caption in captions} == expected
    order = {image.id: row for row, image in enumerate(images)}
    assert (np.diff([order[caption.image_id] for caption in captions]) >= 0).all()


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "txt"])
@pytest.mark.parametrize("beyond", [100, 10**6])  # libraries that write by themselves lose a short end without an error
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, kind, beyond):
    resource = pytest.importorskip("resource")
    limit = 2**20
    array = np.random.default_rng(0).integers(0, 256, limit + beyond - 128, dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    write = {
        "npy": lambda: save_array(path, array),
        "npz": lambda: save_arrays(path, array=array),
        "pt": lambda: checkpoint._save(path, {"array": torch.from_numpy(array)}),
        "txt": lambda: write_text(path, "x" * len(array) + "y" * 200),
    }
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # which stands for the free space
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"x\.{kind} cannot be written \(File too large\): free space on its disk"):
            write[kind]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_unknown_backbones_are_named():
    config = load_backbone("ViT-B-32-quickgelu")
    config.model, config.pretrained = "ViT-B-32", "openai"
    with pytest.raises(UserError, match="are not of ViT-B-32 but of ViT-B-32-quickgelu"):
        Backbone(config)
    config.pretrained = "nonsense"
    with pytest.raises(UserError, match="'nonsense' is neither a file nor weights that open_clip has for ViT-B-32"):
        Backbone(config)
    config.model = "ViT-Z-99"
    with pytest.raises(UserError, match="open_clip has no architecture 'ViT-Z-99'"):
        Backbone(config)
