"""Conformal sets against slow definitions and simulation, by level, by group and of classes."""

import math

import numpy as np
import pytest
from decided import CLIP, cosines, pairs_of, result, score_of
from scipy import special
from sklearn.metrics import roc_auc_score

import eval as evaluation
from metrics import conformal


def slow_sets(scores, scale, kind, threshold):
    """The items of each query's set, item by item."""
    sets = []
    for row in scores:
        p = special.softmax(scale * row)
        chosen = set()
        for item in range(len(row)):
            above = [j for j in range(len(row)) if (-row[j], j) < (-row[item], item)]
            value = {"score": -row[item], "lac": 1 - p[item], "aps": p[above].sum()}
            value["raps"] = value["aps"] + 0.01 * max(0, len(above) + 1 - 5)
            if value[kind] <= threshold + 1e-12:
                chosen.add(item)
        sets.append(chosen)
    return sets


@pytest.mark.parametrize("kind", conformal.KINDS)
def test_sets_item_by_item(problem, kind):
    scores, positives, _ = problem
    ends = conformal.of_answers(score_of(scores), 40, *pairs_of(positives), scale=2.0)[kind]
    for threshold in (np.median(ends[:, 0]), np.quantile(ends[:, 1], 0.8)):
        sets = slow_sets(scores, 2.0, kind, threshold)
        size = conformal.sizes(score_of(scores), 40, 60, {kind: np.full((60, 1), threshold)}, scale=2.0)[kind][:, 0]
        assert size.tolist() == [len(chosen) for chosen in sets]
        assert (ends[:, 0] <= threshold + 1e-12).tolist() == [
            bool(chosen & set(p)) for chosen, p in zip(sets, positives)
        ]
        assert (ends[:, 1] <= threshold + 1e-12).tolist() == [chosen >= set(p) for chosen, p in zip(sets, positives)]


def test_a_threshold_by_definition():
    rng = np.random.default_rng(0)
    values = rng.permutation(100).astype(float)
    for alpha in (0.05, 0.1, 0.2, 0.33):
        rank = math.ceil((1 - alpha) * 101)  # split conformal: each query is a group
        assert conformal.threshold(values, np.arange(100), alpha) == np.sort(values)[rank - 1]
        least = conformal.least_groups(alpha)
        assert math.isfinite(conformal.threshold(values[:least], np.arange(least), alpha))
        assert conformal.threshold(values[: least - 1], np.arange(least - 1), alpha) == math.inf
        # Groups of several: the least value at which the mean of the groups' distributions reaches its level.
        group = rng.integers(30, size=100)
        groups = np.unique(group)
        reach = [np.mean([np.mean(values[group == g] <= v) for g in groups]) for v in np.sort(values)]
        level = (1 - alpha) * (1 + 1 / len(groups))
        assert conformal.threshold(values, group, alpha) == np.sort(values)[np.argmax(np.array(reach) >= level - 1e-9)]


def test_coverage_over_redrawn_groups_of_unequal_size():
    """A new query of a new group is covered with 1 - alpha, though captions of an image depend on each other."""
    rng, alpha, covered = np.random.default_rng(0), 0.2, []
    for _ in range(3000):
        size = rng.integers(1, 8, size=30)
        of_group = rng.normal(size=30) + size  # larger groups are harder: pooled queries would miss the level
        values = np.repeat(of_group, size) + 0.1 * rng.normal(size=size.sum())
        new = np.repeat(np.arange(30), size) == 29
        limit = conformal.threshold(values[~new], np.repeat(np.arange(30), size)[~new], alpha)
        covered.append((values[new] <= limit).mean())
    assert np.mean(covered) == pytest.approx(1 - alpha, abs=3 * np.std(covered) / 3000**0.5 + 1 / 60)
    assert np.mean(covered) > 1 - alpha - 3 * np.std(covered) / 3000**0.5


def test_expected_coverage_by_simulation():
    rng = np.random.default_rng(0)
    rank = math.ceil(0.9 * 51)
    limits = np.sort(rng.random((4000, 50)), axis=1)[:, rank - 1]
    covered = rng.binomial(40, limits) / 40
    low, high = conformal.expected_coverage(50, 40, 0.1)
    assert (covered < low).mean() <= 0.03 and (covered > high).mean() <= 0.03
    assert low == pytest.approx(np.quantile(covered, 0.025), abs=0.03) and high <= 1


def test_conformal_from_files(pairs):
    """Each half of the images is judged by a threshold of the other; sets item by item."""
    values, arrays = result("conformal", "--alpha", "0.2", "--uncer_levels", "2")
    side, (scores, owner) = values["text_to_image"], cosines()
    assert side["taught_by"] == {"images": 30, "galleries": [60]} and side["levels_by"] is None
    from metrics.calibration import halves

    first = halves(owner)
    matched = scores[np.arange(len(owner)), owner]
    for kind in conformal.KINDS:
        record, covered, size = side["conformal"][kind]["0.2"], [], []
        for half in (first, ~first):
            if kind == "score":
                limit = conformal.threshold(-matched[half], owner[half], 0.2)
                covered.append((-matched[~half] <= limit).mean())
                size += (-scores[~half] <= limit).sum(axis=1).tolist()
        if kind == "score":
            assert record["coverage"] == pytest.approx(np.mean(covered), abs=0.01)
            assert record["mean_size"] == pytest.approx(np.mean(size), rel=0.01)
        assert record["coverage"] == pytest.approx(arrays[f"text_to_image_{kind}_0.2_covered"].mean())
        assert record["expected"][0] <= record["coverage"] <= 1
        assert [level["queries"] for level in record["levels"]] == np.bincount(arrays["text_to_image_level"]).tolist()
        assert record["quartiles"][0] <= record["median_size"] <= record["quartiles"][1]
    both = values["image_to_text"]["conformal"]["lac"]["0.2"]
    assert both["all_answers"]["mean_size"] > both["mean_size"]  # two captions take more than one


def test_each_group_of_the_users_has_its_own_threshold(pairs, refusal):
    from datasets.embeddings import Pairs

    names = Pairs("embeddings", "given", "test0").items["image"]
    rows = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    (pairs / "place.csv").write_text(f"image,room\n{rows}")
    values, _ = result("conformal", "--alpha", "0.3", "--by", "place.csv:room")
    groups = values["text_to_image"]["conformal"]["lac"]["0.3"]["groups"]
    assert [group["name"] for group in groups] == ["a", "b"] and sum(group["queries"] for group in groups) == 120
    run = [*CLIP, "--task", "conformal"]
    assert "has no column 'floor'" in refusal(evaluation.main, *run, "--by", "place.csv:floor")
    assert "cannot be read" in refusal(evaluation.main, *run, "--by", "none.csv:room")
    (pairs / "place.csv").write_text(f"image,room\n{rows.split(chr(10))[0]}\n")
    assert "has no row for the image" in refusal(evaluation.main, *run, "--by", "place.csv:room")


def test_classes_have_sets_and_rejection_too(classes, refusal):
    """The same tasks on images with classes, whose gallery is the classes; sets by the definition."""
    from datasets.embeddings import Pairs
    from metrics.calibration import halves

    values, arrays = result("conformal", "--alpha", "0.1")
    record = values["image_to_class"]["conformal"]["lac"]["0.1"]
    split = Pairs("embeddings", "given", "test0")
    unit = [
        np.array(x, float) / np.linalg.norm(np.array(x, float), axis=1, keepdims=True)
        for x in (split.image, split.text)
    ]
    p = special.softmax(values["image_to_class"]["fitted"]["scale"] * unit[0] @ unit[1].T, axis=1)
    first, right = halves(np.arange(60)), 1 - p[np.arange(60), split.label]
    limit = np.where(first, np.sort(right[~first])[27], np.sort(right[first])[27])  # of 30: the 28th, ceil(0.9 * 31)
    assert record["coverage"] == pytest.approx((right <= limit).mean(), abs=0.02)
    assert record["mean_size"] == pytest.approx((1 - p <= limit[:, None]).sum(axis=1).mean(), abs=0.1)
    assert len(arrays["image_to_class_lac_0.1_size"]) == 60
    values, _ = result("unanswerable", "--val", "rest0-90")
    without = np.where(np.arange(6) == split.label[:, None], -1, unit[0] @ unit[1].T).max(axis=1)
    tops = np.concatenate([(unit[0] @ unit[1].T).max(axis=1), without])
    wanted = roc_auc_score(np.repeat([1, 0], 60), tops)
    assert values["image_to_class"]["rejection"]["top"]["auroc"] == pytest.approx(wanted, abs=2e-3)
    values, _ = result("matching")
    assert values["image_to_class"]["base_rate"] == pytest.approx(1 / 6)
    message = refusal(evaluation.main, *CLIP, "--task", "matching", "--hubs", "nnn")
    assert "--hubs corrects no classes for --task matching" in message
