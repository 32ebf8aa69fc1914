"""K-fold cross-validation: its parts against loops, what a fold reads of a cache, and means over folds in a report."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import cache_embeddings
import reproduce
from datasets.embeddings import Pairs
from datasets.folds import Fold, fold_of, mask, named

IMAGES, EACH, SIZE = 24, 2, 8
CACHE = ["--set", "data.root=pairs.npz", "encoder.model=mine"]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """Embeddings of images with two captions each, in `pairs.npz` of a new working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grid.workers.START", "fork")  # without seconds of imports
    rng = np.random.default_rng(0)
    image, owner = rng.normal(size=(IMAGES, SIZE)), np.repeat(np.arange(IMAGES), EACH)
    text = image[owner] + 2 * rng.normal(size=(IMAGES * EACH, SIZE))
    caption = np.array([f"caption {row} of {one}" for row, one in enumerate(owner)])
    arrays = {"image": np.float32(image), "text": np.float32(text), "image_of_text": owner, "caption": caption}
    np.savez("pairs.npz", **arrays)
    return arrays


def test_names():
    assert fold_of("train2of5") == Fold("all", True, 2, 5) and fold_of("my-val-test1of3") == Fold("my-val", False, 1, 3)
    assert fold_of("train2") is None and fold_of("all") is None
    for name in ("train2of5", "val-test3of4"):
        fold = fold_of(name)
        assert named(fold.whole, "train" if fold.train else "test", fold.number, fold.folds) == name


def groups_by_loop(owner, true):
    """The images that share a caption, directly or through others: a number (N,) for each."""
    group = list(range(len(true)))
    for caption in range(len(owner)):
        joined = {group[image] for image in range(len(true)) if true[image, caption] or owner[caption] == image}
        group = [min(joined) if one in joined else one for one in group]
    return np.array(group)


@pytest.mark.parametrize("shared", [0, 12])
def test_parts_are_disjoint_balanced_and_keep_what_shares_a_caption(shared):
    rng = np.random.default_rng(shared)
    images, owner = 90, np.repeat(np.arange(90), 3)
    true = np.zeros((images, len(owner)), dtype=bool)
    for _ in range(shared):
        true[rng.integers(images), rng.integers(len(owner))] = True
    tests = [mask(Fold("all", False, i, 4), images, owner, sparse.csc_array(true)) for i in range(1, 5)]
    assert (np.sum(tests, axis=0) == 1).all()
    assert max(part.sum() for part in tests) - min(part.sum() for part in tests) <= 1
    for i, part in enumerate(tests, 1):
        assert (mask(Fold("all", True, i, 4), images, owner, sparse.csc_array(true)) == ~part).all()
        inside = groups_by_loop(owner, true)
        assert not set(inside[part]) & set(inside[~part])
    if not shared:
        assert all((mask(Fold("all", False, i, 4), images) == tests[i - 1]).all() for i in range(1, 5))


def test_impossible_folds_are_refused():
    for fold, words in (((0, 3), "no fold 0 of 3"), ((4, 3), "no fold 4 of 3"), ((1, 1), "fold"), ((1, 9), "8 images")):
        with pytest.raises(ValueError, match=words):
            mask(Fold("all", True, *fold), 8)
    with pytest.raises(ValueError, match="kept in 1 groups by the captions"):
        mask(Fold("all", True, 1, 2), 8, np.arange(8), sparse.csc_array(np.ones((8, 8), bool)))


def test_a_fold_has_the_rows_of_its_images(pairs, refusal):
    cache_embeddings.main(["--dataset", "embeddings", "--splits", "all", "--quiet", *CACHE])
    whole = Pairs("embeddings", "given", "all")
    parts = [Pairs("embeddings", "given", f"{kind}2of3") for kind in ("train", "test")]
    assert len({part.meta["fingerprint"] for part in (whole, *parts)}) == 3
    assert (
        sorted([*parts[0].image_id, *parts[1].image_id]) == list(range(IMAGES)) and len(parts[1].image) == IMAGES // 3
    )
    assert parts[0].shared_with(parts[1].seen(slice(None))) == 0 < whole.shared_with(parts[1].seen(slice(None)))
    for part in parts:
        assert (part.meta["images"], part.meta["captions"]) == (len(part.image), len(part.text))
        assert (part.image == np.float16(pairs["image"])[part.image_id]).all()
        assert (part.text == np.float16(pairs["text"])[part.text_id]).all()
        assert (part.image_id[part.image_of_text] == pairs["image_of_text"][part.text_id]).all()
        assert part.items["text"] == pairs["caption"][part.text_id].tolist()
        assert part.items["image"] == [f"image {row}" for row in part.image_id]
        assert all(
            torch.equal(a, torch.tensor(np.array(b)))
            for a, b in zip(part.to("cpu"), (part.image, part.text, part.image_of_text))
        )
    message = refusal(reproduce.main, "--datasets", "embeddings", "--methods", "clip", "--folds", "1", *CACHE)
    assert "--folds takes 2 or more" in message


def test_every_fold_is_trained_tested_and_reported(pairs, capsys):
    command = ["--datasets", "embeddings", "--methods", "clip", "asymvlm-vmf", "--folds", "3", "--devices", "cpu"]
    command += ["--quiet", *CACHE, "train.epochs=2", "train.val_fraction=0.2", "train.batch_size=8"]
    reproduce.main(command)
    assert "6 cells: 0 were done, 6 are made, 0 failed" in capsys.readouterr().out
    assert [path.name for path in Path("embeddings/embeddings/given").glob("[!.]*")] == ["all"]  # cached once
    recalls, tested = {}, []
    for fold in (1, 2, 3):
        for method in ("clip", "asymvlm-vmf"):
            run = f"embeddings/given/{method}+fold{fold}of3/seed0"
            [result] = Path("results", run).glob("*.json")
            values = json.loads(result.read_text())
            assert values["fold"] == [fold, 3] and values["split"] == f"test{fold}of3"
            assert values["seen_in_training"] == 0
            recalls.setdefault(method, []).append(100 * values["text_to_image"]["recall"]["1"])
        seen = torch.load(f"checkpoints/{run}/adaptor.pt", weights_only=True)["seen"]["image_id"].tolist()
        part = Pairs("embeddings", "given", f"test{fold}of3").image_id.tolist()
        assert not set(part) & set(seen) and len(seen) == IMAGES - IMAGES // 3  # held-out images among them
        tested += part
    assert sorted(tested) == list(range(IMAGES))
    with open("results/embeddings/table.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["column"] == "text_to_image_r1"]
    assert {line["variant"]: line["seeds"] for line in lines} == {"clip": "3", "asymvlm-vmf": "3"}
    for line in lines:
        values = recalls[line["variant"]]
        expected = statistics.fmean(values), statistics.stdev(values)
        assert (float(line["mean"]), float(line["sd"])) == pytest.approx(expected)
    page = Path("results/embeddings/report.html").read_text(encoding="utf-8")
    assert "mean ± s.d. over 3 test parts" in page and "the s.d. understates" in page
    reproduce.main([*command, "--dry-run"])
    assert "6 of 6 cells are done" in capsys.readouterr().out


def test_folds_of_images_with_classes(pairs):
    label = np.arange(IMAGES) % 3
    np.savez("pairs.npz", image=pairs["image"], text=pairs["text"][:3], label=label, class_of_text=np.arange(3))
    command = ["--datasets", "embeddings", "--methods", "clip", "--folds", "2", "--devices", "cpu", "--quiet", *CACHE]
    reproduce.main([*command, "train.val_fraction=0"])
    results = [json.loads(path.read_text()) for path in Path("results").glob("**/*-classification.json")]
    assert sorted(result["fold"] for result in results) == [[1, 2], [2, 2]]
    assert sum(result["images"] for result in results) == IMAGES
    with open("results/embeddings/table.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["column"] == "acc"]
    accuracy = [100 * result["image_to_class"]["recall"]["1"] for result in results]
    assert lines
    for line in lines:
        assert float(line["mean"]) == pytest.approx(statistics.fmean(accuracy)), line
