"""Decisions: match probabilities, conformal sets and rejection against slow definitions; leakage and bad input."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_once
from scipy import special, stats
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

import cache_embeddings
import eval as evaluation
import train
import uncertainty
from metrics import answering, conformal, correctness, matching
from metrics.comparison import PairedBootstrap
from models import vilu

CLIP = ["--dataset", "embeddings", "--method", "clip", "--quiet", "--device", "cpu"]
RESULT = "results/embeddings/given/clip/seed0/embeddings-{}.json"


@pytest.fixture
def problem():
    """Scores (Q, G) of queries with several answers each, some of them tied; rows of the answers, and groups."""
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(60, 40)), 1)
    positives = [np.sort(rng.choice(40, size=rng.integers(1, 4), replace=False)) for _ in range(60)]
    for row, items in enumerate(positives):
        scores[row, items] += 1
    return scores, positives, np.arange(60) // 2


def pairs_of(positives):
    return np.repeat(np.arange(len(positives)), [len(items) for items in positives]), np.concatenate(positives)


def score_of(scores):
    tensor = torch.tensor(scores)
    return lambda rows: tensor[rows]


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


@pytest.fixture(scope="session")
def pairs_once(tmp_path_factory):
    """300 pairs of random embeddings, of which some captions fit several images, cached and `clip` trained on them."""

    def make():
        rng = np.random.default_rng(0)
        image = rng.normal(size=(300, 16)).astype(np.float32)
        text = np.repeat(image, 2, axis=0) + rng.normal(size=(600, 16), scale=1.5).astype(np.float32)
        np.savez("pairs.npz", image=image, text=text, image_of_text=np.repeat(np.arange(300), 2))
        splits = ["train0-150", "rest0-150", "train0", "test0", "all"]
        cache = ["--dataset", "embeddings", "--root", "pairs.npz", "--quiet", "--splits", *splits]
        cache_embeddings.main([*cache, "--set", "data.options.logit_scale=5.0"])
        train.main([*CLIP[:-2], "--val-fraction", "0", "--set", "data.train_split=train0-150"])

    return made_once(tmp_path_factory, "decisions", make)


@pytest.fixture
def pairs(pairs_once, tmp_path, monkeypatch):
    (tmp_path / "embeddings").symlink_to(pairs_once / "embeddings")
    shutil.copytree(pairs_once / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(task, *flags):
    evaluation.main([*CLIP, "--task", task, *flags])
    path = Path(RESULT.format(task))
    return json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz")))


def cosines():
    from datasets.embeddings import Pairs

    split = Pairs("embeddings", "given", "test0")
    image, text = (np.array(x, dtype=np.float64) for x in (split.image, split.text))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    return unit[1] @ unit[0].T, split.image_of_text


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
    with open(Path(RESULT.format("matching")).with_suffix(".csv"), newline="") as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == 2 * 2 * 5 and table[0]["basis"] == "score"
    listed = [float(row["threshold"]) if row["threshold"] else None for row in table[:5]]
    assert listed == [row["threshold"] for row in side["matching"]["score"]["thresholds"]]


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
    assert "--alpha is for --task conformal" in refusal(evaluation.main, *run, "matching", "--alpha", "0.1")
    assert "--prior is for --task matching" in refusal(evaluation.main, *run, "retrieval", "--prior", "0.1")
    assert "judges one score" in refusal(evaluation.main, *run, "matching", "--score", "both")
    assert "shares 60 images with" in refusal(evaluation.main, *run, "matching", "--val", "all")
    hubs = ["--hubs", "nnn", "--val", "train0"]
    assert "from which --hubs learns: name another --val" in refusal(evaluation.main, *run, "matching", *hubs)
    assert "cannot be read" in refusal(evaluation.main, *run, "unanswerable", "--absent", "nothing.txt")
    assert not Path("results").exists()


@pytest.fixture(scope="session")
def searched_once(small_world, tmp_path_factory):
    """The small `shapes`, with `clip` and what its captions teach about decisions."""

    def make():
        for name in ("embeddings", "data"):
            Path(name).symlink_to(small_world / name)
        train.main(["--dataset", "shapes", "--method", "clip", "--quiet", "--device", "cpu"])
        run = ["--dataset", "shapes", "--method", "clip", "--quiet", "--device", "cpu", "--score", "log_likelihood"]
        Path("absent.txt").write_text("a dog on a sofa\n\na city at night\na red hexagon\n")
        for task in ("matching", "conformal", "unanswerable"):
            evaluation.main([*run, "--task", task, *(["--absent", "absent.txt"] * (task == "unanswerable"))])

    return made_once(tmp_path_factory, "searched", make)


@pytest.fixture
def searched(searched_once, tmp_path, monkeypatch):
    for name in ("embeddings", "data"):
        (tmp_path / name).symlink_to(searched_once / name)
    for name in ("checkpoints", "results"):
        shutil.copytree(searched_once / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SEARCH = ["--dataset", "shapes", "--method", "clip", "--device", "cpu", "--gallery", "val"]
LEARNED = "results/shapes/shapes-tiny/clip/seed0/shapes-{}.json"


def test_answers_from_files(searched, capsys):
    """What a search prints for captions of the gallery itself, by the definitions, on the scores of all pairs."""
    from datasets.embeddings import Pairs

    pairs = Pairs("shapes", "shapes-tiny", "val")
    texts = [pairs.items["text"][row] for row in (3, 40, 41)]
    uncertainty.main(
        [*SEARCH, "--json", "--html", "page.html", "--unanswerable", "0.2", *texts, pairs.items["image"][7]]
    )
    rows = json.loads(capsys.readouterr().out)
    sets, rejection = (json.loads(Path(LEARNED.format(t)).read_text()) for t in ("conformal", "unanswerable"))
    image, text = (np.array(x, dtype=np.float64) for x in (pairs.image, pairs.text))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    cosine = unit[1] @ unit[0].T
    for row, scores in zip(rows, (*cosine[[3, 40, 41]], unit[0][7] @ unit[1].T), strict=True):
        side = "text_to_image" if row["kind"] == "text" else "image_to_text"
        names = pairs.items["image" if row["kind"] == "text" else "text"]
        fitted, models = sets[side]["fitted"], rejection[side]["fitted"]
        p = special.softmax(fitted["scale"] * scores)
        assert row["best"][0]["probability"] == pytest.approx(p.max(), rel=0.05)
        assert scores[names.index(row["best"][0]["answer"])] >= scores.max() - 2e-3
        level = np.searchsorted(fitted["edges"], stats.entropy(p), side="right")
        limit = fitted["thresholds"]["lac"]["0.1"]["levels"][level]
        assert row["set_size"] == pytest.approx((1 - p <= limit).sum(), abs=2)
        first, second = -np.sort(-scores)[:2]
        energy = -special.logsumexp(fitted["scale"] * scores) / fitted["scale"]
        features = np.array([-first, second - first, energy, stats.entropy(p), -np.log(p.max())])
        answer, right = (
            special.expit(features @ models[k]["weight"] + models[k]["intercept"]) for k in ("answer", "right")
        )
        answer = 0.8 * answer / (0.8 * answer + 0.2 * (1 - answer))  # from one without an answer in two to one in five
        assert row["nothing_fits"] == pytest.approx(1 - answer, abs=0.03)
        assert row["right"] == pytest.approx(answer * right, abs=0.03)
    page = Path("page.html").read_text()
    assert page.count("<section>") == 4 and "data:image/" in page and "http" not in page.replace("http-equiv", "")
    uncertainty.main([*SEARCH, texts[0]])
    printed = capsys.readouterr().out
    assert "the first answer is right: " in printed and "nothing fits: " in printed


def test_words_that_nothing_was_learned_from_are_named(searched, capsys):
    prompts = ["a photo of a Dog, a red DOG on a teapot", "a photo of a red circle"]
    uncertainty.main([*SEARCH, *prompts])
    assert "no caption that taught this has the word dog, teapot: it need not hold" in capsys.readouterr().out
    uncertainty.main([*SEARCH, "--json", "--html", "page.html", *prompts])
    assert [row["unseen_words"] for row in json.loads(capsys.readouterr().out)] == [["dog", "teapot"], []]
    assert Path("page.html").read_text().count("has the word dog, teapot: it need not hold here.") == 1


def test_captions_of_what_no_image_shows(searched):
    side = json.loads(Path(LEARNED.format("unanswerable")).read_text())["text_to_image"]
    arrays = np.load(Path(LEARNED.format("unanswerable")).with_suffix(".npz"))
    assert side["absent"]["queries"] == 3 and side["absent"]["text"][1] == "a city at night"
    for name, record in side["absent"]["rejection"].items():
        present, absent = (arrays[f"text_to_image_{name}_{which}"] for which in ("present", "absent"))
        wanted = roc_auc_score(np.repeat([1, 0], [len(present), 3]), -np.concatenate([present, absent]))
        assert record["auroc"] == pytest.approx(wanted, abs=1e-6)
    assert side["labels"] == "true" and side["asked"] + side["fit_all"] == 500


def test_what_cannot_be_searched_is_refused(searched, refusal):
    assert "--html shows the answers of a --gallery" in refusal(
        uncertainty.main, *SEARCH[:-2], "--html", "a", "a photo"
    )
    assert "--alpha 0.3 is none of 0.05, 0.1, 0.2" in refusal(uncertainty.main, *SEARCH, "--alpha", "0.3", "a photo")
    assert "--unanswerable must lie" in refusal(uncertainty.main, *SEARCH, "--unanswerable", "1", "a photo")
    assert "is missing: run" in refusal(uncertainty.main, *SEARCH[:-1], "test", "a photo")
    message = refusal(uncertainty.main, *SEARCH, "--learned-on", "test", "a photo")
    assert (
        "shapes+test-conformal.json is missing, from which to answer: run `python eval.py --dataset shapes" in message
    )
    path = Path(LEARNED.format("conformal"))
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"checkpoint": "0"}))
    assert "is of other weights than" in refusal(uncertainty.main, *SEARCH, "a photo")
    path.write_text(json.dumps(values)[:-9])
    assert "is damaged: delete it and run" in refusal(uncertainty.main, *SEARCH, "a photo")


def test_decisions_have_parts_in_the_report(searched):
    """Each cell of the tables as it stands in the results; each figure has something to draw."""
    import report
    from reporting.figures import style

    values = {
        task: json.loads(Path(LEARNED.format(task)).read_text()) for task in ("matching", "conformal", "unanswerable")
    }
    parts = report.evaluations.read(Path("results/shapes"))
    assert [part.task for part in parts] == list(values)
    tables = {table.name: table for part in parts for table in part.tables}
    assert tables.keys() == {"matching", "thresholds", "conformal", "unanswerable"}
    cells = {row.name: row.cells for name in tables for _, rows in tables[name].groups for row in rows}
    side = {task: result["text_to_image"] for task, result in values.items()}
    posterior = side["matching"]["matching"]["posterior"]
    assert cells["clip, posterior by isotonic"]["text_to_image_ece"].mean == posterior["isotonic"]["ece"]
    row = posterior["thresholds"][2]["measured"]
    assert cells["clip, posterior, 90 %"]["text_to_image_recall"].mean == pytest.approx(100 * row["recall"])
    record = side["conformal"]["conformal"]["aps"]["0.1"]
    assert cells["clip, APS"]["text_to_image_0.1_coverage"].mean == pytest.approx(100 * record["coverage"])
    worst = min(level["coverage"] for level in record["levels"])
    assert cells["clip, APS"]["text_to_image_0.1_levels"].mean == pytest.approx(100 * worst)
    record = side["unanswerable"]["rejection"]["energy"]
    assert cells["clip, energy"]["text_to_image_auroc"].mean == record["auroc"]
    looks = style.looks(parts)
    for part in parts:
        for drawing in style.drawings(part):
            for width in (style.WIDE, 3.6):
                assert len(drawing.draw(part, looks, width).findobj()) > 50


@pytest.fixture
def classes(tmp_path, monkeypatch):
    """300 embeddings of images in six classes, and `clip`."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    center, label = rng.normal(size=(6, 16)), np.arange(300) % 6
    image = center[label] + rng.normal(size=(300, 16), scale=1.5)
    names = {"label": label, "class_of_text": np.arange(6), "class_name": np.array(list("abcdef"))}
    np.savez("classes.npz", image=image.astype(np.float32), text=center.astype(np.float32), **names)
    cache = ["--dataset", "embeddings", "--root", "classes.npz", "--quiet", "--splits", "test0", "train0", "train0-90"]
    cache_embeddings.main([*cache, "rest0-90", "--set", "data.options.logit_scale=8.0"])
    train.main([*CLIP[:-2], "--set", "data.train_split=train0-90"])


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


def test_hub_correction_is_of_another_bank(pairs):
    """Scores less a constant for each item, which changes what is decided."""
    plain, _ = result("unanswerable", "--val", "rest0-150")
    corrected, _ = result("unanswerable", "--val", "rest0-150", "--hubs", "nnn")
    assert corrected["config"]["hubs"] == "nnn"
    tops = [values["text_to_image"]["rejection"]["top"]["auroc"] for values in (plain, corrected)]
    assert tops[0] != tops[1]


def test_doctor_and_relative_uncertainty_by_loops():
    rng = np.random.default_rng(0)
    probability, hit = rng.dirichlet(np.ones(5), size=40), rng.integers(2, size=40)
    wanted = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            shares = [np.mean([p[i] * p[j] for p, h in zip(probability, hit) if h == right]) for right in (0, 1)]
            wanted[i, j] = max(0, 0.5 * shares[0] - 0.5 * shares[1]) if i != j else 0
    wanted /= np.sqrt((wanted**2).sum())
    matrix = correctness.relative_matrix(probability, hit)
    assert matrix == pytest.approx(wanted)
    value = [sum(p[i] * wanted[i, j] * p[j] for i in range(5) for j in range(5)) for p in probability]
    assert correctness.relative(probability, matrix) == pytest.approx(value)
    assert correctness.doctor(probability) == pytest.approx([(1 - (p**2).sum()) / (p**2).sum() for p in probability])
    # Where nothing tells wrong answers from right ones, it is Gini's coefficient, up to a factor.
    gini = correctness.relative(probability, correctness.relative_matrix(probability, np.ones(40)))
    assert gini / gini[0] == pytest.approx((1 - (probability**2).sum(axis=1)) / (1 - (probability[0] ** 2).sum()))


def test_vilu_reads_what_the_paper_says():
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (9, 4))
    logit = 10 * image @ text.T
    rows = vilu.inputs(image, text, logit, scores=True)
    for row, v, scores in zip(rows, image, logit):
        p = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
        expected = sum(share * t for share, t in zip(p, text))
        first, second = sorted(p.log().tolist())[::-1][:2]
        wanted = [*v.tolist(), *expected.tolist(), *text[int(scores.argmax())].tolist(), first, first - second]
        assert row.tolist() == pytest.approx(wanted)
    official = vilu.ViLU(512, vilu.PRESETS["official"]["widths"], scores=False)
    assert sum(p.numel() for p in official.parameters()) == 951_297  # of the paper's code at D = 512, without its maps
    hit = torch.tensor([1.0, 1, 1, 0])
    assert vilu.wrong_weight(hit) == pytest.approx(math.log(1 + 0.75 / 0.25))  # as published
    assert vilu.wrong_weight(torch.ones(4)) == 1.0


def test_vilu_learns_what_probability_does_not_know():
    """Two classes look alike to the text; which images are mistaken shows in the image alone."""
    rng = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(600, 8, generator=rng), dim=1)
    text = torch.eye(8)[:3]
    logit, hit = torch.zeros(600, 3) + 0.01 * image @ text.T, (image[:, 5] > 0).float()
    model = vilu.fit(image[:400], text, logit[:400], hit[:400])
    with torch.inference_mode():
        output = model(image[400:], text, logit[400:])
    assert roc_auc_score(hit[400:], output) > 0.9
    again = vilu.fit(image[:400], text, logit[:400], hit[:400])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_correctness_from_files(classes, monkeypatch):
    from datasets.embeddings import Pairs

    monkeypatch.setitem(vilu.PRESETS["official"], "epochs", 10)
    values, arrays = result("correctness", "--val", "rest0-90")
    side, split = values["image_to_class"], Pairs("embeddings", "given", "test0")
    parts = (np.array(x, float) for x in (split.image, split.text))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in parts]
    cosine = unit[0] @ unit[1].T
    assert side["accuracy"] == pytest.approx((cosine.argmax(axis=1) == split.label).mean(), abs=0.02)
    assert list(side["correctness"]) == [
        "probability",
        "doctor",
        "temperature",
        "rel-u",
        "vilu",
        "vilu, official",
        "probe",
    ]
    hit = arrays["image_to_class_hit"]
    for name, record in side["correctness"].items():
        predicted = arrays[f"image_to_class_{name}"]
        assert record["auroc"] == pytest.approx(roc_auc_score(hit, predicted)) and np.isfinite(predicted).all()
        assert record["interval"][0] <= record["auroc"] <= record["interval"][1]
    assert side["correctness"]["doctor"]["labels"] == "none" and "ece" not in side["correctness"]["doctor"]
    assert side["taught_by"]["images"] == 150
    assert not side["correctness"]["probe"]["auroc"] < 0.5
