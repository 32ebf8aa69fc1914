"""Calibration against loops and torchmetrics."""

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torchmetrics.functional import classification

from metrics import calibration, comparison, retrieval, score_tiles, summary

LOGIT = np.random.default_rng(0).standard_normal((200, 7)) * 2
LABEL = np.where(np.random.default_rng(1).random(200) < 0.6, LOGIT.argmax(axis=1), 3)


def forecast(logit, label, scale=1.0):
    return calibration.forecast(lambda rows: torch.tensor(logit[rows]), logit.shape[1], *label, scale)


def single(label):
    return np.arange(len(label)), label


@pytest.mark.parametrize("scale", [0.7, -0.7])
@pytest.mark.parametrize("tile", [2**24, 30])
def test_scores_of_several_positives_by_loop(monkeypatch, tile, scale):
    """A temperature that is free may be negative."""
    monkeypatch.setattr(score_tiles, "TILE", tile)
    rng = np.random.default_rng(2)
    logit, true = rng.integers(-2, 3, (40, 6)).astype(float), rng.random((40, 6)) < 0.3
    true[np.arange(40), rng.integers(0, 6, 40)] = True
    result = forecast(logit, np.nonzero(true), scale)
    for query, (row, positive) in enumerate(zip(logit, true, strict=True)):
        p = special.softmax(scale * row)
        assert result.confidence[query] == pytest.approx(max(p))
        best = [item for item in range(6) if p[item] == max(p)]
        assert result.hit[query] == pytest.approx(np.mean(positive[best]))
        assert result.nll[query] == pytest.approx(-np.log(sum(p[positive])), abs=1e-12)
        brier = (1 - sum(p[positive])) ** 2 + sum(p[~positive] ** 2)
        assert result.brier[query] == pytest.approx(brier, abs=1e-12)
        assert result.entropy[query] == pytest.approx(special.entr(p).sum())


def test_a_gallery_of_one_item_leaves_no_choice():
    result = forecast(np.array([[3.0], [-1.0]]), single([0, 0]))
    assert [field.tolist() for field in result] == [[1, 1], [1, 1], [0, 0], [0, 0], [0, 0]]


def test_scores_of_labels_against_torch():
    result = forecast(LOGIT, single(LABEL), scale=1.3)
    logit, label = torch.tensor(1.3 * LOGIT), torch.tensor(LABEL)
    assert result.nll == pytest.approx(torch.nn.functional.cross_entropy(logit, label, reduction="none").numpy())
    squares = (logit.softmax(dim=1) - torch.nn.functional.one_hot(label, 7)).square().sum(dim=1)
    assert result.brier == pytest.approx(squares.numpy())
    assert (result.hit == (LOGIT.argmax(axis=1) == LABEL)).all()
    # Log probabilities give the same as logits.
    from_logs = forecast(np.log(special.softmax(LOGIT, axis=1)), single(LABEL), scale=1.3)
    assert all(a == pytest.approx(b) for a, b in zip(from_logs, result, strict=True))
    ranking = retrieval.rank(lambda rows: torch.tensor(LOGIT[rows]), 7, *single(LABEL), 1.3)
    assert ranking.probability == pytest.approx(result.confidence)
    assert retrieval.recall_at(ranking, 1) == pytest.approx(result.hit)


def test_a_probability_that_underflows_has_a_finite_logarithm():
    result = forecast(np.array([[0.0, 1e4], [0.0, 1e4]]), single([0, 1]))
    assert result.nll == pytest.approx([1e4, 0]) and result.brier == pytest.approx([2, 0])
    assert (result.hit == [0, 1]).all()
    for wrong in (np.nan, np.inf):
        for function in (calibration.forecast, calibration.fit_scale):
            with pytest.raises(FloatingPointError, match="not finite"):
                function(lambda rows, wrong=wrong: torch.tensor([[0, wrong]])[rows], 2, [0], [0])


@pytest.mark.parametrize("bins", [15, 20])
def test_calibration_error_against_torchmetrics(bins):
    probability = torch.tensor(special.softmax(LOGIT, axis=1))
    for label in (LABEL, LOGIT.argmax(axis=1), LOGIT.argmin(axis=1)):
        judged = forecast(LOGIT, single(label))
        expected = classification.multiclass_calibration_error(probability, torch.tensor(label), 7, bins).item()
        curve = calibration.reliability(judged.confidence, judged.hit, bins)
        # torchmetrics computes in float32.
        assert calibration.calibration_error(curve) == pytest.approx(expected, rel=1e-6)
    # On the edges of bins, too, and with all certain.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).repeat(4)
    hit = torch.tensor(np.random.default_rng(3).integers(0, 2, len(edges)))
    expected = classification.binary_calibration_error(edges, hit, bins).item()
    curve = calibration.reliability(edges.numpy(), hit.numpy(), bins)
    # torchmetrics puts 1 into a separate bin.
    rows = edges.numpy() < 1
    below = calibration.reliability(edges.numpy()[rows], hit.numpy()[rows], bins)
    sure = abs(1 - hit.numpy()[~rows].mean()) * (~rows).sum()
    total = calibration.calibration_error(below) * rows.sum() + sure
    assert total / len(edges) == pytest.approx(expected)
    assert curve.count.sum() == len(edges)


def test_reliability_by_loop():
    result = forecast(LOGIT, single(LABEL))
    curve = calibration.reliability(result.confidence, result.hit, 20)
    inside = [(result.confidence >= n / 20) & (result.confidence < (n + 1) / 20) for n in range(20)]
    inside = [rows for rows in inside if rows.any()]
    assert (curve.count == [rows.sum() for rows in inside]).all()
    assert curve.confidence == pytest.approx([result.confidence[rows].mean() for rows in inside])
    assert curve.accuracy == pytest.approx([result.hit[rows].mean() for rows in inside])


def test_adaptive_error_by_loop_and_in_any_order_of_the_rows():
    rng = np.random.default_rng(4)
    confidence, hit = rng.random(203), rng.integers(0, 2, 203)
    curve = calibration.adaptive_reliability(confidence, hit, 15)
    groups = np.array_split(np.argsort(confidence), 15)
    assert curve.count.tolist() == [len(rows) for rows in groups]
    expected = sum(len(rows) * abs(confidence[rows].mean() - hit[rows].mean()) for rows in groups) / 203
    assert calibration.calibration_error(curve) == pytest.approx(expected)
    tied, rows = np.round(confidence, 1), rng.permutation(203)
    curve = calibration.adaptive_reliability(tied, hit)
    shuffled = calibration.adaptive_reliability(tied[rows], hit[rows])
    assert all(one == pytest.approx(other) for one, other in zip(curve, shuffled, strict=True))
    # If every confidence is the accuracy, no bin has an error.
    curve = calibration.adaptive_reliability(np.full(203, hit.mean()), hit)
    assert calibration.calibration_error(curve) == pytest.approx(0)


def test_errors_at_the_ends():
    sure = np.ones(30)
    for bins in (calibration.reliability, calibration.adaptive_reliability):
        assert calibration.calibration_error(bins(sure, sure)) == 0
        assert calibration.calibration_error(bins(sure, 1 - sure)) == 1
        assert calibration.calibration_error(bins(0 * sure, 1 - sure)) == 0
    assert calibration.reliability(sure + 1e-7, sure).count.tolist() == [30]
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"outside of \[0, 1\]"):
            calibration.reliability([0.5, wrong], [0, 1])
    for bins in (0, 31):
        with pytest.raises(ValueError, match="30 queries cannot be split"):
            calibration.adaptive_reliability(sure, sure, bins)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 50.0])
def test_the_fitted_scale_has_the_least_loss(unit):
    def loss(log_scale):
        return -special.log_softmax(np.exp(log_scale) * LOGIT, axis=1)[np.arange(200), LABEL].mean()

    expected = np.exp(optimize.minimize_scalar(loss).x) / unit
    scale = calibration.fit_scale(lambda rows: torch.tensor(unit * LOGIT[rows]), 7, *single(LABEL))
    assert scale == pytest.approx(expected, rel=2e-3)


def test_the_fitted_scale_is_that_of_the_labels_drawn_and_calibrates():
    rng = np.random.default_rng(5)
    logit = rng.standard_normal((6000, 10))
    label = (special.softmax(2.5 * logit, axis=1).cumsum(axis=1) < rng.random((6000, 1))).sum(axis=1)
    fitted = calibration.halves(np.arange(6000) // 5)
    scale = calibration.fit_scale(lambda rows: torch.tensor(logit[fitted][rows]), 10, *single(label[fitted]))
    assert scale == pytest.approx(2.5, rel=0.05)
    before, after = (forecast(logit[~fitted], single(label[~fitted]), x) for x in (1.0, scale))
    errors = [calibration.calibration_error(calibration.reliability(x.confidence, x.hit)) for x in (before, after)]
    assert errors[1] < 0.03 < 0.2 < errors[0] and after.nll.mean() < before.nll.mean()


def test_no_scale_is_fitted_where_every_answer_is_right():
    def fit(logit, label):
        return calibration.fit_scale(lambda rows: torch.tensor(logit[rows]), logit.shape[1], *single(label))

    right = LOGIT.argmax(axis=1)
    assert fit(LOGIT, right) is None and fit(LOGIT[:1], right[:1]) is None
    assert fit(LOGIT, np.where(np.arange(200) < 20, (right + 1) % 7, right)) > 0  # some mistakes bound it
    assert fit(np.zeros((9, 4)), np.zeros(9, dtype=int)) == 1
    # If all answers are wrong, the lowest confidence is best.
    assert fit(LOGIT, LOGIT.argmin(axis=1)) < 1e-3
    group = np.arange(200)
    judged = summary.judge(lambda rows: torch.tensor(LOGIT[rows]), 7, *single(right), 1.0, group)
    assert list(judged.forecasts) == ["model"]


def test_answers_of_one_group_share_a_confidence():
    rng = np.random.default_rng(31)
    logit, group = rng.standard_normal((50, 9)), np.array([2, 0, 2, 1, 1, 2, 5, 0, 1])
    query, item = np.repeat(np.arange(50), 2), rng.integers(0, 9, 100)
    probability = special.softmax(logit, axis=1)
    for groups in (group, np.arange(9)):
        result = calibration.forecast(lambda rows: torch.tensor(logit[rows]), 9, query, item, 1.0, groups)
        expected = [row[groups == groups[row.argmax()]].sum() for row in probability]
        assert result.confidence == pytest.approx(np.array(expected))
    alone = calibration.forecast(lambda rows: torch.tensor(logit[rows]), 9, query, item)
    assert alone.confidence == pytest.approx(probability.max(axis=1)) and (alone.nll == result.nll).all()


def test_halves_keep_groups_together():
    group = np.random.default_rng(6).integers(0, 41, 300)
    first = calibration.halves(group, seed=2)
    assert len(set(group[first])) == 20 and not set(group[first]) & set(group[~first])
    assert (first == calibration.halves(group, seed=2)).all() and (first != calibration.halves(group, seed=3)).any()
    with pytest.raises(ValueError, match="single group"):
        calibration.halves(np.zeros(5))


def test_a_half_is_judged_by_the_temperature_of_the_other(monkeypatch):
    """A scale fitted on few scores of a half is near that of all scores; the captions of one image stay together."""
    rng = np.random.default_rng(30)
    owner, image = np.arange(600) // 3, rng.standard_normal((200, 8))
    text = image[owner] + rng.standard_normal((600, 8))
    scores, asked = torch.tensor(text @ image.T), []

    def score(rows):
        asked.append(rows)
        return scores[rows]

    def figures(group=owner):
        forecasts = summary.judge(score, 200, np.arange(600), owner, 1.0, group).forecasts
        return {name: summary.of_forecast(*forecast) for name, forecast in forecasts.items()}

    every = figures()
    monkeypatch.setattr(summary, "FIT_SCORES", 200 * 150)
    asked.clear()
    few = figures()
    fitted = [rows for rows in asked if len(np.arange(600)[rows]) == 150]
    assert len(fitted) == 2 and not set(owner[fitted[0]]) & set(owner[fitted[1]])
    assert few["temperature"]["scales"] == pytest.approx(every["temperature"]["scales"], rel=0.15)
    assert few["temperature"]["scales"] != every["temperature"]["scales"]
    assert few["temperature"]["nll"] < few["model"]["nll"] and few["model"] == every["model"]
    assert few["temperature"]["ece_15"] < 0.6 * few["model"]["ece_15"]
    assert list(figures(np.zeros(600))) == ["model"]


@pytest.mark.parametrize("tile", [2**22, 100])
def test_one_pass_gives_what_ranking_and_forecasting_give_apart(monkeypatch, tile):
    """Of corrected scores and of those before the correction, with a temperature for each half of the queries."""
    monkeypatch.setattr(score_tiles, "TILE", tile)
    rng = np.random.default_rng(32)
    owner, group_of_item = np.arange(90) // 3, np.arange(30) // 2
    scores, constants = torch.tensor(rng.standard_normal((90, 30))), torch.tensor(rng.standard_normal(30))
    members, targets = calibration.members_of(group_of_item), (30, np.arange(90), owner)
    scores[np.arange(90), owner] += 1.5
    judged = summary.judge(scores.__getitem__, *targets, 2.0, owner, members, (constants, 3.0))
    corrected = scores - constants
    fitted, first = judged.forecasts["temperature"][1], calibration.halves(owner)
    scales = torch.tensor(np.where(first, fitted[1], fitted[0]))

    def same(one, other):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))

    same(judged.ranking, retrieval.rank(corrected.__getitem__, *targets, 2.0))
    same(judged.uncorrected[0], retrieval.rank(scores.__getitem__, *targets, 3.0))
    for forecast, (matrix, scale) in (
        (judged.forecasts["model"][0], (corrected, 2.0)),
        (judged.forecasts["temperature"][0], (corrected, scales)),
        (judged.uncorrected[1], (scores, 3.0)),
    ):
        same(forecast, calibration.forecast(matrix.__getitem__, *targets, scale, group_of_item))
    by_half = calibration.forecast((corrected * scales[:, None]).__getitem__, *targets, 1.0, group_of_item)
    np.testing.assert_allclose(judged.forecasts["temperature"][0], by_half, rtol=1e-12)
    assert fitted[0] != fitted[1]
    plain = summary.judge(scores.__getitem__, *targets, 3.0, owner, members)
    same(plain.ranking, judged.uncorrected[0])
    same(plain.uncorrected[1], judged.uncorrected[1])


def falling(values, counts):
    """The nearest falling sequence, by pooling neighbors that rise, one pair at a time."""
    blocks = [[[value], [count]] for value, count in zip(values, counts, strict=True)]
    while True:
        means = [np.average(*block[:1], weights=block[1]) for block in blocks]
        rises = [i for i in range(len(blocks) - 1) if means[i + 1] > means[i] - 1e-12]
        if not rises:
            return [(mean, sum(block[1])) for mean, block in zip(means, blocks, strict=True) for _ in block[0]]
        following = blocks.pop(rises[0] + 1)
        blocks[rises[0]] = [blocks[rises[0]][0] + following[0], blocks[rises[0]][1] + following[1]]


def test_the_chance_of_a_hit_is_a_falling_function_of_the_other_half():
    """Against pooling by hand: each step with two more queries at the mean of all, then falling again; with ties."""
    rng = np.random.default_rng(3)
    uncertainty, group = rng.normal(size=80).round(1), np.arange(80) // 2
    hit = (rng.random(80) < 1 / (1 + np.exp(2 * uncertainty))).astype(float)
    chance = calibration.chance_of_hit(uncertainty, hit, group)
    first = calibration.halves(group)
    for half in (first, ~first):
        values = np.unique(uncertainty[half])
        hits = [hit[half & (uncertainty == value)] for value in values]
        counts, base = [len(part) for part in hits], hit[half].mean()
        steps = falling([part.mean() for part in hits], counts)
        shrunk = falling([(mean * count + 2 * base) / (count + 2) for mean, count in steps], counts)
        expected = np.interp(uncertainty[~half], values, [mean for mean, _ in shrunk])
        np.testing.assert_allclose(chance[~half], expected, atol=1e-9)
    scores = calibration.scores_of_chance(chance, hit)
    assert scores["brier_score"] == pytest.approx(np.mean([(c - h) ** 2 for c, h in zip(chance, hit, strict=True)]))
    assert scores["log_score"] == pytest.approx(np.mean([-np.log(c if h else 1 - c) for c, h in zip(chance, hit)]))
    assert calibration.chance_of_hit(uncertainty, hit, np.zeros(80)) is None
    # An uncertainty without a signal is hardly worse than the constant, whether its values tie or not.
    hit = (rng.random(400) < 0.7).astype(float)
    constant = calibration.scores_of_chance(np.full(400, hit.mean()), hit)["log_score"]
    for values in (rng.integers(5, size=400), rng.random(400)):
        score = calibration.scores_of_chance(calibration.chance_of_hit(values, hit, np.arange(400)), hit)["log_score"]
        assert constant - 0.01 < score < constant + 0.05


def test_the_interval_of_an_ece_covers_the_truth():
    """True ECE 0.1, 300 queries: the basic interval holds it in most redrawn samples, that of percentiles seldom."""
    rng, covered = np.random.default_rng(6), []
    for _ in range(60):
        confidence = rng.beta(2, 2, 300)
        truth = 0.1
        hit = (rng.random(300) < np.clip(confidence - truth, 0, 1)).astype(float)
        statistic = comparison.PairedBootstrap(np.arange(300), draws=200).calibration_error(confidence, hit)
        low, high = comparison.interval(statistic, basic=True)
        covered.append(low <= truth <= high)
    assert np.mean(covered) > 0.75


def test_the_expected_error_is_that_of_redrawn_outcomes():
    confidence = np.random.default_rng(4).beta(2, 2, 200)
    mean, limit = calibration.expected_error(confidence, draws=2000)
    rng, errors = np.random.default_rng(5), []
    for _ in range(2000):
        hit = (rng.random(200) < confidence).astype(float)
        errors.append(calibration.calibration_error(calibration.reliability(confidence, hit)))
    assert mean == pytest.approx(np.mean(errors), rel=0.02) and limit == pytest.approx(
        np.quantile(errors, 0.95), rel=0.03
    )
    assert 0.05 < mean < 0.12  # as large as many that are measured
