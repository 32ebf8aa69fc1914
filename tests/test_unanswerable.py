"""Unanswerable queries: rejection against slow definitions; what decisions may learn from, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from decided import CLIP, LEARNED, cosines, pairs_of, result, score_of
from scipy import special, stats
from sklearn.metrics import roc_auc_score

import eval as evaluation
from metrics import answering


def test_uncertainties_with_and_without_by_definition(problem):
    scores, positives, _ = problem
    columns = answering.with_and_without(score_of(scores), 40, *pairs_of(positives), scale=2.0)
    for q, items in enumerate(positives):
        for side, row in enumerate((scores[q], np.delete(scores[q], items))):
            p = special.softmax(2 * row)
            first, second = -np.sort(-row)[:2]
            wanted = {"top": -first, "margin": second - first, "energy": -special.logsumexp(2 * row) / 2}
            wanted |= {"entropy": stats.entropy(p), "probability": -np.log(p.max())}
            for name, value in wanted.items():
                assert columns[name][q, side] == pytest.approx(value, abs=1e-5)
        assert columns["hit"][q] == (scores[q].argmax() in items) or (scores[q] == scores[q].max()).sum() > 1
        assert columns["left"][q] == 40 - len(items)
        assert columns["best"][q, 1] not in items


def test_no_uncertainty_without_two_items_left():
    scores = torch.tensor([[0.5, 0.4, 0.3], [0.5, 0.4, 0.3]])
    columns = answering.with_and_without(lambda rows: scores[rows], 3, [0, 0, 1], [0, 1, 0])
    assert np.isnan(columns["top"][:, 1]).tolist() == [True, False]


def test_unanswerable_from_files(pairs):
    values, arrays = result("unanswerable", "--val", "rest0-150")
    side, (scores, owner) = values["text_to_image"], cosines()
    assert side["asked"] == 120 and side["fit_all"] == 0 and side["labels"] == "own"
    without = scores.copy()
    without[np.arange(len(owner)), owner] = -np.inf
    tops = np.concatenate([scores.max(axis=1), without.max(axis=1)])
    has = np.repeat([1, 0], 120)
    assert side["rejection"]["top"]["auroc"] == pytest.approx(roc_auc_score(has, tops), abs=1e-3)
    hit = np.concatenate([scores.argmax(axis=1) == owner, np.zeros(120)])
    order = np.argsort(-tops, kind="stable")
    risk = np.cumsum(1 - hit[order]) / np.arange(1, 241)
    assert side["rejection"]["top"]["aurc"] == pytest.approx(risk.mean(), abs=5e-3)
    assert side["rejection"]["learned"]["auroc"] > 0.5 and arrays["text_to_image_learned_with"].shape == (120,)
    assert arrays["text_to_image_right_with"].min() >= -1 and arrays["text_to_image_right_with"].max() <= 0


def test_captions_of_what_no_image_shows(searched):
    side = json.loads(Path(LEARNED.format("unanswerable")).read_text())["text_to_image"]
    arrays = np.load(Path(LEARNED.format("unanswerable")).with_suffix(".npz"))
    assert side["absent"]["queries"] == 3 and side["absent"]["text"][1] == "a city at night"
    for name, record in side["absent"]["rejection"].items():
        present, absent = (arrays[f"text_to_image_{name}_{which}"] for which in ("present", "absent"))
        wanted = roc_auc_score(np.repeat([1, 0], [len(present), 3]), -np.concatenate([present, absent]))
        assert record["auroc"] == pytest.approx(wanted, abs=1e-6)
    assert side["labels"] == "true" and side["asked"] + side["fit_all"] == 500


def test_nothing_learns_from_what_is_judged(pairs, monkeypatch):
    """Labels of judged queries change no threshold of theirs; --val, --split and the bank have no image in common."""
    from tasks import decisions

    seen = []
    original = decisions.folds

    def spy(parts):
        folds = original(parts)
        group = np.concatenate([part.group for part in parts])
        for fold in folds:
            seen.append(set(group[fold.taught_by]) & set(group[fold.judged]))
        judged = np.sum([fold.judged for fold in folds], axis=0)
        assert (judged[: len(parts[0].group)] == 1).all() and not judged[len(parts[0].group) :].any()
        return folds

    monkeypatch.setattr(decisions, "folds", spy)
    for flags in ((), ("--val", "rest0-150")):
        result("unanswerable", *flags)
    assert len(seen) == 2 * (2 + 1) and not any(seen)


def test_what_cannot_be_decided_is_refused(pairs, refusal):
    run = [*CLIP, "--task"]
    for alpha in ("0", "1", "-0.1", "1.5"):
        assert "--alpha must lie between 0 and 1" in refusal(evaluation.main, *run, "conformal", "--alpha", alpha)
    message = refusal(evaluation.main, *run, "conformal", "--alpha", "0.01")
    assert "alpha 0.01 takes at least 99 images that teach, and here are 30" in message
    for prior in ("0", "1", "2"):
        assert "--prior must lie between 0 and 1" in refusal(evaluation.main, *run, "matching", "--prior", prior)
    for flag in (["--uncer_levels", "3"], ["--levels_by", "query"], ["--drop_remainder"]):
        message = refusal(evaluation.main, *run, "matching", *flag)
        assert f"--task matching would not follow {flag[0]}: leave it out" in message
    Path("empty.csv").write_text("image,room\n")
    assert "empty.csv has no row" in refusal(evaluation.main, *run, "conformal", "--by", "empty.csv:room")
    assert "names no column: name FILE:COLUMN" in refusal(evaluation.main, *run, "conformal", "--by", "empty.csv")
    assert "--alpha is for --task conformal" in refusal(evaluation.main, *run, "matching", "--alpha", "0.1")
    assert "--prior is for --task matching" in refusal(evaluation.main, *run, "retrieval", "--prior", "0.1")
    assert "judges one score" in refusal(evaluation.main, *run, "matching", "--score", "both")
    assert "shares 60 images with" in refusal(evaluation.main, *run, "matching", "--val", "all")
    hubs = ["--hubs", "nnn", "--val", "train0"]
    assert "from which --hubs learns: name another --val" in refusal(evaluation.main, *run, "matching", *hubs)
    assert "cannot be read" in refusal(evaluation.main, *run, "unanswerable", "--absent", "nothing.txt")
    assert not Path("results").exists()


@pytest.mark.parametrize("task", ["matching", "conformal", "unanswerable", "correctness"])
def test_too_few_images_are_refused(pairs, refusal, task):
    """Of two images and of three, one teaches in one of the halves."""
    few = ["--alpha", "0.5"] if task == "conformal" else []
    for split in ("rest0-238", "rest0-237"):
        message = refusal(evaluation.main, *CLIP, "--task", task, "--split", split, *few)
        assert "one image teaches, and two are the least: evaluate a larger split" in message


def test_a_gallery_of_two_has_no_unanswerable_query(pairs, refusal):
    run = [*CLIP, "--task", "unanswerable"]
    for flags in (["--val", "rest0-238"], ["--split", "rest0-238", "--val", "test0"]):
        assert "has two items that do not fit it" in refusal(evaluation.main, *run, *flags)


def test_hub_correction_is_of_another_bank(pairs):
    """Scores less a constant for each item, which changes what is decided."""
    plain, _ = result("unanswerable", "--val", "rest0-150")
    corrected, _ = result("unanswerable", "--val", "rest0-150", "--hubs", "nnn")
    assert corrected["config"]["hubs"] == "nnn"
    tops = [values["text_to_image"]["rejection"]["top"]["auroc"] for values in (plain, corrected)]
    assert tops[0] != tops[1]
