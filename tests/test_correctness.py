"""Correctness: predictors of right answers against loops, in classification and retrieval, and what they have seen."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from decided import CLIP, cosines, result
from scipy import special, stats
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import eval as evaluation
import report
from datasets.embeddings import Pairs
from metrics import correctness
from metrics.calibration import halves
from models import icpe, vilu
from reporting.figures import style
from tasks import correctness as task

SEEN = "probability", "doctor", "temperature", "rel-u", "rel-u, ranks", "logistic", "linear", "vilu", "vilu, official"
SEEN += "icpe", "icpe, official", "probe"
HELD_OUT = "probability", "doctor", "temperature", "rel-u, ranks", "logistic", "linear", "vilu", "vilu, official"


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
    rows = vilu.inputs(image, text, logit)
    for row, v, scores in zip(rows, image, logit):
        p = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
        expected = sum(share * t for share, t in zip(p, text))
        first, second = sorted(p.log().tolist())[::-1][:2]
        wanted = [*v.tolist(), *expected.tolist(), *text[int(scores.argmax())].tolist(), first, first - second]
        assert row.tolist() == pytest.approx(wanted)
    official = vilu.ViLU(512, vilu.PRESETS["official"]["widths"], scores=False)
    assert sum(p.numel() for p in official.parameters()) == 951_297  # of the paper's code at D = 512, without its maps
    without = vilu.ViLU(6, (4,), scores=False).double()
    assert torch.equal(without(rows), without(rows[:, :-2]))
    hit = torch.tensor([1.0, 1, 1, 0])
    assert vilu.wrong_weight(hit) == pytest.approx(math.log(1 + 0.75 / 0.25))  # as published
    assert vilu.wrong_weight(torch.ones(4)) == 1.0


def test_vilu_learns_what_probability_does_not_know(monkeypatch):
    """All classes look alike; which images are mistaken shows in the image alone. No image is held out in part."""
    monkeypatch.setitem(vilu.PRESETS["default"], "epochs", 100)
    rng = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(600, 8, generator=rng), dim=1)
    text = torch.eye(8)[:3]
    inputs, hit = vilu.inputs(image, text, torch.zeros(600, 3) + 0.01 * image @ text.T), (image[:, 5] > 0).float()
    group = np.arange(400) // 2
    model = vilu.fit(inputs[:400], hit[:400], group=group)
    with torch.inference_mode():
        output = model(inputs[400:])
    assert roc_auc_score(hit[400:], output) > 0.9
    again = vilu.fit(inputs[:400], hit[:400], group=group)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("preset", icpe.PRESETS)
def test_icpe_by_foreign_gaussians(preset, monkeypatch):
    """Densities of scipy on the components of scikit-learn; a class without images has none."""
    monkeypatch.setitem(icpe.PRESETS[preset], "components", 5)
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 3], 40)
    taught, asked = rng.normal(size=(120, 16)) + label[:, None], 2 * rng.normal(size=(9, 16)) + 1
    probability = icpe.class_probability(taught, label, asked, 4, preset)
    if icpe.PRESETS[preset]["unit"]:
        taught, asked = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (taught, asked))
    model = PCA(5).fit(taught)
    taught, asked = model.transform(taught), model.transform(asked)
    within = [np.cov(taught[label == number].T) for number in (0, 1, 3)]
    if icpe.PRESETS[preset]["prior"]:  # five more images of the covariance that all share
        centered = [taught[label == number] - taught[label == number].mean(axis=0) for number in (0, 1, 3)]
        shared = LedoitWolf(assume_centered=True).fit(np.concatenate(centered)).covariance_
        within = [(39 * each + 5 * shared) / (39 + 5) for each in within]
    log_density = np.full((9, 4), -np.inf)
    for number, covariance in zip((0, 1, 3), within):
        gaussian = stats.multivariate_normal(taught[label == number].mean(axis=0), covariance + 1e-8 * np.eye(5))
        log_density[:, number] = gaussian.logpdf(asked)
    assert probability == pytest.approx(special.softmax(log_density, axis=1), rel=1e-6, abs=1e-12)


def test_icpe_of_fewer_images_than_components():
    """Shrinkage keeps the densities of rank-deficient classes comparable; the published ridge alone does not."""
    rng = np.random.default_rng(0)
    label = np.arange(30) % 3
    draw = lambda of: rng.normal(size=(len(of), 64)) + 1.5 * np.eye(64)[of]  # noqa: E731
    taught, other = draw(label), np.arange(300) % 3
    asked = draw(other)
    surest = {preset: icpe.class_probability(taught, label, asked, 3, preset) for preset in icpe.PRESETS}
    nll = {preset: -np.log(p[np.arange(300), other].clip(1e-300)).mean() for preset, p in surest.items()}
    assert nll["default"] < nll["official"] / 100


def test_a_linear_rival_is_scikit_learns_and_takes_the_better_penalty():
    rng = np.random.default_rng(0)
    features, label = rng.normal(size=(90, 20)), np.array([0, 1, 3])[np.arange(90) % 3]
    features[:, 0] += label
    asked = rng.normal(size=(5, 20))
    group = np.arange(90) // 3
    single = task._regression(features, label, group, asked, [0.1], classes=4)
    wanted = LogisticRegression(C=0.1, max_iter=1000).fit(features, label).predict_proba(asked)
    assert single[:, [0, 1, 3]] == pytest.approx(wanted) and not single[:, 2].any()
    fold = np.random.default_rng(0).permutation(30)[group] % 3
    losses = {}
    for penalty in (0.1, 1e4):
        model = LogisticRegression(C=penalty, max_iter=1000)
        stated = np.empty(90)
        for out in (fold == number for number in range(3)):
            model.fit(features[~out], label[~out])
            stated[out] = model.predict_proba(features[out])[
                np.arange(out.sum()), np.searchsorted([0, 1, 3], label[out])
            ]
        losses[penalty] = -np.log(stated.clip(1 / 92)).mean()
    best = min(losses, key=losses.get)
    assert task._regression(features, label, group, asked, [0.1, 1e4], 4) == pytest.approx(
        task._regression(features, label, group, asked, [best], 4)
    )


def test_correctness_of_classes_from_files(classes, monkeypatch):
    """Every predictor on seen classes, and those that can on held-out ones, with the candidates of each recomputed."""
    for preset in vilu.PRESETS.values():
        monkeypatch.setitem(preset, "epochs", 10)
    values, arrays = result("correctness", "--val", "rest0-90")
    side, split = values["image_to_class"], Pairs("embeddings", "given", "test0")
    parts = (np.array(x, float) for x in (split.image, split.text))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in parts]
    cosine = unit[0] @ unit[1].T
    assert side["accuracy"] == pytest.approx((cosine.argmax(axis=1) == split.label).mean(), abs=0.02)
    half = halves(np.arange(6))
    others = np.where(half[split.label][:, None] == half, cosine, -np.inf)  # of the half that its own class is in
    assert side["held_out"]["accuracy"] == pytest.approx((others.argmax(axis=1) == split.label).mean(), abs=0.02)
    assert list(side["correctness"]) == list(SEEN) and list(side["held_out"]["correctness"]) == list(HELD_OUT)
    for prefix, figures in (("", side), ("held_out_", side["held_out"])):
        hit = arrays[f"image_to_class_{prefix}hit"]
        trials = [half[split.label], ~half[split.label]] if prefix else [np.full(60, True)]
        areas = {}
        for name, record in figures["correctness"].items():
            predicted = arrays[f"image_to_class_{prefix}{name}"]
            areas[name] = sum(rows.sum() * roc_auc_score(hit[rows], predicted[rows]) for rows in trials) / 60
            assert record["auroc"] == pytest.approx(areas[name])
            assert record["interval"][0] <= record["auroc"] <= record["interval"][1]
        for name, record in figures["correctness"].items():
            for other, less in record["less"].items():
                assert less["mean"] == pytest.approx(areas[name] - areas[other]) and less["low"] <= less["high"]
    p = special.softmax(8 * others, axis=1)
    assert arrays["image_to_class_held_out_probability"] == pytest.approx(p.max(axis=1), abs=2e-3)
    assert side["correctness"]["doctor"]["labels"] == "none" and "ece" not in side["correctness"]["doctor"]
    assert side["taught_by"]["images"] == 150
    assert not side["correctness"]["probe"]["auroc"] < 0.5
    [part] = report.evaluations.read(Path("results/embeddings"))
    cells = {row.name: row.cells for table in part.tables for _, rows in table.groups for row in rows}
    assert cells["clip, vilu"]["image_to_class_held_out_auroc"].mean == side["held_out"]["correctness"]["vilu"]["auroc"]
    low = side["correctness"]["icpe"]["less"]["probe"]["low"]
    assert cells["clip, icpe"]["image_to_class_less_probe"].text.startswith(f"[{low:.3f}, ")
    for drawing in style.drawings(part):
        assert len(drawing.draw(part, style.looks([part]), style.WIDE).findobj()) > 50


def test_correctness_of_retrieval_from_files(pairs, monkeypatch):
    """Either direction, the gallery as candidates: all of it, and the half that nothing was taught with."""
    monkeypatch.setitem(vilu.PRESETS["default"], "epochs", 10)
    names = "doctor", "rel-u, ranks", "logistic", "linear", "vilu"
    values, arrays = result("correctness", "--predictors", *names)
    scores, owner = cosines()
    first = halves(owner)
    mask = first[:, None] == halves(np.arange(60))  # a caption's images of its half
    for direction, cosine, right, kept in (
        ("text_to_image", scores, owner[:, None] == np.arange(60), mask),
        ("image_to_text", scores.T, np.arange(60)[:, None] == owner, mask.T),
    ):
        side = values[direction]
        scale = np.log(arrays[f"{direction}_probability"])  # the posterior's scale follows from one probability
        for prefix, among in (("", cosine), ("held_out_", np.where(kept, cosine, -np.inf))):
            figures = side["held_out"] if prefix else side
            best = among.argmax(axis=1)
            assert (arrays[f"{direction}_{prefix}hit"] == right[np.arange(len(best)), best]).mean() > 0.98
            assert list(figures["correctness"]) == ["probability", *names]
            record = figures["correctness"]["linear"]
            assert record["less"].keys() == {"probability"}
            assert all(np.isfinite(arrays[f"{direction}_{prefix}{name}"]).all() for name in names)
        assert np.isfinite(scale).all() and side["candidates"] == "seen" and side["labels"] == "own"
    values, _ = result("correctness", "--val", "rest0-150", "--predictors", "logistic")
    assert values["text_to_image"]["candidates"] == "held out" and "held_out" not in values["text_to_image"]


def test_what_is_held_out_has_not_been_seen(pairs, monkeypatch):
    """No image and no candidate of a held-out trial is among those that taught, nor an image of any other trial."""
    trials, judge = [], task._judge

    def spy(of, *arguments):
        trials.append(of)
        return judge(of, *arguments)

    monkeypatch.setattr(task, "_judge", spy)
    result("correctness", "--predictors", "logistic")
    assert len(trials) == 4  # seen and held out, in two directions
    for number, of in enumerate(trials):
        assert sorted(np.concatenate([trial.rows for trial in of])) == list(range([120, 120, 60, 60][number]))
        for trial in of:
            assert not set(trial.taught["group"]) & set(trial.asked["group"])
            if number % 2:
                answers = [{row.tobytes() for row in each["inputs"][:, 32:48]} for each in (trial.taught, trial.asked)]
                assert not answers[0] & answers[1]


def test_what_cannot_be_predicted_is_refused(pairs, refusal):
    run = [*CLIP, "--task"]
    message = refusal(evaluation.main, *run, "correctness", "--predictors", "vilu", "crystal ball")
    assert "there is no predictor 'crystal ball': name some of 'probability', 'doctor'" in message
    assert "--predictors is for --task correctness" in refusal(
        evaluation.main, *run, "matching", "--predictors", "vilu"
    )
    message = refusal(evaluation.main, *run, "correctness", "--predictors", "probe")
    assert "'probe' needs images with classes" in message
