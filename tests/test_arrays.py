"""Embeddings computed elsewhere: split by image, cached without a backbone, and their errors."""

import json
import re
import sys

import numpy as np
import pytest
import torch

import cache_embeddings
import eval as evaluation
import report
import train
import uncertainty
from datasets.arrays import Arrays
from datasets.embeddings import Pairs
from metrics.retrieval import rank, recall_at

N, M, D = 40, 100, 16
CACHE = ["--dataset", "embeddings", "--root", "pairs.npz", "--quiet"]
RUN = ["--dataset", "embeddings", "--method"]


def arrays(**changes):
    """Arrays as a user may have them; None removes a key."""
    rng = np.random.default_rng(0)
    image_of_text = rng.permutation(np.resize(np.arange(N), M))
    image = rng.normal(size=(N, D)).astype(np.float32)
    values = {
        "image": image,
        "text": image[image_of_text] + rng.normal(size=(M, D)),
        "image_of_text": image_of_text,
        "image_id": 1000 - np.arange(N),
        "caption": np.array([f"caption {row}\nof {image}" for row, image in enumerate(image_of_text)]),
    }
    return {key: value for key, value in (values | changes).items() if value is not None}


def spoiled(key, row, value):
    """The array `key` with some rows changed."""
    array = arrays()[key]
    array[row] = value
    return {key: array}


FOUR = {key: array[:4] for key, array in arrays().items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with pairs.npz."""
    monkeypatch.chdir(tmp_path)
    np.savez("pairs.npz", **arrays())
    return tmp_path


def test_five_pairs_are_few_but_no_flag_is_blamed(here, refusal):
    """A method without training needs no held-out pairs; one with it says how many are left."""
    np.savez("pairs.npz", **{side: values[:5] for side, values in arrays().items() if side in ("image", "text")})
    cache_embeddings.main(CACHE)
    train.main([*RUN, "clip", "--quiet"])
    assert "test0 has a single query, and an evaluation needs two" in refusal(evaluation.main, *RUN, "clip")
    error = refusal(train.main, *RUN, "pfe")
    assert "holding out 0.1 of 4 images leaves 0 to pick the epoch and 4 to train on, where two are the least" in error


def test_splits_share_no_image_and_cover_all(here):
    source = Arrays("pairs.npz", folds=3)

    def ids(split):
        images, captions = source.images(split), source.captions(split)
        assert {caption.image_id for caption in captions} == {image.id for image in images}
        assert [len(part) for part in source.embeddings(split)] == [len(images), len(captions)]
        return {image.id for image in images}, {caption.id for caption in captions}

    for side, everything in enumerate((set(range(961, 1001)), set(range(M)))):
        tests = [ids(f"test{k}")[side] for k in range(3)]
        assert set.union(*tests) == ids("all")[side] == everything
        assert sum(map(len, tests)) == len(everything)  # no two share one
        assert all(ids(f"train{k}")[side] == everything - tests[k] for k in range(3))
    assert sorted(len(ids(f"test{k}")[0]) for k in range(3)) == [13, 13, 14]
    assert Arrays("pairs.npz", folds=3).images("test0") == source.images("test0")
    assert Arrays("pairs.npz", folds=3, seed=1).images("test0") != source.images("test0")


def test_rows_keep_their_pairs(here):
    cache_embeddings.main([*CACHE, "--splits", "all", "test1"])
    original = arrays()
    for split in ("all", "test1"):
        pairs = Pairs("embeddings", "given", split)
        image_row = 1000 - np.load(pairs.folder / "image_id.npy")
        text_row = np.load(pairs.folder / "text_id.npy")
        assert pairs.image.dtype == pairs.text.dtype == np.float16
        assert (pairs.image == original["image"].astype(np.float16)[image_row]).all()
        assert (pairs.text == original["text"].astype(np.float16)[text_row]).all()
        assert (image_row[pairs.image_of_text] == original["image_of_text"][text_row]).all()
        assert (np.diff(pairs.image_of_text) >= 0).all()  # grouped by image, as of any source
        assert pairs.items["text"] == original["caption"][text_row].tolist()
        assert pairs.items["image"] == [f"image {1000 - row}" for row in image_row]
        assert pairs.matches is None and pairs.chains is None
    assert (pairs.meta["images"], pairs.meta["skipped"], pairs.dim) == (8, 0, D)
    assert (pairs.meta["logit_scale"], pairs.meta["logit_bias"]) == (100, None)


def test_two_arrays_are_enough(here, capsys):
    original = arrays()
    np.savez("pairs.npz", image=original["image"], text=original["text"][:N])
    cache_embeddings.main([*CACHE, "--splits", "all"])
    assert "40 images, 40 captions, D = 16" in capsys.readouterr().out
    pairs = Pairs("embeddings", "given", "all")
    assert (pairs.image_of_text == np.arange(N)).all()
    assert pairs.items["text"][3] == "text 3" and pairs.items["image"][3] == "image 3"
    np.savez("pairs.npz", image=original["image"], text=original["text"][:N], coco_image_id=original["image_id"])
    assert Arrays("pairs.npz").images("all")[3].id == 997


def test_images_without_a_text_are_left_out(here, capsys):
    few = np.arange(M) % (N - 1)
    np.savez("pairs.npz", **arrays(image_of_text=few))
    cache_embeddings.main([*CACHE, "--splits", "all"])
    assert "39 images, 100 captions, D = 16, 1 left out" in capsys.readouterr().out
    skipped = (here / "embeddings/embeddings/given/all/skipped.jsonl").read_text()
    assert json.loads(skipped) == {"image_id": 961, "path": "image 961", "reason": "no caption"}
    np.savez("pairs.npz", **arrays(**spoiled("caption", 3, " ")))
    cache_embeddings.main([*CACHE, "--splits", "all", "--on-error", "skip", "--overwrite"])
    assert len(Pairs("embeddings", "given", "all").text) == 99


def test_a_cache_of_other_content_is_refused(here, refusal, capsys):
    cache_embeddings.main(CACHE)
    np.savez("pairs.npz", **{key: np.asfortranarray(array) for key, array in arrays().items()})
    cache_embeddings.main(CACHE)
    assert capsys.readouterr().out.count("(already there)") == 2
    for setting in ("data.options.logit_scale=50", "data.options.seed=1"):
        assert "a different list of images and captions" in refusal(cache_embeddings.main, *CACHE, "--set", setting)
    assert "a different backbone" in refusal(cache_embeddings.main, *CACHE, "--set", "encoder.model=ViT-B-16")
    np.savez("pairs.npz", **arrays(**spoiled("text", 3, 1)))
    assert "a different list of images and captions" in refusal(cache_embeddings.main, *CACHE)
    cache_embeddings.main([*CACHE, "--overwrite"])
    assert "already there" not in capsys.readouterr().out


def test_scripts_need_no_backbone(here, refusal, monkeypatch, one_figure):
    for name in ("open_clip", "models.backbones.openclip"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    cache_embeddings.main(CACHE)
    train.main([*RUN, "clip", "--quiet"])
    train.main([*RUN, "asymvlm-psd", "--quiet", "--set", "train.epochs=2", "model.width=8"])
    for method in ("clip", "asymvlm-psd"):
        evaluation.main([*RUN, method, "--quiet", "--uncer_levels", "4"])
    result = json.loads((here / "results/embeddings/given/asymvlm-psd/seed0/embeddings-retrieval.json").read_text())
    assert (result["split"], result["images"]) == ("test0", 8)
    example = result["text_to_image"]["examples"]["most_certain"][0]
    assert example["own"].startswith("image 9")
    report.main(["--dataset", "embeddings", "--quiet"])
    page = (here / "results/embeddings/report.html").read_text()
    assert example["best"][0]["answer"] in page
    error = refusal(uncertainty.main, *RUN, "asymvlm-psd", "a photo")
    assert "trained on embeddings computed elsewhere, so no backbone is at hand to encode prompts" in error
    error = refusal(train.main, *RUN, "clip", "--tag", "t", "--set", "data.train_split=train1")
    assert "run `python cache_embeddings.py --dataset embeddings --backbone given --splits train1`" in error


def test_a_backbone_of_another_size_is_refused(here, refusal):
    named = ["--backbone", "shapes-tiny"]
    cache_embeddings.main([*CACHE, *named])
    train.main([*RUN, "asymvlm-psd", *named, "--quiet", "--set", "train.epochs=1", "model.width=8"])
    error = refusal(uncertainty.main, *RUN, "asymvlm-psd", *named, "a photo")
    assert "embeddings of size 16, but backbone 'shapes-tiny' gives size 64" in error


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(text=None), "it has no key 'text'"),
        (dict(image=np.ones((N, D), dtype=int)), "'image' must hold one embedding per row, .* not int64"),
        (dict(image=np.ones(N)), r"'image' must hold one embedding per row, .* of shape \(40,\)"),
        (dict(text=np.ones((0, D))), r"'text' must hold .* of shape \(0, 16\)"),
        (
            dict(text=np.ones((M, D + 1))),
            "'image' has rows of size 16, but 'text' of size 17: give embeddings of one model",
        ),
        (spoiled("image", 7, np.nan), "'image' holds NaN in row 7 of 40: encode these items again, or leave them out"),
        (spoiled("text", 99, (0,) * (D - 1) + (np.inf,)), "'text' holds infinity in row 99 of 100"),
        (spoiled("image", [30, 3, 7, 20, 8], -np.inf), "'image' holds infinity in rows 3, 7, 8 and 2 more of 40"),
        (spoiled("text", [4, 2], 0), "'text' holds nothing but zeros in rows 2 and 4 of 100"),
        (
            spoiled("text", 5, 7e4),
            "'text' holds numbers too large for float16.* in row 5 of.* multiply all rows by",
        ),
        (spoiled("image", 6, 1e-6), "'image' holds numbers too small for float16.* in row 6 of.* multiply all rows by"),
        (spoiled("image", 6, 1e-12), "'image' holds numbers too small for float16"),
        (spoiled("image", slice(0, 3), 1e30), "'image' holds numbers too large .* in rows 0, 1 and 2 of 40"),
        (dict(image_of_text=None), "'image' has 40 rows and 'text' 100: add 'image_of_text'"),
        (dict(image_of_text=np.zeros(M)), "'image_of_text' must hold integers .* not float64"),
        (dict(image_of_text=np.zeros(M - 1, dtype=int)), r"of shape \(100,\), not int64 of shape \(99,\)"),
        (spoiled("image_of_text", 8, N), "row 8 of 'image_of_text' is 40, .* count the rows of 'image' from 0 to 39"),
        (spoiled("image_of_text", 9, -1), "row 9 of 'image_of_text' is -1, which is not a row of 'image'"),
        (spoiled("image_id", 31, 997), "rows 3 and 31 of 'image_id' are both 997: give each image one row"),
        (dict(image_id=np.arange(N).astype(str)), "'image_id' must hold integers"),
        (dict(caption=np.arange(M)), "'caption' must hold strings"),
        (
            dict(caption=np.array(["a"] * M, dtype=object)),
            "'caption' is an array of Python objects: store plain values, strings with numpy.array",
        ),
        (spoiled("caption", 3, " "), "caption 3 of 'all', of image 9.., is empty"),
        (FOUR | {"image_of_text": None}, "has 4 images, too few for 5 parts: add images, or make fewer parts"),
    ],
)
def test_arrays_that_cannot_be_cached_are_named(here, refusal, changes, sentence):
    np.savez("pairs.npz", **arrays(**changes))
    assert re.search(sentence, refusal(cache_embeddings.main, *CACHE, "--splits", "all"))
    assert not (here / "embeddings").exists()


def test_an_overflow_of_the_encoder_is_named(here, refusal):
    """Embeddings that overflowed in float16 are infinite in the file; bfloat16 holds what float16 cannot."""
    import safetensors.torch

    both = {side: torch.ones(N, D, dtype=torch.float32) for side in ("image", "text")}
    both["text"][[2, 5]] = 1e5
    for dtype, sentence in (
        (
            torch.float16,
            "'text' holds infinity in rows 2 and 5 of 40: .*; float16 ends at 65,504",
        ),
        (torch.bfloat16, "'text' holds numbers too large for float16, .* in rows 2 and 5 of 40: multiply all rows by"),
    ):
        safetensors.torch.save_file({side: x.to(dtype) for side, x in both.items()}, "pairs.safetensors")
        error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "pairs.safetensors")
        assert re.search(sentence, error)
    assert not (here / "embeddings").exists()


def test_invalid_files_splits_and_options_are_named(here, refusal):
    np.save("one.npy", np.ones((N, D)))
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "one.npy")
    assert "one.npy: it is a single array: point --root to the folder that holds image.npy and text.npy" in error
    (here / "text.npz").write_text("image, text")
    (here / "cut.npz").write_bytes((here / "pairs.npz").read_bytes()[:2000])
    for name in ("text.npz", "cut.npz"):
        error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", name)
        assert f"{name}: it is not an .npz" in error and "pickle" not in error
    (here / "text.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "text.npz")
    assert "(it is a pointer of Git LFS, which `git lfs pull` replaces by the file)" in error
    error = refusal(cache_embeddings.main, "--dataset", "embeddings")
    assert "data/embeddings.npz are missing: point --root to an .npz, a .safetensors or a folder of .npy" in error
    error = refusal(cache_embeddings.main, *CACHE, "--splits", "val")
    assert "pairs.npz has no split 'val'; it has all, train, test, train0, train1" in error
    for setting in ("folds=1", "folds=2.5", "seed=-1", "logit_scale=0", "logit_scale=.inf"):
        error = refusal(cache_embeddings.main, *CACHE, "--set", f"data.options.{setting}")
        must_be = "folds must be an integer of at least 2" if "scale" not in setting else "logit_scale must be"
        assert f"data.options: {must_be}" in error


def test_every_layout_holds_the_same(here, refusal):
    """A .safetensors, a folder of .npy and clip-retrieval's parts give the same as the .npz."""
    import pyarrow
    import safetensors.torch
    from pyarrow import parquet

    original = arrays()
    plain = {key: torch.tensor(array) for key, array in original.items() if key != "caption"}
    safetensors.torch.save_file(plain, "pairs.safetensors", {"caption": json.dumps(original["caption"].tolist())})
    (here / "folder").mkdir()
    for key, array in original.items():
        np.save(f"folder/{key}.npy", array)
    for name in ("pairs.safetensors", "folder"):
        source, expected = Arrays(name), Arrays("pairs.npz")
        for split in ("all", "test1"):
            assert source.images(split) == expected.images(split) and source.captions(split) == expected.captions(split)
            for side in (0, 1):
                assert (source.embeddings(split)[side] == expected.embeddings(split)[side]).all()
        assert source.version == expected.version

    for kind in ("img_emb", "text_emb", "metadata"):
        (here / "laion" / kind).mkdir(parents=True)
    text, caption = original["text"][:N], original["caption"][:N].astype(object)
    caption[3] = None
    for part, rows in ((9, slice(0, 25)), (10, slice(25, N))):  # by number, not by name
        np.save(f"laion/img_emb/img_emb_{part}.npy", original["image"][rows].astype(np.float16))
        np.save(f"laion/text_emb/text_emb_{part}.npy", text[rows].astype(np.float16))
        table = pyarrow.table({"image_path": [f"{row}.jpg" for row in range(N)][rows], "caption": caption[rows]})
        parquet.write_table(table, f"laion/metadata/metadata_{part}.parquet")
    source = Arrays("laion")
    assert (source.embeddings("all")[0] == original["image"].astype(np.float16)).all()
    assert (source.embeddings("all")[1] == text.astype(np.float16)).all()
    assert [c.text for c in source.captions("all")] == ["" if c is None else c for c in caption]
    (here / "laion/text_emb/text_emb_10.npy").unlink()
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "laion")
    assert "img_emb_10.npy has no text_emb_10.npy beside it" in error
    np.save("laion/text_emb/text_emb_10.npy", text[30:].astype(np.float16))
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "laion")
    assert "part 10 has 10 and 15 rows" in error
    (here / "bad.safetensors").write_bytes(b"nothing")
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "bad.safetensors")
    assert "bad.safetensors: it is not a .safetensors" in error
    (here / "folder/text.npy").write_bytes(b"nothing")
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "folder")
    assert "text.npy is not an .npy of plain numbers" in error
    (here / "bare").mkdir()
    error = refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "bare")
    assert "bare: it has no key 'image'" in error


def labeled(images=60, classes=6, per_class=3, **changes):
    """Images near the prompts of their classes."""
    rng = np.random.default_rng(0)
    center, length = rng.normal(size=(classes, D)), rng.uniform(1, 9, (classes * per_class, 1))
    label, class_of_text = rng.integers(0, classes, images), np.repeat(np.arange(classes), per_class)
    values = {
        "image": center[label] + 1.2 * rng.normal(size=(images, D)),
        "text": (center[class_of_text] + 0.3 * rng.normal(size=(len(class_of_text), D))) * length,
        "label": label,
        "class_of_text": class_of_text,
        "class_name": np.array([f"thing {number}" for number in range(classes)]),
    }  # fmt: skip
    return {key: value for key, value in (values | changes).items() if value is not None}


def test_images_with_classes_are_classified(here, capsys, refusal):
    original = labeled()
    np.savez("labeled.npz", **original)
    cache_embeddings.main([*CACHE, "--splits", "train0"])
    cache = ["--dataset", "embeddings", "--quiet", "--root", "labeled.npz", "--splits"]
    cache_embeddings.main([*cache, "all"])
    assert "60 images, 18 prompts for 6 classes, D = 16" in capsys.readouterr().out
    pairs = Pairs("embeddings", "given", "all")
    assert pairs.classes[2] == "thing 2" and (pairs.label == original["label"]).all()
    error = refusal(train.main, *RUN, "knn", "--set", "data.train_split=all")
    assert "holds images with classes, not captions" in error
    assert "it is not trained yet): run `python train.py" in refusal(evaluation.main, *RUN, "clip", "--split", "all")
    # Plain CLIP needs no pairs: it learns nothing.
    train.main([*RUN, "clip", "--quiet", "--tag", "alone", "--set", "data.train_split=all"])
    evaluation.main([*RUN, "clip", "--split", "all", "--tag", "alone", "--quiet"])
    train.main([*RUN, "clip", "--quiet"])
    capsys.readouterr()
    evaluation.main([*RUN, "clip", "--split", "all", "--score", "both"])
    # Reference: average the unit prompts of a class, normalize the mean, one image after the other.
    image, text = original["image"].astype(np.float16).astype(float), original["text"].astype(np.float16).astype(float)
    hits = {1: 0, 5: 0}
    for row, label in zip(image, original["label"], strict=True):
        scores = []
        for number in range(6):
            mean = sum(x / np.linalg.norm(x) for x in text[original["class_of_text"] == number])
            scores.append(row @ mean / np.linalg.norm(mean))
        order = np.argsort(scores)[::-1]
        hits = {k: hits[k] + (label in order[:k]) for k in hits}
    result = json.loads((here / "results/embeddings/given/clip/seed0/embeddings+all-classification.json").read_text())
    assert result["task"] == "classification" and (result["images"], result["captions"]) == (60, 18)
    for k in (1, 5):
        assert result["image_to_class"]["recall"][str(k)] == pytest.approx(hits[k] / 60)
    assert 0.3 < hits[1] / 60 < 1
    alone = here / "results/embeddings/given/clip+alone/seed0/embeddings+all-classification.json"
    assert json.loads(alone.read_text())["image_to_class"] == result["image_to_class"]
    assert f"top-1  {100 * hits[1] / 60:.1f}" in capsys.readouterr().out
    arrays = np.load(here / "results/embeddings/given/clip/seed0/embeddings+all-classification.npz")
    assert len(arrays["image_to_class_top"]) == 60

    train.main([*RUN, "asymvlm-vmf", "--quiet", "--set", "train.epochs=2", "model.width=32"])
    evaluation.main([*RUN, "asymvlm-vmf", "--split", "all", "--quiet"])
    path = here / "results/embeddings/given/asymvlm-vmf/seed0/embeddings+all-classification.json"
    assert json.loads(path.read_text())["image_to_class"]["levels_by"] == "retrieved"
    assert "--uncer_levels must lie between 2 and 60" in refusal(
        evaluation.main, *RUN, "clip", "--split", "all", "--uncer_levels", "61"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label": None}, "'label' is missing"),
        ({"class_of_text": None}, "'class_of_text' is missing"),
        ({"class_of_text": np.repeat([0, 1, 2, 3, 4, 6], 3)}, "number the classes without a gap"),
        ({"class_of_text": np.repeat([0, 1, 2, 3, 4, 2**62], 3)}, "number the classes without a gap"),  # as hashes are
        ({"label": np.full(60, 6)}, "row 0 of 'label' is 6, a class without a text"),
        ({"label": np.full(60, -1)}, "row 0 of 'label' is -1"),
        ({"label": np.zeros(59, int)}, r"'label' must hold integers of shape \(60,\)"),
        ({"class_name": np.array(["a"])}, r"'class_name' must hold strings of shape \(6,\)"),
    ],
)
def test_invalid_classes_are_named(here, refusal, changes, sentence):
    np.savez("labeled.npz", **labeled(**changes))
    assert re.search(sentence, refusal(cache_embeddings.main, "--dataset", "embeddings", "--root", "labeled.npz"))


def test_a_split_of_ones_own_and_several_right_answers(here):
    """mAP@R and R-precision by loops over the captions of a split that is named, with pairs that are true besides."""
    rng = np.random.default_rng(1)
    names = np.array(["train", "test"])[(np.arange(N) % 4 == 0).astype(int)]
    match = np.stack([rng.integers(N, size=150), rng.integers(M, size=150)], axis=1)
    values = arrays(split=names, match=match)
    np.savez("pairs.npz", **values)
    cache_embeddings.main([*CACHE, "--splits", "train", "test", "all"])
    train.main([*RUN, "clip", "--quiet", "--set", "data.train_split=train"])
    evaluation.main([*RUN, "clip", "--quiet", "--split", "test", "--score", "similarity"])
    test, whole = Pairs("embeddings", "given", "test"), Pairs("embeddings", "given", "all")
    assert sorted(test.image_id) == sorted(values["image_id"][names == "test"]) and len(whole.text) == M
    [path] = (here / "results").glob("**/*.json")
    side = json.loads(path.read_text())["text_to_image"]
    image, text = (values[key] / np.linalg.norm(values[key], axis=1, keepdims=True) for key in ("image", "text"))
    gallery, precisions, averages = np.flatnonzero(names == "test"), [], []
    for row in np.flatnonzero(names[values["image_of_text"]] == "test"):
        true = {values["image_of_text"][row], *(one for one, other in match if other == row and names[one] == "test")}
        best = gallery[np.argsort(-image[gallery] @ text[row])][: len(true)]
        hits = np.array([one in true for one in best])
        precisions.append(hits.mean())
        averages.append(np.mean(hits * np.cumsum(hits) / np.arange(1, len(hits) + 1)))
    assert max(len(set(match[match[:, 1] == row, 0])) for row in range(M)) > 2
    assert side["r_precision"] == pytest.approx(np.mean(precisions), abs=1e-3)
    assert side["map_at_r"] == pytest.approx(np.mean(averages), abs=1e-3)


def test_human_answers_are_kept_as_shares(here):
    counts = np.random.default_rng(0).integers(1, 9, size=(60, 6))
    np.savez("labeled.npz", **labeled(human=counts))
    cache_embeddings.main(["--dataset", "embeddings", "--root", "labeled.npz", "--splits", "all", "--quiet"])
    human = Pairs("embeddings", "given", "all").human
    assert human == pytest.approx(counts / counts.sum(axis=1, keepdims=True)) and human.shape == (60, 6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"split": np.array(["a/b"] * N)}, "row 0 of 'split' is 'a/b', but a split names a folder"),
        ({"split": np.array(["a"] * (N - 1))}, rf"'split' must hold strings of shape \({N},\)"),
        ({"match": np.array([[0, 1, 2]])}, r"'match' must hold rows .* of shape \(P, 2\), not int64 of shape \(1, 3\)"),
        ({"match": np.array([[0, 1], [N, 2]])}, rf"row 1 of 'match' is \[{N}, 2\], but 'image' has {N} rows"),
        (labeled(match=np.array([[0, 1]])), "'match' is of captions, but 'label' says"),
        (labeled(human=np.ones((60, 5))), r"'human' must hold numbers of shape \(60, 6\), not float64"),
        (labeled(human=np.zeros((60, 6))), "row 0 of 'human' is negative, not finite or all zeros"),
    ],
)
def test_wrong_splits_matches_and_answers_are_named(here, refusal, changes, sentence):
    values = changes if "label" in changes else arrays(**changes)
    np.savez("pairs.npz", **values)
    assert re.search(sentence, refusal(cache_embeddings.main, *CACHE, "--splits", "all"))


def test_zero_shot_with_published_class_embeddings(shared, tmp_path, monkeypatch, capsys):
    """Classify the embeddings of ImageNet's class names in one prompt (ViT-B/32) by those in another prompt."""
    monkeypatch.chdir(tmp_path)
    with np.load(shared / "data/imagenet1000_text_vitb32.npz") as file:
        one, other, names = file["text_a"], file["text_b"], file["names"]
    numbers = np.arange(1000)
    np.savez("imagenet.npz", image=one, label=numbers, text=other, class_of_text=numbers, class_name=names)
    np.savez("pairs.npz", image=other, text=one)
    cache_embeddings.main([*CACHE, "--splits", "train0"])
    cache_embeddings.main(["--dataset", "embeddings", "--root", "imagenet.npz", "--splits", "all", "--quiet"])
    train.main([*RUN, "clip", "--quiet"])
    capsys.readouterr()
    evaluation.main([*RUN, "clip", "--split", "all"])
    unit = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (one, other)]
    top = (unit[0].astype(np.float64) @ unit[1].T.astype(np.float64)).argmax(axis=1)
    path = tmp_path / "results/embeddings/given/clip/seed0/embeddings+all-classification.json"
    accuracy, recall = (top == numbers).mean(), json.loads(path.read_text())["image_to_class"]["recall"]["1"]
    assert accuracy > 0.9 and recall == pytest.approx(accuracy, abs=0.0011)


def test_ids_reveal_test_images_that_were_trained_on(here, refusal):
    """COCO's ids are the same in all files and splits, so the overlap of 2017 and Karpathy's splits is found."""
    original = arrays(image_id=None)
    ids = 1000 + np.arange(N)
    np.savez("pairs.npz", coco_image_id=ids, **original)
    train_on = ["--set", "data.train_split=all"]
    run = [*RUN, "asymvlm-vmf", "--quiet"]
    cache_embeddings.main([*CACHE, "--splits", "all", *train_on])
    train.main([*run, "--set", "train.epochs=1", "model.width=8", *train_on[1:]])
    np.savez("others.npz", coco_image_id=ids + 28, **original)  # another 28 images and 12 of the same
    cache_embeddings.main(["--dataset", "embeddings", "--root", "others.npz", "--splits", "test0", "--quiet"])
    shared_ids = set(np.load("embeddings/embeddings/given/test0/image_id.npy")) & set(ids)
    error = refusal(evaluation.main, *run)
    assert shared_ids and f"was trained on {len(shared_ids)} of the 8 images of embeddings 'test0'" in error
    evaluation.main([*run, "--allow-leakage", "--uncer_levels", "2"])
    path = here / "results/embeddings/given/asymvlm-vmf/seed0/embeddings-retrieval.json"
    assert json.loads(path.read_text())["seen_in_training"] == len(shared_ids)
    # Equal ids of another id space are not the same images.
    np.savez("others.npz", image_id=ids, **arrays(image_id=None, image=original["image"] + 1))
    cache_embeddings.main(
        ["--dataset", "embeddings", "--root", "others.npz", "--splits", "test0", "--quiet", "--overwrite"]
    )
    evaluation.main([*run, "--uncer_levels", "2"])
    assert json.loads(path.read_text())["seen_in_training"] == 0


def test_recall_of_published_embeddings(shared, tmp_path, monkeypatch):
    """R@1 of CLIP ViT-B/16 on 500 images of COCO."""
    monkeypatch.chdir(tmp_path)
    root = str(shared / "data/coco500_vitb16.npz")
    cache_embeddings.main(["--dataset", "embeddings", "--root", root, "--splits", "all", "--quiet"])
    pairs = Pairs("embeddings", "given", "all")
    assert (
        pairs.items["text"][1] == "A desk and chair in an office cubicle." and pairs.items["image"][1] == "image 190236"
    )
    image, text = (torch.nn.functional.normalize(array.float(), dim=1) for array in pairs.to("cpu")[:2])
    rows = np.arange(500)
    image_to_text = rank(lambda queries: image[queries] @ text.T, 500, pairs.image_of_text, rows)
    text_to_image = rank(lambda queries: text[queries] @ image.T, 500, rows, pairs.image_of_text)
    assert [recall_at(ranking, 1).mean() for ranking in (image_to_text, text_to_image)] == pytest.approx([0.552, 0.506])
    # The same by the scripts, on all pairs: plain CLIP trains nothing, so it has seen no image in training.
    train.main([*RUN, "clip", "--val-fraction", "0", "--set", "data.train_split=all", "--quiet"])
    evaluation.main([*RUN, "clip", "--split", "all", "--quiet"])
    result = json.loads((tmp_path / "results/embeddings/given/clip/seed0/embeddings+all-retrieval.json").read_text())
    recalls = [result[side]["recall"]["1"] for side in ("image_to_text", "text_to_image")]
    assert recalls == pytest.approx([0.552, 0.506]) and result["seen_in_training"] == 0
