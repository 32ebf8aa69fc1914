"""Matching: probabilities and thresholds against slow definitions, alone and from files."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from decided import RESULT, cosines, pairs_of, result, score_of
from scipy import special
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

import eval as evaluation
import train
from metrics import matching
from metrics.calibration import calibration_error, reliability
from metrics.comparison import PairedBootstrap
from tasks.matching import _answer


def test_a_small_gallery_is_scored_whole(problem):
    scores, positives, _ = problem
    scored, total = matching.scored_pairs(score_of(scores), 40, *pairs_of(positives), scale=2.0)
    truth = np.zeros(scores.shape)
    truth[pairs_of(positives)] = 1
    expected = sorted(
        (q, round(float(np.float32(s)), 6), m) for q, (row, t) in enumerate(zip(scores, truth)) for s, m in zip(row, t)
    )
    assert sorted((q, round(s, 6), m) for s, m, _, q in zip(*scored)) == expected
    assert (scored.weight == 1).all() and scored.base_rate == pytest.approx(truth.mean())
    assert total == pytest.approx(special.logsumexp(2 * scores, axis=1), rel=1e-5)
    posterior = special.softmax(2 * scores, axis=1)
    odds = matching.log_odds(scored.score, total[scored.query], 2.0)
    for q in range(3):
        assert np.sort(odds[scored.query == q]) == pytest.approx(np.sort(special.logit(posterior[q])), abs=1e-3)


def test_of_a_large_gallery_the_hardest_are_all_there_and_weights_add_up(problem):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(30, 900))
    positives = [rng.choice(900, size=100, replace=False) if q % 2 else np.array([q]) for q in range(30)]
    scored, _ = matching.scored_pairs(score_of(scores), 900, *pairs_of(positives))
    for q in range(30):
        of_query = scored.rows(scored.query == q)
        wrong = np.sort(np.delete(scores[q], positives[q]))[::-1]
        kept = np.sort(of_query.score[of_query.match == 0])[::-1]
        assert kept[:64] == pytest.approx(wrong[:64].astype(np.float32))
        assert of_query.weight[of_query.match == 0].sum() == pytest.approx(len(wrong))
        assert of_query.weight[of_query.match == 1].sum() == pytest.approx(len(positives[q]))
        assert (of_query.match == 1).sum() == min(64, len(positives[q]))
    # The sample stands for the others: a mean over all pairs is met within its error.
    assert scored.weight @ scored.score / scored.weight.sum() == pytest.approx(scores.mean(), abs=0.03)


def test_fits_are_scikit_learns_at_the_stated_prior(problem):
    scores, positives, _ = problem
    scored, _ = matching.scored_pairs(score_of(scores), 40, *pairs_of(positives))
    for prior in (0.001, 0.3):
        weight = scored.at(prior)
        assert weight.sum() == pytest.approx(1) and weight[scored.match == 1].sum() == pytest.approx(prior)
        grid = np.linspace(-3, 4, 20)
        wanted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
        wanted.fit(scored.score[:, None], scored.match, weight / weight.mean())
        platt = matching.fit_platt(scored, prior)
        # Two more pairs of n + 2 keep a separable sample finite.
        assert special.logit(platt(grid)) == pytest.approx(
            special.logit(wanted.predict_proba(grid[:, None])[:, 1]), abs=0.1
        )
        wanted = IsotonicRegression(out_of_bounds="clip").fit(scored.score, scored.match, weight)
        bounds = prior / (scored.match.sum() + 2), 1 - 1 / (scored.match.sum() + 2)
        steps = wanted.predict(scored.score).clip(*bounds)
        assert matching.fit_isotonic(scored, prior)(scored.score) == pytest.approx(steps)
    # Isotonic odds at two priors differ by the odds of the priors alone.
    low, high = (matching.fit_isotonic(scored, prior)(np.array([0.5, 1.0])) for prior in (0.05, 0.3))
    assert matching.shifted(low, 0.05, 0.3) == pytest.approx(high)


def test_a_separable_sample_has_a_finite_fit():
    scored = matching.Scored(np.array([0.0, 0.1, 0.9, 1.0]), np.array([0.0, 0, 1, 1]), np.ones(4), np.arange(4))
    platt = matching.fit_platt(scored, 0.5)
    assert 0 < platt(0.0) < 0.3 < 0.7 < platt(1.0) < 1


def test_figures_of_matching_by_definition(problem):
    scores, positives, group = problem
    scored, _ = matching.scored_pairs(score_of(scores), 40, *pairs_of(positives))
    prior, probability = 0.2, special.expit(scored.score - 1)
    weight, drawn = scored.at(prior), PairedBootstrap(group, draws=20)
    figures = matching.figures(scored, probability, prior, drawn)
    error = 0
    for low in np.arange(15) / 15:
        inside = (probability >= low) & (probability < low + 1 / 15)
        error += abs((weight * (scored.match - probability))[inside].sum())
    assert figures["ece"] == pytest.approx(error)
    log = np.where(scored.match == 1, np.log(probability), np.log1p(-probability))
    assert figures["nll"] == pytest.approx(-weight @ log)
    assert figures["brier"] == pytest.approx(weight @ (scored.match - probability) ** 2)
    assert figures["auroc"] == pytest.approx(roc_auc_score(scored.match, scored.score, sample_weight=weight))
    assert figures["aupr"] == pytest.approx(average_precision_score(scored.match, scored.score, sample_weight=weight))
    for name in ("nll", "brier", "auroc", "aupr"):
        low, high = figures["interval"][name]
        assert low <= figures[name] <= high
    share = np.array(figures["reliability"]["count"])
    gap = np.subtract(figures["reliability"]["accuracy"], figures["reliability"]["confidence"])
    assert share @ abs(gap) == pytest.approx(error)


def test_thresholds_by_trying_every_score(problem):
    scores, positives, group = problem
    scored, _ = matching.scored_pairs(score_of(scores), 40, *pairs_of(positives))
    weight, drawn = scored.at(0.2), PairedBootstrap(group, draws=20)
    for wanted in (0.5, 0.8, 0.95):
        reached = []
        for score in np.unique(scored.score):
            accepted = scored.score >= score
            if weight[accepted] @ scored.match[accepted] >= wanted * weight[accepted].sum() - 1e-12:
                reached.append(score)
        threshold = matching.threshold_for(scored, weight, wanted)
        assert threshold == (min(reached) if reached else None)
        if threshold is None:
            continue
        figures, accepted = matching.beyond(scored, 0.2, threshold, drawn), scored.score >= threshold
        assert figures["precision"] == pytest.approx(weight[accepted] @ scored.match[accepted] / weight[accepted].sum())
        assert figures["recall"] == pytest.approx(weight[accepted] @ scored.match[accepted] / 0.2)
        assert figures["answered"] == pytest.approx(len(set(scored.query[accepted])) / 60)
    assert matching.beyond(scored, 0.2, np.inf, drawn)["precision"] is None


def test_matching_from_files(pairs):
    """Thresholds of --val, and what they do, by a loop over all pairs of both splits."""
    values, arrays = result("matching", "--val", "rest0-150", "--prior", "0.05")
    side, (scores, owner) = values["text_to_image"], cosines()
    assert side["prior"] == 0.05 and side["base_rate"] == pytest.approx(1 / 60) and side["labels"] == "own"
    assert side["taught_by"] == {"images": 60, "galleries": [60]}  # 90 of --val: one gallery as large as the evaluated
    match = owner[:, None] == np.arange(60)
    assert (arrays["text_to_image_score_hit"] == (scores.argmax(axis=1) == owner)).mean() > 0.99
    for row in side["matching"]["score"]["thresholds"]:
        if row["threshold"] is None:
            assert row["measured"]["precision"] is None
            continue
        accepted = scores >= row["threshold"]
        assert row["measured"]["recall"] == pytest.approx(accepted[match].mean(), abs=0.01)
        assert row["measured"]["answered"] == pytest.approx(accepted.any(axis=1).mean(), abs=0.01)
        passed = 0.05 * accepted[match].mean(), 0.95 * accepted[~match].mean()
        assert row["measured"]["precision"] == pytest.approx(passed[0] / sum(passed), abs=0.01)
    slope, intercept = side["matching"]["score"]["fitted"]["platt"]
    best = special.expit(slope * scores.max(axis=1) + intercept)
    assert arrays["text_to_image_score_platt_confidence"] == pytest.approx(best, abs=2e-3)
    for basis in ("score", "posterior"):
        answer, hit = side["matching"][basis]["answer"], arrays[f"text_to_image_{basis}_hit"]
        stated = arrays[f"text_to_image_{basis}_answer_confidence"]
        assert answer["best_answer"]["ece"] == pytest.approx(calibration_error(reliability(stated, hit)))
        assert answer["chosen"][0].split(", ")[0] in ("platt", "isotonic")
    with open(Path(RESULT.format("matching")).with_suffix(".csv"), newline="") as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == 2 * 2 * 5 and table[0]["basis"] == "score"
    listed = [float(row["threshold"]) if row["threshold"] else None for row in table[:5]]
    assert listed == [row["threshold"] for row in side["matching"]["score"]["thresholds"]]


def test_the_fit_for_best_answers_is_chosen_by_their_likelihood():
    """Best answers that are right far more often than pairs of their score: the fit to them alone is chosen and right.

    Labels of judged queries change no probability.
    """
    rng = np.random.default_rng(0)
    queries = 400
    top = rng.normal(size=queries)
    right = (rng.random(queries) < special.expit(2 * top + 1)).astype(float)
    others = rng.normal(size=(queries, 20)) - 3 + np.minimum(top, 0)[:, None]
    score = np.concatenate([top[:, None], others], axis=1)
    match = np.zeros_like(score)
    match[:, 0] = right
    match[right == 0, 1] = 1
    query = np.repeat(np.arange(queries), 21)
    first = np.arange(queries) < queries // 2

    def answer(match):
        scored = matching.Scored(score.ravel(), match.ravel(), np.ones(score.size), query)
        part = SimpleNamespace(group=np.arange(queries))
        folds = [SimpleNamespace(taught_by=first, judged=~first), SimpleNamespace(taught_by=~first, judged=first)]
        measured = SimpleNamespace(parts=[part], group=part.group, folds=folds)
        return _answer(scored, measured, scored.base_rate, scored.base_rate)

    figures, confidence = answer(match)
    assert all(name.endswith("best answers") for name in figures["chosen"])
    assert figures["best_answer"]["ece"] < figures["best_answer"]["by_chance"][1]
    assert abs(confidence - special.expit(2 * top + 1)).mean() < 0.06
    turned = match.copy()
    turned[~first] = turned[~first][:, [1, 0, *range(2, 21)]]
    assert np.array_equal(answer(turned)[1][~first], confidence[~first])


def test_a_method_with_a_match_probability_stands_beside(pairs):
    run = ["--dataset", "embeddings", "--method", "pcmepp", "--quiet", "--device", "cpu"]
    small = ["train.epochs=1", "data.train_split=train0-150", "model.width=16", "train.batch_size=64"]
    train.main([*run, "--set", *small])
    for task in ("matching", "conformal", "unanswerable"):
        evaluation.main([*run, "--task", task, "--score", "log_likelihood"])
    values = {
        task: json.loads(path.read_text()) for path in Path("results").rglob("*.json") for task in [path.stem[11:]]
    }
    side = values["matching"]["text_to_image"]["matching"]["score"]
    assert side["model"]["auroc"] == side["isotonic"]["auroc"] and side["model"]["ece"] != side["isotonic"]["ece"]
    assert values["conformal"]["text_to_image"]["levels_by"] == "query"
    assert "retrieved" in values["unanswerable"]["text_to_image"]["rejection"]
