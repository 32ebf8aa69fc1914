"""Comparison of methods: temperatures of a validation split, paired intervals, and their tables, by slow loops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import POOLED, made_once, share_pooled, write_classes
from scipy import stats
from test_report import make_result, mean, rows_of, save

import cache_embeddings
import eval as evaluation
import report
import train
from datasets.embeddings import Pairs
from metrics import calibration, comparison
from metrics.uncertainty import DRAWN, auroc, times_drawn
from models.base import adapt_all
from reporting import evaluations
from reporting.words import MINUS
from tasks.classification import class_embeddings
from utils.checkpoint import Run
from utils.config import load_config
from utils.errors import UserError

CLASSES = ["--dataset", "folder", "--backbone", "shapes-tiny", "--device", "cpu"]
METHOD = ["--train-dataset", "shapes", "--method", "bayesvlm"]
JUDGED = [*CLASSES, *METHOD, "--split", "test", "--quiet"]
RESULT = "results/shapes/shapes-tiny/bayesvlm/seed0/folder+test-classification.json"


@pytest.fixture(scope="module")
def halved(pooled_world, tmp_path_factory):
    """A folder with a small `shapes` and its val images in folders by shape, half of them as val and half as test."""

    def make():
        share_pooled(pooled_world)
        write_classes(Path("drawn"), ["val", "test"])
        cache_embeddings.main([*CLASSES, "--root", "drawn", *POOLED, "--splits", "val", "test"])
        run = ["--dataset", "shapes", "--device", "cpu", "--quiet"]
        train.main([*run, "--method", "clip", "--val-fraction", "0"])
        train.main([*run, "--method", "bayesvlm", "--set", "model.candidates=160"])

    return made_once(tmp_path_factory, "halved", make)


@pytest.fixture
def place(halved, tmp_path, monkeypatch):
    for name in ("embeddings", "data", "checkpoints"):
        (tmp_path / name).symlink_to(halved / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(split, score="classify"):
    """Logits (N, C) of a split's images up to a scale, and their labels."""
    adaptor, pairs = Run(load_config("shapes", "bayesvlm")).load("cpu")[0], Pairs("folder", "shapes-tiny", split)
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", True), "cpu")
    prompt = adapt_all(adaptor.adapt_text, class_embeddings(Pairs("folder", "shapes-tiny", "test"), True), "cpu")
    return getattr(adaptor, score)(image, prompt).double(), np.array(pairs.label)


def test_a_temperature_is_fitted_on_all_of_another_split(place, capsys):
    evaluation.main([*JUDGED, "--val", "val", "--score", "both"])
    result, arrays = json.loads((place / RESULT).read_text()), np.load((place / RESULT).with_suffix(".npz"))
    fingerprint = Pairs("folder", "shapes-tiny", "val").meta["fingerprint"]
    assert result["val"] == "val" and result["val_fingerprint"] == fingerprint
    for part, score in ((result, "classify"), (result["other_score"], "similarity")):
        of_entry = part["image_to_class"]["calibration"]
        assert list(of_entry) == ["model", "temperature", "validation", *(["matched"] if score == "classify" else [])]
        figures = of_entry["validation"]
        [scale] = figures["scales"]
        (held_out, held_label), (logit, label) = logits("val", score), logits("test", score)

        def nll(by, logit=held_out, label=held_label):
            return -(by * logit).log_softmax(dim=1)[range(len(label)), label].numpy()

        assert nll(scale).mean() <= min(nll(1.02 * scale).mean(), nll(scale / 1.02).mean())
        assert figures["split"] == "val" and figures["nll"] == pytest.approx(nll(scale, logit, label).mean(), rel=1e-4)
        probability = (scale * logit).softmax(dim=1).numpy()
        confidence, hit = probability.max(axis=1), (probability.argmax(axis=1) == label).astype(float)
        assert figures["accuracy"] == hit.mean() and 0 < hit.mean() < 1
        wrong, right = (stats.entropy(probability, axis=1)[hit == value] for value in (0, 1))
        chance = stats.mannwhitneyu(wrong, right).statistic / len(wrong) / len(right)
        assert figures["auroc"] == pytest.approx(chance, abs=1e-3)
        if score == "classify":  # which ranks: its arrays are kept
            assert arrays["image_to_class_validation_nll"] == pytest.approx(nll(scale, logit, label), rel=1e-3)
            assert arrays["image_to_class_validation_confidence"] == pytest.approx(confidence, rel=1e-4)
            assert (arrays["image_to_class_validation_hit"] == hit).all()


def test_arrays_of_every_entry_stand_in_the_order_of_the_images(place, capsys):
    evaluation.main([*JUDGED[:-1], "--val", "val"])
    printed = capsys.readouterr().out
    result, arrays = json.loads((place / RESULT).read_text()), np.load((place / RESULT).with_suffix(".npz"))
    part, (logit, label) = result["image_to_class"]["calibration"], logits("test")
    entropy = result["image_to_class"]["uncertainty"]["entropy"]
    assert (part["model"]["auroc"], part["model"]["aurc"]) == (entropy["auroc"], pytest.approx(entropy["aurc"]))
    halves, scales = calibration.halves(np.arange(len(label))), part["temperature"]["scales"]
    scaled = logit * torch.tensor(np.where(halves, scales[1], scales[0]))[:, None]  # each half by that of the other
    expected = {"model": logit, "temperature": scaled}
    for name, logit in expected.items():
        log_probability = logit.log_softmax(dim=1)
        nll = -log_probability[range(len(label)), label].numpy()
        assert arrays[f"image_to_class_{name}_nll"] == pytest.approx(nll, rel=1e-3, abs=1e-5)
        confidence = log_probability.exp().amax(dim=1).numpy()
        assert arrays[f"image_to_class_{name}_confidence"] == pytest.approx(confidence, rel=1e-3)
    titles = {"model": "model", "temperature": "temperature", "validation": "temperature of val"}
    for name, figures in part.items():
        fields = [arrays[f"image_to_class_{name}_{field}"] for field in ("nll", "confidence", "hit")]
        assert figures["nll"] == pytest.approx(fields[0].mean())
        assert figures["accuracy"] == pytest.approx(fields[2].mean())
        assert figures["ece_15"] == calibration.calibration_error(calibration.reliability(*fields[1:]))
        title = (titles | {"matched": "matched temperature"})[name]
        assert f"    {title:19} {figures['nll']:.3f} {figures['ece_15']:.3f}\n" in printed


def test_what_a_temperature_cannot_be_fitted_on_is_refused(place, refusal, monkeypatch):
    shapes = ["--dataset", "shapes", "--method", "clip", "--device", "cpu"]
    assert "has captions and no classes: leave out --val" in refusal(evaluation.main, *shapes, "--val", "train")
    assert "--val test shares 50 images with" in refusal(evaluation.main, *JUDGED, "--val", "test")
    assert "/folder/shapes-tiny/all is missing" in refusal(evaluation.main, *JUDGED, "--val", "all")
    assert not (place / "results").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Pairs, "shared_with", lambda pairs, seen: 7 * (pairs.folder.name == "val"))
        assert "--val val has 7 images that were trained on" in refusal(evaluation.main, *JUDGED, "--val", "val")
        evaluation.main([*JUDGED, "--val", "val", "--allow-leakage"])
    monkeypatch.setattr(Pairs, "classes", property(lambda self: self.meta["classes"][:: of(self, val=-1, test=1)]))
    assert "has other classes than" in refusal(evaluation.main, *JUDGED, "--val", "val")


def of(pairs, **by_split):
    return by_split[pairs.folder.name]


def test_without_mistakes_there_is_no_temperature_of_a_split(place, capsys, monkeypatch):
    answers, labels = logits("val")[0].argmax(dim=1).numpy(), Pairs("folder", "shapes-tiny", "test").label
    label = property(lambda self: of(self, val=answers, test=labels), lambda self, read: None)
    monkeypatch.setattr(Pairs, "label", label, raising=False)
    evaluation.main([*JUDGED[:-1], "--val", "val"])
    result = json.loads((place / RESULT).read_text())
    assert list(result["image_to_class"]["calibration"]) == ["model", "temperature", "matched"]
    assert "no temperature of val: too few of its images are mistaken to bound one" in capsys.readouterr().out


def forecasts(runs=3, queries=200, seed=0, shift=0.0):
    """Random NLL, confidences and hits (R, Q); the confidence minus `shift` is the probability of a hit."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0, 1, (runs, queries))
    hit = (rng.uniform(size=confidence.shape) < confidence - shift).astype(float)
    return -np.log(np.where(hit, confidence, 1 - confidence)), confidence, hit


def slow_figures(nll, confidence, hit, rows, bins=15):
    """Mean NLL and ECE of the queries in `rows`, which may repeat, by definition."""
    nll, confidence, hit = (values[rows] for values in (nll, confidence, hit))
    error = 0.0
    for low in range(bins):
        inside = (confidence >= low / bins) & ((confidence < (low + 1) / bins) | (low == bins - 1))
        if inside.any():
            error += inside.sum() * abs(hit[inside].mean() - confidence[inside].mean())
    return np.mean(nll), error / len(rows)


def test_draws_of_queries_by_a_loop(monkeypatch):
    """The draws are those of `bootstrap`, which tests/test_metrics.py compares with a loop."""
    arrays = forecasts()
    drawn = comparison.resampled(*arrays, draws=20, seed=3)
    [times] = times_drawn(200, 20, 3, 20)
    assert drawn["nll"].shape == drawn["ece"].shape == (21, 3) and (times.sum(axis=1) == 200).all()
    for draw, count in enumerate([np.ones(200, int), *times]):
        for run in range(3):
            expected = slow_figures(*(values[run] for values in arrays), np.repeat(np.arange(200), count))
            assert (drawn["nll"][draw, run], drawn["ece"][draw, run]) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(comparison, "DRAWN", 600)  # three draws at once: the same ones
    parts = comparison.resampled(*arrays, draws=20, seed=3)
    for name, values in drawn.items():
        np.testing.assert_allclose(parts[name], values, atol=1e-12)
    assert comparison.resampled(*arrays, bins=20, draws=1)["ece"][0, 0] == pytest.approx(
        calibration.calibration_error(calibration.reliability(arrays[1][0], arrays[2][0], 20))
    )
    with pytest.raises(ValueError, match="a confidence is outside of"):
        comparison.resampled(arrays[0], 2 + arrays[1], arrays[2])


def test_intervals_of_differences_cover_the_true_one_as_often_as_stated():
    """Of a hundred pairs of forecasts, about 95 intervals contain the difference over very many queries."""
    truth = [forecasts(1, 10**6, shift=shift)[0].mean() for shift in (0, 0.1)]
    covered = 0
    for seed in range(100):
        one = comparison.resampled(*forecasts(1, 400, seed=2 * seed), draws=200)["nll"][:, 0]
        other = comparison.resampled(*forecasts(1, 400, seed=2 * seed + 1, shift=0.1), draws=200)["nll"][:, 0]
        difference = comparison.paired_difference(other, one)
        covered += difference.low <= truth[1] - truth[0] <= difference.high
    assert 85 <= covered <= 100


def test_a_difference_is_of_the_same_draws():
    ours, theirs = np.arange(41.0), np.append(1.0, np.arange(40.0) + np.tile([2, -1], 20))
    difference = comparison.paired_difference(ours, theirs)  # the draws differ by 1 - 2 and 1 + 1
    assert difference == (-1, -1, 2, 1) and not difference.real
    assert all(comparison.paired_difference(ours + shift, theirs).real for shift in (-3, 3))


def test_paired_differences_are_those_of_the_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5))
    difference = comparison.paired(a, b)
    test = stats.ttest_rel(a, b)
    assert difference.mean == pytest.approx((a - b).mean()) and difference.p == pytest.approx(test.pvalue)
    assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert comparison.paired(a[:1], b[:1]) is None
    assert comparison.paired(a, a) == (0, 0, 0, 1)
    # Differences that are equal up to rounding come from counts of few images, and are no certainty.
    alike = comparison.paired([83.1, 83.3, 83.4], [83.0, 83.2, 83.3])
    assert alike.mean == pytest.approx(0.1) and alike.p == 1
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def answers(queries=60, seed=0, values=10**6):
    """Random uncertainties and hits (2, S, Q) of two methods with three seeds, and groups of queries (Q,)."""
    rng = np.random.default_rng(seed)
    hit = rng.choice([0.0, 1.0, 0.5], (2, 3, queries))
    return rng.integers(0, values, hit.shape), hit, rng.permutation(np.arange(queries) // 4)


@pytest.mark.parametrize("values", [5, 10**6])
@pytest.mark.parametrize("at_once", [2**18, 100])
def test_paired_bootstrap_by_a_loop(monkeypatch, values, at_once):
    """Groups of queries are drawn, the same for both methods; statistics are averaged over seeds draw by draw."""
    for module in ("comparison", "uncertainty"):
        monkeypatch.setattr(f"metrics.{module}.DRAWN", at_once)
    uncertainty, hit, group = answers(values=values)
    draws = comparison.PairedBootstrap(group, draws=50, seed=3)
    statistics = [(draws.mean(h), draws.auroc(u, h)) for u, h in zip(uncertainty, hit, strict=True)]
    rng, rows = np.random.default_rng(3), [np.arange(60)]
    for _ in range(50):
        rows.append(np.concatenate([np.flatnonzero(group == chosen) for chosen in rng.integers(15, size=15)]))
    slow = np.empty((2, 2, 51))
    for method, draw in np.ndindex(2, 51):
        chosen = rows[draw]
        seeds = [(u[chosen], h[chosen]) for u, h in zip(uncertainty[method], hit[method], strict=True)]
        slow[method, 0, draw] = np.mean([h.mean() for _, h in seeds])
        slow[method, 1, draw] = np.mean([auroc(u, h) for u, h in seeds])
    np.testing.assert_allclose(statistics, slow, atol=1e-12)
    for number in range(2):
        difference = comparison.paired_difference(statistics[0][number], statistics[1][number], confidence=0.9)
        first, *others = slow[0, number] - slow[1, number]
        assert difference[:3] == pytest.approx((first, *np.quantile(others, [0.05, 0.95])))
        below, above = sum(x <= 1e-9 for x in others), sum(x >= -1e-9 for x in others)  # zeros count for both
        assert difference.p == pytest.approx(min(1, 2 * (1 + min(below, above)) / 51))


def test_paired_differences_of_known_methods():
    uncertainty, hit, group = answers(400)
    draws = comparison.PairedBootstrap(group)
    mean, area = draws.mean(hit[0]), draws.auroc(uncertainty[0], hit[0])
    for statistic in (mean, area):  # a method and itself
        same = comparison.paired_difference(statistic, statistic.copy())
        assert same == (0, 0, 0, 1) and not same.real
    same = comparison.paired_difference(draws.auroc(uncertainty[0], hit[0]), draws.auroc(2 * uncertainty[0], hit[0]))
    assert same == (0, 0, 0, 1)
    # Better on every query, and ordered ideally.
    better = comparison.paired_difference(draws.mean(np.ones(400)), draws.mean(np.zeros((2, 400))))
    assert better == (1, 1, 1, 2 / 1001) and better.real
    ideal = comparison.paired_difference(draws.auroc(-hit[0], hit[0]), area)
    assert ideal.real and ideal.low > 0.2 and ideal.p == 2 / 1001
    worse = comparison.paired_difference(area, draws.auroc(-hit[0], hit[0]))
    assert worse.real and worse[:3] == pytest.approx((-ideal.mean, -ideal.high, -ideal.low)) and worse.p == ideal.p
    assert comparison.holm([ideal.p, same.p]) == pytest.approx([4 / 1001, 1])
    # Random answers have no real difference, and independent seeds of the draws agree about it.
    for seed in (0, 1):
        draws = comparison.PairedBootstrap(group, seed=seed)
        random = comparison.paired_difference(draws.mean(hit[0]), draws.mean(hit[1]))
        assert not random.real and random.p > 0.05


def test_an_auroc_without_misses_has_no_difference():
    draws, uncertainty = comparison.PairedBootstrap(np.arange(20), draws=200), np.arange(20)
    hits = draws.auroc(uncertainty, np.ones(20))
    assert np.isnan(hits).all() and comparison.paired_difference(hits, hits) is None
    # Draws that lack the one miss are left out.
    one_miss = draws.auroc(uncertainty, uncertainty < 19)
    assert 0 < np.isnan(one_miss).sum() < 200
    assert comparison.paired_difference(one_miss, draws.auroc(-uncertainty, uncertainty < 19))[:3] == (1, 1, 1)


def test_p_values_of_equal_methods_are_uniform():
    """Of 300 pairs of methods that are equally good on average, about 5 % differ at p <= 0.05, in R@1 and in AUROC."""
    rng, real = np.random.default_rng(5), np.zeros(2)
    for seed in range(300):
        uncertainty = rng.random((2, 200))
        hit = (rng.random((2, 200)) < 1 - uncertainty).astype(float)
        draws = comparison.PairedBootstrap(np.arange(200), draws=200, seed=seed)
        differences = (
            comparison.paired_difference(draws.mean(hit[0]), draws.mean(hit[1])),
            comparison.paired_difference(*(draws.auroc(*both) for both in zip(uncertainty, hit, strict=True))),
        )
        real += [difference.p <= 0.05 for difference in differences]
    assert (np.abs(real / 300 - 0.05) < 0.04).all()


DATA = {"cifar": "test", "cifar+shifted": "shifted"}
NLL = {("clip", "model"): 2.0, ("clip", "temperature"): 1.0, ("bayesvlm", "model"): 1.5, ("bayesvlm", "matched"): 1.75}


def write(folder, variant, seed, data, left=()):
    """Write a synthetic classification result and its arrays; their NLL is that of NLL, plus 0.1 for each seed."""
    uncertainty = None if variant == "clip" else -0.5
    result = make_result(variant, seed, 0.6, uncertainty, task="classification", evaluated_on=data, split=DATA[data])
    side, arrays, rng = result["image_to_class"], {}, np.random.default_rng([seed, len(data)])
    one, side["calibration"] = side["calibration"]["model"], {}
    noise = rng.uniform(-0.5, 0.5, 100)
    for (name, entry), value in NLL.items():
        if name == variant and entry not in left:
            nll = value + 0.1 * seed + 0.01 * len(data) + noise * (1 + value)
            arrays |= {f"image_to_class_{entry}_nll": nll, f"image_to_class_{entry}_hit": np.tile([0.0, 1.0], 50)}
            arrays[f"image_to_class_{entry}_confidence"] = np.full(100, 0.5 + value / 10)
            side["calibration"][entry] = one | {"nll": float(nll.mean()), "accuracy": 0.5, "auroc": 0.75, "aurc": 0.125}
    path = save(folder, result)
    np.savez_compressed(path.with_suffix(".npz"), **dict(np.load(path.with_suffix(".npz"))) | arrays)
    return arrays


@pytest.fixture
def compared(tmp_path):
    """Two data sets; clip with one seed, bayesvlm with two; on the second data set clip's temperature is unbounded."""
    kept = {}
    for data in DATA:
        kept["clip", 0, data] = write(tmp_path, "clip", 0, data, ["temperature"] * (data == "cifar+shifted"))
        for seed in range(2):
            kept["bayesvlm", seed, data] = write(tmp_path, "bayesvlm", seed, data)
    return tmp_path, kept


def comparisons_in(folder):
    """The comparisons over data sets among the parts of a report."""
    return [part for part in evaluations.read(folder) if part.task == "comparison"]


def side_by_side(folder):
    [block] = comparisons_in(folder / "shapes")
    return block, {table.name: table for table in block.tables}


def test_data_sets_side_by_side(compared):
    folder, kept = compared
    block, by_name = side_by_side(folder)
    assert block.title == "2 data sets, tiny: comparison" and block.summary == "mean ± s.d. over 1 to 2 seeds"
    names = ["across_accuracy", "across_nll", "across_ece_15", "across_auroc", "across_query", "across_aurc"]
    assert list(by_name) == [*names, "differences_nll", "differences_ece"]
    table = by_name["across_nll"]
    heads = [(column.group, column.title) for column in table.columns]
    assert heads == [("cifar", "test"), ("cifar", "shifted"), ("", "average")]
    rows = rows_of(table)
    assert list(rows) == ["clip", "clip + temperature", "bayesvlm", "bayesvlm + matched temperature"]
    of = {key: arrays["image_to_class_model_nll"].mean() for key, arrays in kept.items()}
    by_seed = [[of["bayesvlm", seed, data] for data in DATA] for seed in range(2)]
    for data, values in zip(DATA, np.transpose(by_seed), strict=True):
        cell = rows["bayesvlm"].cells[f"{data}_nll"]
        assert cell.mean == pytest.approx(values.mean()) and cell.sd == pytest.approx(values.std(ddof=1))
    cell, averages = rows["bayesvlm"].cells["average_nll"], np.mean(by_seed, axis=1)
    assert cell.mean == pytest.approx(averages.mean()) and cell.sd == pytest.approx(averages.std(ddof=1))
    scaled = rows["clip + temperature"].cells
    assert scaled.keys() == {"cifar_nll", "average_nll"} and scaled["cifar_nll"].best
    # If no temperature is bounded, the average takes the unscaled probabilities.
    of_scaled = [kept["clip", 0, "cifar"]["image_to_class_temperature_nll"].mean(), of["clip", 0, "cifar+shifted"]]
    assert scaled["average_nll"].mean == pytest.approx(np.mean(of_scaled)) and scaled["average_nll"].best
    assert not cell.best and rows["bayesvlm"].seeds == 2
    assert "the average takes the probabilities unscaled" in by_name["across_nll"].note
    # Beside the image's own uncertainty, what costs nothing.
    beside = by_name["across_query"]
    assert {"clip, entropy", "clip, top probability", "clip, margin", "bayesvlm"} <= set(rows_of(beside))
    assert all(mean(beside, row, "average_query") is not None for row in rows_of(beside))
    assert mean(by_name["across_accuracy"], "clip", "average_accuracy") == 50
    assert mean(by_name["across_aurc"], "bayesvlm + matched temperature", "average_aurc") == 0.125
    assert [column.key for column in by_name["across_ece_15"].hidden] == ["cifar_ece_20", "cifar+shifted_ece_20"]
    assert "none" in by_name["across_accuracy"].note and "Matched temperature" in by_name["across_accuracy"].note


def test_averages_are_over_seeds_that_have_every_data_set(compared):
    folder, kept = compared
    gone = folder / "shapes/tiny/bayesvlm/seed1/cifar+shifted-classification.json"
    gone.unlink()
    rows = rows_of(side_by_side(folder)[1]["across_nll"])
    first = [kept["bayesvlm", 0, data]["image_to_class_model_nll"].mean() for data in DATA]
    assert rows["bayesvlm"].cells["average_nll"].mean == pytest.approx(np.mean(first))
    assert rows["bayesvlm"].cells["average_nll"].sd is None and rows["bayesvlm"].cells["cifar_nll"].sd > 0
    (gone.parents[1] / "seed0" / gone.name).unlink()
    assert rows_of(side_by_side(folder)[1]["across_nll"])["bayesvlm"].cells.keys() == {"cifar_nll"}


def test_paired_differences_by_a_loop(compared):
    folder, kept = compared
    table = side_by_side(folder)[1]["differences_nll"]
    assert list(rows_of(table)) == [
        "(clip + temperature) less clip", "bayesvlm less clip", "bayesvlm less (clip + temperature)",
        "bayesvlm less its matched temperature",
    ]  # fmt: skip
    assert table.heads == ("comparison", "seeds") and [column.title for column in table.columns] == ["test", "shifted"]
    draws = np.concatenate(list(times_drawn(100, 1000, 0, DRAWN // 100)))
    entries = {"bayesvlm less clip": ("model", "clip", "model")}
    entries["bayesvlm less its matched temperature"] = ("model", "bayesvlm", "matched")
    entries["bayesvlm less (clip + temperature)"] = ("model", "clip", "temperature")
    for name, (entry, base, other) in entries.items():
        for data in DATA:
            cells = rows_of(table)[name].cells
            if base == "clip" and other == "temperature" and data == "cifar+shifted":
                assert f"{data}_nll_gap" not in cells
                continue
            seeds = range(1 if base == "clip" else 2)
            field = "image_to_class_{}_nll".format
            ours = np.mean([kept["bayesvlm", seed, data][field(entry)] for seed in range(2)], axis=0)
            theirs = np.mean([kept[base, seed, data][field(other)] for seed in seeds], axis=0)
            gaps = [np.mean(np.repeat(ours - theirs, count)) for count in draws]
            low, high = np.quantile(gaps, [0.025, 0.975])
            interval = [cells[f"{data}_nll_gap{end}"].mean for end in ("", "_low", "_high")]
            assert interval == pytest.approx([np.mean(ours - theirs), low, high])
            text = f"{interval[0]:+.3f} [{low:+.3f}, {high:+.3f}]" + ("†" if low > 0 or high < 0 else "")
            assert cells[f"{data}_nll_gap"].text == text.replace("-", MINUS)
    # All confidences are equal and half of the queries are hits, so that ECE is the distance of the two.
    cells = rows_of(side_by_side(folder)[1]["differences_ece"])["bayesvlm less clip"].cells
    assert cells["cifar_ece_gap"].mean == pytest.approx(0.15 - 0.2)


def test_what_has_no_baseline_or_one_data_set_is_compared_with_less(tmp_path):
    write(tmp_path, "clip", 0, "cifar", ["temperature"])
    assert comparisons_in(tmp_path / "shapes") == []  # the table of the data set has it all
    write(tmp_path, "bayesvlm", 0, "cifar", ["matched"])
    block, by_name = side_by_side(tmp_path)
    assert block.title == "cifar, tiny: comparison" and list(by_name) == ["differences_nll", "differences_ece"]
    assert list(rows_of(by_name["differences_nll"])) == ["bayesvlm less clip"]
    shutil.rmtree(tmp_path / "shapes/tiny/clip")
    assert comparisons_in(tmp_path / "shapes") == []
    write(tmp_path, "bayesvlm", 0, "cifar+shifted", ["matched"])
    assert "differences_nll" not in side_by_side(tmp_path)[1]
    assert evaluations.compare([]) == []


def test_the_report_has_them_in_every_format(compared, one_figure):
    folder, _ = compared
    report.main(["--dataset", "shapes", "--results", str(folder), "--quiet"])
    written = {
        name: (folder / "shapes" / name).read_text() for name in ("table.md", "table.tex", "table.csv", "report.html")
    }
    assert all("bayesvlm less its matched temperature" in text for text in written.values())
    assert (
        "2 data sets,tiny,comparison,differences_nll,bayesvlm less clip,bayesvlm,2,cifar_nll_gap_low,-"
        in written["table.csv"]
    )


def test_results_that_do_not_fit_are_refused(compared):
    folder, _ = compared
    clip, path, other = (
        folder / f"shapes/tiny/{run}/cifar-classification.json"
        for run in ("clip/seed0", "bayesvlm/seed0", "bayesvlm/seed1")
    )
    values = json.loads(path.read_text())
    one = {"val": "val", "val_fingerprint": "a"}
    path.write_text(json.dumps(values | one))
    evaluations.read(folder / "shapes")  # some with and some without
    clip.write_text(json.dumps(json.loads(clip.read_text()) | one | {"val": "other"}))
    evaluations.read(folder / "shapes")  # rows say which split their temperature is of
    for name, value, what in (("val", "more", "choices of --val"), ("val_fingerprint", "b", "embeddings of --val")):
        other.write_text(json.dumps(json.loads(other.read_text()) | one | {name: value}))
        with pytest.raises(
            UserError, match=rf"seed1/cifar-classification\.json have different {what}, .*: evaluate one"
        ):
            evaluations.read(folder / "shapes")
    path.write_text(json.dumps(values))
    other.write_text(json.dumps(json.loads(other.read_text()) | {"val": None}))
    # Trained anew since one of its data sets was evaluated.
    trained = path.with_stem("cifar+shifted-classification")
    trained.write_text(json.dumps(json.loads(trained.read_text()) | {"checkpoint": "new"}))
    with pytest.raises(UserError, match="are of different weights: evaluate again the one"):
        comparisons_in(folder / "shapes")
    trained.write_text(json.dumps(json.loads(trained.read_text()) | {"checkpoint": "c"}))
    np.savez(path.with_suffix(".npz"), image_to_class_hit=np.ones(100))
    with pytest.raises(UserError, match=r"npz holds no 'image_to_class_matched_nll': delete it and evaluate again\."):
        comparisons_in(folder / "shapes")


def test_rows_of_a_temperature_are_named_by_the_split_it_is_of(tmp_path):
    for data, split in (("cifar", "val"), ("cifar+shifted", "late")):
        write(tmp_path, "clip", 0, data)
        path = tmp_path / f"shapes/tiny/clip/seed0/{data}-classification.json"
        values = json.loads(path.read_text())
        entries = values["image_to_class"]["calibration"]
        entries["validation"] = entries["temperature"] | {"split": split}
        path.write_text(json.dumps(values | {"val": split, "val_fingerprint": split}))
        arrays = dict(np.load(path.with_suffix(".npz")))
        new = {key.replace("temperature", "validation"): value for key, value in arrays.items()}
        np.savez_compressed(path.with_suffix(".npz"), **arrays | new)
        [table] = [
            table for table in evaluations.read(tmp_path / "shapes")[-1].tables if table.name == "classification"
        ]
    rows = [row for row in rows_of(table) if not row.startswith("clip, ")]  # of what costs nothing
    assert rows == ["clip", "clip + temperature", "clip + temperature of late"]
    assert "all of its labeled images" in table.note
    table = side_by_side(tmp_path)[1]["across_nll"]
    assert list(rows_of(table)) == ["clip", "clip + temperature", "clip + temperature of val or late"]
