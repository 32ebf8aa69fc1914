"""COCO 1K and 5K, CxC and ECCV Caption against the package's figures of the whole ranking."""

import builtins
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metrics import eccv, retrieval
from models.base import Adaptor, Embedding
from tasks import retrieval as tasks

pytest.importorskip("eccv_caption", reason="eccv_caption is not installed: pip install -r requirements-extra.txt")


@pytest.fixture
def few(monkeypatch):
    """The package reduced to 30 images of each fold, half of which ECCV Caption annotates, and their captions."""
    from eccv_caption import Metrics

    whole = Metrics()
    text = whole.coco_ids.reshape(5, 1000, 5)
    owner = whole.coco_gts["t2i"]
    chosen = []
    for fold in text:
        annotated = [owner[captions[0]][0] in whole.eccv_gts["i2t"] for captions in fold.tolist()]
        rows = np.sort(np.argsort(~np.array(annotated), kind="stable")[[*range(15), *range(-15, 0)]])
        chosen.append(fold[rows])
    text = np.concatenate(chosen).ravel()
    texts, images = set(text.tolist()), {owner[id][0] for id in text.tolist()}

    def less(gts):
        parts = {}
        for side, (queries, items) in {"i2t": (images, texts), "t2i": (texts, images)}.items():
            kept = {id: [x for x in ids if x in items] for id, ids in gts[side].items() if id in queries}
            parts[side] = {id: ids for id, ids in kept.items() if ids}
        return parts

    whole.coco_ids = text
    whole.coco_gts, whole.cxc_gts, whole.eccv_gts = map(less, (whole.coco_gts, whole.cxc_gts, whole.eccv_gts))
    monkeypatch.setattr(eccv, "annotations", lambda: whole)
    return whole


def scores(few, rng, noise, levels=None):
    """Scores of 150 images and 750 captions: 1 for positives, plus noise; `levels` makes ties by rounding."""
    image, text = eccv._ids()
    true = np.array([few.coco_gts["t2i"][id][0] for id in text.tolist()]) == image[:, None]
    made = true + noise * rng.standard_normal(true.shape)
    return image, text, made if levels is None else np.round(levels * made)


@pytest.mark.parametrize(("noise", "levels"), [(0.5, None), (2.0, None), (0.5, 3), (0.0, None)])
def test_every_figure_is_the_packages_of_the_whole_ranking(few, noise, levels, capsys):
    image, text, made = scores(few, np.random.default_rng(0), noise, levels)
    metrics = eccv.evaluate(lambda i, t: torch.tensor(made[i, t]))
    i2t = {id: text[np.argsort(-row, kind="stable")].tolist() for id, row in zip(image.tolist(), made, strict=True)}
    t2i = {id: image[np.argsort(-row, kind="stable")].tolist() for id, row in zip(text.tolist(), made.T, strict=True)}
    expected = few.compute_all_metrics(i2t, t2i, target_metrics=eccv.TARGETS, Ks=eccv.KS)
    capsys.readouterr()
    assert eccv.measure(i2t, t2i) == metrics and capsys.readouterr().err == ""
    sums = {name: metrics.pop(name) for name in ("coco_1k_rsum", "coco_5k_rsum")}
    assert len(metrics) == 12 and set(metrics) == set(expected)
    for name, value in metrics.items():
        assert value == {"text_to_image": expected[name]["t2i"], "image_to_text": expected[name]["i2t"]}
    for name, total in sums.items():
        assert total == pytest.approx(sum(100 * x for k in eccv.KS for x in expected[f"{name[:7]}_r{k}"].values()))
    if noise == 0:
        assert metrics["coco_1k_r1"] == metrics["coco_5k_r1"] == {"text_to_image": 1, "image_to_text": 1}


def test_coco_1k_and_5k_are_ours(few):
    _, _, made = scores(few, np.random.default_rng(1), 1.0)
    metrics = eccv.evaluate(lambda i, t: torch.tensor(made[i, t]))
    owner, caption = np.arange(750) // 5, np.arange(750)
    t2i, i2t = retrieval.fold_recalls(lambda i, t: torch.tensor(made[np.ix_(i, t)]), owner)
    whole = (
        retrieval.rank(lambda rows: torch.tensor(made.T[rows]), 150, caption, owner),
        retrieval.rank(lambda rows: torch.tensor(made[rows]), 750, owner, caption),
    )
    for k in eccv.KS:
        assert (t2i[k], i2t[k]) == pytest.approx(tuple(metrics[f"coco_1k_r{k}"].values()))
        ours = [retrieval.recall_at(ranking, k).mean() for ranking in whole]
        assert ours == pytest.approx(list(metrics[f"coco_5k_r{k}"].values()))
    assert retrieval.rsum(*whole) == pytest.approx(metrics["coco_5k_rsum"])


def test_map_at_r_and_r_precision_are_ours(few):
    from scipy import sparse

    image, text, made = scores(few, np.random.default_rng(2), 1.0)
    metrics = eccv.evaluate(lambda i, t: torch.tensor(made[i, t]))
    for side, query, item, rows in (("i2t", image, text, made), ("t2i", text, image, made.T)):
        gts = few.eccv_gts[side]
        asked = [row for row, id in enumerate(query.tolist()) if id in gts]
        true = np.array([np.isin(item, gts[query[row]]) for row in asked])
        judged = retrieval.at_r(lambda part, rows=rows[asked]: torch.tensor(rows[part]), sparse.csr_array(true))
        name = eccv.SIDES[side]
        assert judged.mean_average_precision.mean() == pytest.approx(metrics["eccv_map_at_r"][name])
        assert judged.r_precision.mean() == pytest.approx(metrics["eccv_rprecision"][name])


def test_lists_too_short_are_refused(few):
    """The package raises IndexError for the first, and counts the others as misses."""
    _, _, made = scores(few, np.random.default_rng(3), 1.0)
    i2t, t2i = eccv.ranked_ids(lambda i, t: torch.tensor(made[i, t]))
    id = next(iter(i2t))
    with pytest.raises(ValueError, match=f"list of i2t for id {id} has 5 items"):
        eccv.measure(i2t | {id: i2t[id][:5]}, t2i)
    with pytest.raises(ValueError, match="COCO 1K needs 10"):
        eccv.measure({id: row[:50] for id, row in i2t.items()}, {id: row[:19] for id, row in t2i.items()})
    del t2i[next(iter(t2i))]
    with pytest.raises(ValueError, match="has 0 items"):
        eccv.measure(i2t, t2i)


def test_rows_are_found_by_id_and_other_splits_are_refused():
    image, text = eccv._ids()
    assert len(set(image.tolist())) == 5000 and len(set(text.tolist())) == 25_000
    # Karpathy's file begins with this image and these captions, so that the annotations are in its order.
    assert image[0] == 391895 and text[:5].tolist() == [770337, 771687, 772707, 776154, 781998]
    rng = np.random.default_rng(4)
    images, texts = rng.permutation(image), rng.permutation(np.append(text, [-1, -2]))
    annotated = eccv.find_annotated(images, texts)
    assert (images[annotated.image] == image).all() and (texts[annotated.text] == text).all()
    with pytest.raises(eccv.NotAnnotated, match="2 of the 5,000 images that CxC"):
        eccv.find_annotated(image[2:], text)
    with pytest.raises(eccv.NotAnnotated, match="25,000 of the 25,000 captions"):
        eccv.find_annotated(image, np.arange(3))


def test_without_the_package_it_is_named(monkeypatch):
    eccv.annotations.cache_clear()
    monkeypatch.delitem(sys.modules, "eccv_caption", raising=False)
    imported = builtins.__import__

    def fail(name, *rest):
        if name == "eccv_caption":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(eccv.NotInstalled, match=r"need eccv_caption: `pip install -r requirements-extra\.txt`"):
        eccv.annotations()


def test_an_evaluation_measures_them_wherever_the_images_are_cocos(few, monkeypatch, capsys):
    """The cache may be in any order and have a sixth caption; for another split there is only COCO 1K."""
    rng = np.random.default_rng(7)
    image_id, text_id = eccv._ids()
    owner = np.array([few.coco_gts["t2i"][id][0] for id in text_id.tolist()])
    images, texts = rng.permutation(150), rng.permutation(751)  # caption 750 is not annotated
    text_id, owner = (np.append(ids, more)[texts] for ids, more in ((text_id, 0), (owner, image_id[0])))
    pairs = SimpleNamespace(
        meta={"id_space": "coco"}, image=images, image_id=image_id[images], text_id=text_id,
        image_of_text=np.argsort(image_id[images])[np.searchsorted(np.sort(image_id), owner)],
    )  # fmt: skip
    image, text = torch.tensor(rng.standard_normal((150, 8))), torch.tensor(rng.standard_normal((751, 8)))
    text += 2 * image[pairs.image_of_text]
    score = Adaptor().similarity
    assert tasks.coco(score, Embedding(image), Embedding(text), pairs) == {}  # 150 images are not COCO 5K
    monkeypatch.setattr(tasks, "COCO_5K", 150)
    metrics = tasks.coco(score, Embedding(image), Embedding(text), pairs)["coco"]
    whole = score(Embedding(image), Embedding(text)).numpy()
    rows = {id: row for row, id in enumerate(text_id.tolist())}
    kept = np.array([rows[id] for id in eccv._ids()[1].tolist()])
    i2t = {
        id: text_id[kept[np.argsort(-row[kept])]].tolist()
        for id, row in zip(pairs.image_id.tolist(), whole, strict=True)
    }
    t2i = {id: pairs.image_id[np.argsort(-whole[:, row])].tolist() for id, row in rows.items()}
    expected = few.compute_all_metrics(i2t, t2i, target_metrics=eccv.TARGETS, Ks=eccv.KS)
    for name, value in metrics.items():
        if not name.endswith("rsum"):
            ours = value["text_to_image"], value["image_to_text"]
            assert ours == pytest.approx((expected[name]["t2i"], expected[name]["i2t"]))
    assert 0.2 < metrics["eccv_map_at_r"]["image_to_text"] < 0.9

    pairs.image_id = pairs.image_id + 10**7
    other = tasks.coco(score, Embedding(image), Embedding(text), pairs)["coco"]
    assert list(other) == ["coco_1k_r1", "coco_1k_r5", "coco_1k_r10", "coco_1k_rsum"]
    hits = []
    for fold in range(5):
        captions = np.flatnonzero(pairs.image_of_text // 30 == fold)
        best = whole[30 * fold : 30 * fold + 30, captions].argmax(axis=0) + 30 * fold
        hits.append((best == pairs.image_of_text[captions]).mean())
    assert other["coco_1k_r1"]["text_to_image"] == pytest.approx(np.mean(hits))
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    capsys.readouterr()
    assert tasks.coco(score, Embedding(image), Embedding(text), pairs)["coco"] == other
    assert capsys.readouterr().err.startswith("Without CxC and ECCV Caption: ")
