"""Metrics against loops, simulation and scipy."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from torchmetrics.functional import classification
from torchmetrics.functional.retrieval import retrieval_r_precision

from metrics import retrieval, score_tiles
from metrics.comparison import PairedBootstrap
from metrics.uncertainty import (
    aupr,
    auroc,
    auroc_of_draws,
    bootstrap,
    depth_correlation,
    falling_chains,
    false_positive_rates,
    kendall,
    label_entropy,
    level_means,
    levels,
    regret,
    risk_coverage,
    selective,
    spearman,
    trend,
)


def ranked(scores, positives, k):
    """Chance of a hit in the top k by brute force: every order of tied items is tried at random."""
    rng = np.random.default_rng(0)
    hits = np.zeros(len(scores))
    draws = 4000
    for query, row in enumerate(scores):
        for _ in range(draws):
            order = np.lexsort([rng.random(len(row)), -row])[:k]
            hits[query] += bool(set(order) & set(positives[query]))
    return hits / draws


@pytest.mark.parametrize("tile", [2**24, 7])
def test_recall_is_that_of_random_order_among_ties(monkeypatch, tile):
    monkeypatch.setattr(score_tiles, "TILE", tile)  # blocks of one query and of all
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (6, 9)).astype(float)
    positives = [[0], [1, 2], [3, 4, 5], [8], [0, 8], [7]]
    pairs = [(query, item) for query, items in enumerate(positives) for item in items]
    rng.shuffle(pairs)
    query, item = np.array(pairs).T
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 9, query, item)
    for k in (1, 2, 5):
        assert retrieval.recall_at(ranking, k) == pytest.approx(ranked(scores, positives, k), abs=0.035)
    assert (ranking.score == scores.max(axis=1)).all()
    assert (scores[np.arange(6), ranking.top] == ranking.score).all()


@pytest.mark.parametrize("gallery", [2, 128, 129, 192, 1000])
def test_the_two_highest_are_those_of_a_sort(gallery):
    """Blocks of 64 and a rest, ties within and between them, and NaN, which no result may hide."""
    generator = torch.Generator().manual_seed(gallery)
    for scores in (torch.randn(50, gallery, generator=generator), torch.randint(3, (50, gallery)).float()):
        value, item = score_tiles.two_highest(scores)
        assert torch.equal(value, scores.sort(dim=1, descending=True).values[:, :2])
        assert torch.equal(scores.gather(1, item), value) and (item[:, 0] != item[:, 1]).all()
    scores[7, gallery // 2] = torch.nan
    assert score_tiles.two_highest(scores)[0][7].isnan().any()


def test_recall_without_ties_is_exact():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((40, 30))
    item = rng.integers(0, 30, 40)
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 30, np.arange(40), item)
    for k in (1, 5, 10):
        expected = [item[i] in np.argsort(-scores[i])[:k] for i in range(40)]
        assert (retrieval.recall_at(ranking, k) == expected).all()


@pytest.mark.parametrize("tile", [2**24, 7])
def test_first_rank_is_the_mean_over_random_orders_of_ties(monkeypatch, tile):
    monkeypatch.setattr(score_tiles, "TILE", tile)
    rng = np.random.default_rng(11)
    scores = rng.integers(0, 3, (8, 9)).astype(float)
    true = rng.random((8, 9)) < 0.3
    true[np.arange(8), rng.integers(0, 9, 8)] = True
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 9, *np.nonzero(true))
    ranks = []
    for row, positive in zip(scores, true, strict=True):
        orders = [np.lexsort([rng.random(9), -row]) for _ in range(4000)]
        ranks.append(np.mean([np.flatnonzero(positive[order])[0] + 1 for order in orders]))
    assert retrieval.first_rank(ranking) == pytest.approx(ranks, abs=0.15)
    recalls = [retrieval.recall_at(ranking, k).mean() for k in (1, 5, 10)]
    assert retrieval.rsum(ranking, ranking) == pytest.approx(200 * sum(recalls))
    # Without ties it is the place in the sorted row.
    scores = rng.standard_normal((8, 9))
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 9, *np.nonzero(true))
    sorted_true = np.take_along_axis(true, np.argsort(-scores, axis=1), axis=1)
    places = [min(np.flatnonzero(row)) + 1 for row in sorted_true]
    assert (retrieval.first_rank(ranking) == places).all()


@pytest.mark.parametrize("tile", [2**24, 30])
@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_lists_of_the_best_are_those_of_a_stable_sort(monkeypatch, tile, values):
    monkeypatch.setattr(score_tiles, "TILE", tile)
    scores = np.random.default_rng(12).integers(0, values, (20, 17)).astype(np.float64)
    for k in (1, 4, 17):
        listed = retrieval.top(lambda rows: torch.tensor(scores[rows]), 20, 17, k)
        assert (listed == np.argsort(-scores, axis=1, kind="stable")[:, :k]).all()
    for k in (0, 18):
        with pytest.raises(ValueError, match="cannot be listed"):
            retrieval.top(lambda rows: torch.tensor(scores[rows]), 20, 17, k)
    scores[3, 5] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        retrieval.top(lambda rows: torch.tensor(scores[rows]), 20, 17, 2)


def average_precision_at_r(order, positive):
    """mAP@R of one ranked list by a loop."""
    hits, total = 0, 0.0
    for place, item in enumerate(order[: positive.sum()], 1):
        hits += positive[item]
        total += positive[item] * hits / place
    return total / positive.sum()


def test_quality_of_the_r_best_by_loop_and_torchmetrics():
    rng = np.random.default_rng(13)
    scores, true = rng.standard_normal((30, 40)), rng.random((30, 40)) < rng.random((30, 1))
    true[:, 0] = True
    true[0] = True  # everything is right
    true[1] = np.arange(40) == scores[1].argmax()
    precision = retrieval.at_r(lambda rows: torch.tensor(scores[rows]), sparse.csr_array(true))
    for query, row in enumerate(scores):
        expected = average_precision_at_r(np.argsort(-row), true[query])
        assert precision.mean_average_precision[query] == pytest.approx(expected, rel=1e-12)
        expected = retrieval_r_precision(torch.tensor(row), torch.tensor(true[query])).item()
        assert precision.r_precision[query] == pytest.approx(expected, rel=1e-6)
    assert precision.r_precision[:2] == pytest.approx(1) and precision.mean_average_precision[:2] == pytest.approx(1)


@pytest.mark.parametrize("tile", [2**24, 30])
def test_quality_of_the_r_best_is_that_of_random_order_among_ties(monkeypatch, tile):
    """Every order of the few tied items is tried."""
    monkeypatch.setattr(score_tiles, "TILE", tile)
    rng = np.random.default_rng(14)
    scores = rng.integers(0, 3, (12, 6)).astype(float)
    scores[0] = 0
    true = rng.random((12, 6)) < 0.5
    true[:, 2] = True
    precision = retrieval.at_r(lambda rows: torch.tensor(scores[rows]), sparse.csc_array(true))
    for query, row in enumerate(scores):
        orders = [order for order in map(list, itertools.permutations(range(6))) if (np.diff(row[order]) <= 0).all()]
        expected = np.mean([average_precision_at_r(order, true[query]) for order in orders])
        assert precision.mean_average_precision[query] == pytest.approx(expected, rel=1e-12)
        expected = np.mean([true[query][order[: true[query].sum()]].mean() for order in orders])
        assert precision.r_precision[query] == pytest.approx(expected, rel=1e-12)


def test_a_query_without_a_positive_has_no_precision():
    with pytest.raises(ValueError, match="no positive"):
        retrieval.at_r(lambda rows: torch.zeros(2, 3)[rows], sparse.csr_array([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(FloatingPointError, match="not finite"):
        retrieval.at_r(lambda rows: torch.full((1, 3), torch.nan)[rows], sparse.csr_array([[1, 0, 0]]))


def test_recall_in_folds_by_loop():
    rng = np.random.default_rng(15)
    owner = np.sort(np.append(np.arange(23), rng.integers(0, 23, 40)))
    scores = rng.standard_normal((23, 63)) + 2 * (owner == np.arange(23)[:, None])
    t2i, i2t = retrieval.fold_recalls(lambda i, t: torch.tensor(scores[np.ix_(i, t)]), owner, ks=(1, 3), count=5)
    for k in (1, 3):
        expected = [], []
        for images in np.array_split(np.arange(23), 5):
            texts = np.flatnonzero(np.isin(owner, images))
            part = scores[np.ix_(images, texts)]
            expected[0].append(np.mean([owner[t] in images[np.argsort(-part[:, j])[:k]] for j, t in enumerate(texts)]))
            owners = [owner[texts[np.argsort(-row)[:k]]] for row in part]
            expected[1].append(np.mean([image in best for image, best in zip(images, owners, strict=True)]))
        assert (t2i[k], i2t[k]) == pytest.approx(tuple(map(np.mean, expected)))
    with pytest.raises(ValueError, match="too few for 12 folds"):
        retrieval.fold_recalls(None, owner, count=12)


def test_constant_score_has_the_recall_of_a_guess():
    ranking = retrieval.rank(lambda rows: torch.zeros(len(range(50)[rows]), 20), 20, np.arange(50), np.arange(50) % 20)
    assert retrieval.recall_at(ranking, 5) == pytest.approx(np.full(50, 5 / 20))
    everything = retrieval.recall_at(ranking, 20)
    assert everything == pytest.approx(np.ones(50))


def test_gallery_aware_confidences_by_loop():
    rng = np.random.default_rng(5)
    scores = rng.standard_normal((7, 9))
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 9, np.arange(7), np.arange(7), scale=3.0)
    fields = ranking.score, ranking.margin, ranking.entropy, ranking.probability
    for row, *confidences in zip(scores, *fields, strict=True):
        second, first = np.sort(row)[-2:]
        posterior = np.exp(3 * row) / np.exp(3 * row).sum()
        expected = first, first - second, stats.entropy(posterior), posterior.max()
        assert confidences == pytest.approx(expected)
    with pytest.raises(ValueError, match="gallery of 1"):
        retrieval.rank(lambda rows: torch.zeros(1, 1), 1, [0], [0])


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(6)
    uncertainty = rng.integers(0, 6, 40).astype(float)
    hit = rng.choice([0.0, 1.0, 0.25], 40)
    right = total = 0.0
    for i, j in itertools.product(range(40), repeat=2):
        weight = (1 - hit[i]) * hit[j] * (i != j) + (i == j) * hit[i] * (1 - hit[i])
        total += weight
        right += weight * ((uncertainty[i] > uncertainty[j]) + (uncertainty[i] == uncertainty[j]) / 2)
    assert auroc(uncertainty, hit) == pytest.approx(right / total)
    sure = rng.integers(0, 2, 40)
    u = stats.mannwhitneyu(uncertainty[sure == 0], uncertainty[sure == 1]).statistic
    assert auroc(uncertainty, sure) == pytest.approx(u / (sure.sum() * (1 - sure).sum()))
    assert auroc(sure == 0, sure) == 1 and auroc(sure, sure) == 0
    assert auroc(np.ones(40), sure) == 0.5
    assert auroc(uncertainty, np.ones(40)) is None


@pytest.mark.parametrize("values", [4, 10**6])
def test_auroc_of_draws_by_loop(values):
    rng = np.random.default_rng(24)
    uncertainty, hit = rng.integers(0, values, 30), rng.choice([0.0, 1.0, 0.25], 30)
    times = rng.integers(0, 3, (20, 30))
    times[0] = hit == 1  # no misses
    aurocs = auroc_of_draws(uncertainty, hit, times)
    assert np.isnan(aurocs[0])
    for row, area in zip(times[1:], aurocs[1:], strict=True):
        rows = np.repeat(np.arange(30), row)
        assert area == pytest.approx(auroc(uncertainty[rows], hit[rows]))


def test_precision_and_recall_against_torchmetrics():
    rng = np.random.default_rng(16)
    for values in (4, 10**6):
        uncertainty, hit = rng.integers(0, values, 60).astype(float), rng.integers(0, 2, 60)
        # torchmetrics takes scores outside of [0, 1] for logits.
        expected = classification.binary_average_precision(
            torch.tensor(1 - uncertainty / values), torch.tensor(hit)
        ).item()
        assert aupr(uncertainty, hit) == pytest.approx(expected, rel=1e-6)
    assert aupr(1 - hit, hit) == 1 and aupr(uncertainty, np.ones(60)) == 1
    assert aupr(np.ones(60), hit) == pytest.approx(hit.mean())
    assert aupr(uncertainty, np.zeros(60)) is None


def test_risk_and_coverage_by_trying_orders_of_ties():
    rng = np.random.default_rng(17)
    uncertainty, hit = rng.integers(0, 5, 40).astype(float), rng.choice([0.0, 1.0, 0.25], 40)
    curves = []
    for _ in range(4000):
        order = np.lexsort([rng.random(40), uncertainty])
        curves.append([1 - np.mean(hit[order[: n + 1]]) for n in range(40)])
    curve = np.mean(curves, axis=0)
    assert risk_coverage(uncertainty, hit) == pytest.approx(curve, abs=0.02)
    rows = rng.permutation(40)  # the order of the rows is of no consequence
    assert risk_coverage(uncertainty[rows], hit[rows]) == pytest.approx(risk_coverage(uncertainty, hit))
    area = selective(uncertainty, hit)
    best = np.sort(1 - hit)
    best = np.mean([best[: n + 1].mean() for n in range(40)])
    curve = risk_coverage(uncertainty, hit)
    assert area.aurc == pytest.approx(np.mean(curve)) and area.e_aurc == pytest.approx(np.mean(curve) - best)
    assert area.recall == pytest.approx({"80": 1 - curve[31], "90": 1 - curve[35], "95": 1 - curve[37]})


def test_risk_and_coverage_at_the_ends():
    hit = np.repeat([1.0, 0.0], [700, 300])
    oracle = selective(1 - hit, hit)
    assert oracle.e_aurc == 0 and oracle.recall["80"] == pytest.approx(700 / 800)
    # The approximation of Geifman et al. for many queries.
    assert oracle.aurc == pytest.approx(0.3 + 0.7 * np.log(0.7), abs=1e-3)
    assert selective(np.zeros(1000), hit).aurc == pytest.approx(0.3)
    assert selective(hit, hit).e_aurc > selective(np.zeros(1000), hit).e_aurc > 0
    uncertainty = np.random.default_rng(18).random(1000)
    assert selective(uncertainty, np.ones(1000))[:2] == (0, 0)
    assert selective(uncertainty, np.zeros(1000))[:2] == (1, 0)
    assert selective([0.5], [1])[2] == {"80": 1, "90": 1, "95": 1}
    limit = 1 / np.arange(1, 1001)
    assert selective(-limit, limit).e_aurc == pytest.approx(0)
    assert regret(hit, limit) == pytest.approx(limit.mean() - 0.7)


def test_a_score_that_is_not_finite_is_refused():
    for wrong in (torch.nan, torch.inf):
        scores = torch.zeros(3, 4)
        scores[1, 2] = wrong
        with pytest.raises(FloatingPointError, match="not finite"):
            retrieval.rank(lambda rows, scores=scores: scores[rows], 4, np.arange(3), np.arange(3))


def test_bayes_optimal_limits_by_loop():
    rng = np.random.default_rng(3)
    true = rng.random((8, 12)) < 0.4
    true[rng.integers(0, 8, 12), np.arange(12)] = True
    true[:, 0] = True
    limits = retrieval.bayes_optimal_text_to_image(sparse.csr_array(true))
    assert limits == pytest.approx([1 / sum(true[:, j]) for j in range(12)])
    assert retrieval.ambiguity(sparse.csc_array(true)) == pytest.approx(np.log(true.sum(axis=0)))


def test_bayes_optimal_image_to_text_by_enumeration():
    """The sum over every choice of an image's own captions among those true of it, weighted by its odds."""
    rng = np.random.default_rng(7)
    true = rng.random((8, 14)) < 0.6
    captions = rng.integers(1, 4, 8)
    others = true.sum(axis=0) - 1
    limits = []
    for i in range(8):
        fits = sorted((others[j] for j in range(14) if true[i, j]), key=float)
        chosen = list(itertools.combinations(range(len(fits)), captions[i]))
        weights = [np.prod([1 / fits[j] for j in choice]) if fits[0] else 0 for choice in chosen]
        best = sum(weight for choice, weight in zip(chosen, weights, strict=True) if 0 in choice)
        limits.append(best / sum(weights) if fits[0] else 1)
    assert retrieval.bayes_optimal_image_to_text(sparse.csr_array(true), captions) == pytest.approx(limits)


@pytest.mark.parametrize(("queries", "count"), [(100, 10), (1003, 10), (25014, 10), (7, 7), (7, 2)])
def test_levels_use_every_query_once(queries, count):
    uncertainty = np.random.default_rng(4).integers(0, 5, queries)  # many ties
    groups = levels(uncertainty, count)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1 and sorted(np.concatenate(groups)) == list(range(queries))
    order = np.concatenate(groups)
    assert (np.diff(uncertainty[order]) >= 0).all()
    assert all(a < b for a, b in itertools.pairwise(order) if uncertainty[a] == uncertainty[b])


def test_the_reference_suites_levels_leave_out_the_most_uncertain():
    """Each level has n // levels queries, the least uncertain first; an image's level is its retrieved caption's."""
    rng = np.random.default_rng(19)
    uncertainty, top, hit = rng.random(800), rng.integers(0, 800, 103), rng.integers(0, 2, 103)
    order, size = np.argsort(uncertainty[top]), 103 // 10
    expected = [np.mean([hit[order[size * level + n]] for n in range(size)]) for level in range(10)]
    groups = levels(uncertainty[top], 10, drop_remainder=True)
    assert [hit[rows].mean() for rows in groups] == pytest.approx(expected)
    assert set(range(103)) - set(np.concatenate(groups)) == set(order[100:])
    every = [hit[rows].mean() for rows in levels(uncertainty[top], 10)]
    assert [len(rows) for rows in levels(uncertainty[top], 10)] == [11] * 3 + [10] * 7 and every != expected


def test_levels_have_no_order_of_their_own_where_queries_tie():
    """Means in expectation over the order of ties, whatever the order of the rows: as of 4,000 random ones."""
    rng = np.random.default_rng(22)
    uncertainty, hit = rng.integers(0, 4, 53), rng.integers(0, 2, 53).astype(float)
    means = level_means(uncertainty, hit, 7)
    shuffled, sampled = rng.permutation(53), np.zeros(7)
    assert level_means(uncertainty[shuffled], hit[shuffled], 7) == pytest.approx(means)
    for _ in range(4000):
        order = np.lexsort([rng.random(53), uncertainty])
        sampled += [hit[rows].mean() / 4000 for rows in np.array_split(order, 7)]
    assert sampled == pytest.approx(means, abs=0.02)
    assert level_means(np.arange(53), hit, 7) == pytest.approx([x.mean() for x in np.array_split(hit, 7)])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("at_once", [2**18, 100])
def test_bootstrap_by_loop(monkeypatch, drop, at_once, grouped):
    """The same draws, each split into levels and judged by the functions for one."""
    monkeypatch.setattr("metrics.uncertainty.DRAWN", at_once)
    rng = np.random.default_rng(20)
    uncertainty, hit = rng.integers(0, 9, 57).astype(float), rng.choice([0.0, 1.0, 0.5], 57)
    group = rng.permutation(np.arange(57) // 4) if grouped else np.arange(57)
    intervals = bootstrap(uncertainty, hit, 5, group if grouped else None, draws=200, seed=3, drop_remainder=drop)
    draws, expected, count = np.random.default_rng(3), [], group.max() + 1
    group = group if grouped else np.argsort(np.argsort(uncertainty, kind="stable"), kind="stable")  # by rank, then
    for _ in range(200):
        rows = np.concatenate([np.flatnonzero(group == chosen) for chosen in draws.integers(count, size=count)])
        recalls = level_means(uncertainty[rows], hit[rows], 5, drop)
        expected.append([*trend(recalls), auroc(uncertainty[rows], hit[rows]), *recalls])
    expected = np.quantile(expected, [0.025, 0.975], axis=0).T
    assert intervals.pop("level_recall") == [pytest.approx(interval) for interval in expected[5:]]
    assert list(intervals) == ["s", "r2", "minus_s_r2", "spread", "auroc"]
    assert list(intervals.values()) == [pytest.approx(interval) for interval in expected[:5]]
    # Draws that are known already.
    shared = PairedBootstrap(group, draws=200, seed=3).times[1:]
    assert bootstrap(uncertainty, hit, 5, group, shared) == bootstrap(uncertainty, hit, 5, group, draws=200, seed=3)


def test_captions_of_one_image_are_drawn_together():
    """If five queries share their luck, intervals by group are as wide as the spread of AUROC over new worlds."""
    group, aurocs, rng = np.arange(500) // 5, [], np.random.default_rng(23)

    def world():
        luck = rng.random(100)[group]
        return luck + 0.1 * rng.random(500), (rng.random(100)[group] > luck).astype(float)

    for uncertainty, hit in (world() for _ in range(200)):
        aurocs.append(auroc(uncertainty, hit))
    wide, narrow = (bootstrap(*world(), 4, by)["auroc"] for by in (group, None))
    spread = 3.92 * np.std(aurocs)
    assert np.diff(wide) == pytest.approx(spread, rel=0.35) and np.diff(narrow) < 0.65 * spread


def test_bootstrap_covers_what_it_should():
    """Of 200 samples about 95 % of the intervals hold the true spread and AUROC."""
    rng = np.random.default_rng(21)
    covered = np.zeros(2)
    for seed in range(200):
        uncertainty = rng.random(400)
        interval = bootstrap(uncertainty, rng.random(400) < 1 - uncertainty, 4, draws=200, seed=seed)
        # Right by chance of 1 - u: levels from 7/8 to 1/8; misses have density 2u, hits 2 - 2u, so that AUROC is 5/6.
        for number, (name, true) in enumerate({"spread": 0.75, "auroc": 5 / 6}.items()):
            low, high = interval[name]
            covered[number] += low <= true <= high
    assert (np.abs(covered / 200 - 0.95) < 0.04).all()


def test_bootstrap_of_the_same_answers_only():
    uncertainty = np.arange(20)
    for hit in (np.ones(20), np.zeros(20)):
        interval = bootstrap(uncertainty, hit, 4, draws=50)
        assert interval["auroc"] is None and interval["s"] == interval["r2"] == interval["spread"] == [0, 0]
    # Some draws lack the one miss; the interval of AUROC is that of the others.
    assert bootstrap(uncertainty, uncertainty < 19, 4, draws=50)["auroc"] == [1, 1]
    assert bootstrap(uncertainty, uncertainty % 2, 4) == bootstrap(uncertainty, uncertainty % 2, 4)
    with pytest.raises(ValueError, match="20 queries cannot be split"):
        bootstrap(uncertainty, hit, 21)


def test_rank_correlations_and_label_entropy_against_scipy():
    rng = np.random.default_rng(22)
    a, b = rng.integers(0, 9, 50), rng.integers(0, 4, 50)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    pairs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in itertools.combinations(range(50), 2)]
    x, y = np.array(pairs).T
    assert kendall(a, b) == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))
    assert kendall(a, np.ones(50)) == spearman(a, np.ones(50)) == 0
    shares = rng.random((6, 4)) * (rng.random((6, 4)) < 0.7) + np.eye(4)[rng.integers(0, 4, 6)]
    for row, entropy in zip(shares, label_entropy(shares), strict=True):
        assert entropy == pytest.approx(-sum(p * np.log(p) for p in row / row.sum() if p))


@pytest.mark.parametrize("count", [1, 0, -3, 11])
def test_levels_refuse_what_cannot_be_split(count):
    with pytest.raises(ValueError, match="10 queries cannot be split"):
        levels(np.arange(10), count)


def test_trend_against_scipy():
    recalls = np.random.default_rng(5).random(10)
    result = trend(recalls)
    fit = stats.linregress(np.arange(10), recalls)
    assert result.s == pytest.approx(stats.spearmanr(np.arange(10), recalls).statistic)
    assert result.r2 == pytest.approx(fit.rvalue**2)
    assert result.minus_s_r2 == pytest.approx(-result.s * fit.rvalue**2)
    assert result.spread == pytest.approx(recalls[0] - recalls[-1])
    assert trend([0.9, 0.7, 0.5, 0.3]) == pytest.approx((-1, 1, 1, 0.6))
    assert trend([0.4] * 5) == (None, None, None, 0)
    tied = trend([0.5, 0.5, 0.25, 0.75])
    assert tied.s == pytest.approx(stats.spearmanr(np.arange(4), [0.5, 0.5, 0.25, 0.75]).statistic)


def test_falling_chains_by_loop():
    rng = np.random.default_rng(6)
    chain, depth = np.repeat(np.arange(20), 4), np.tile(np.arange(4), 20)
    uncertainty = np.round(rng.random(80) - 0.4 * depth, 1)  # some steps tie, and a tie does not fall
    rows = rng.permutation(80)
    whole, steps = falling_chains(uncertainty[rows], chain[rows], depth[rows])
    falls = [[uncertainty[4 * c + d + 1] < uncertainty[4 * c + d] for d in range(3)] for c in range(20)]
    assert whole == pytest.approx(np.mean([all(f) for f in falls]))
    assert steps == pytest.approx(np.mean(falls))


def test_correlation_with_depth_by_loop():
    rng = np.random.default_rng(23)
    chain = np.repeat(np.arange(20), rng.integers(2, 6, 20))
    depth = np.concatenate([np.arange(n) for n in np.bincount(chain)])
    uncertainty = np.round(rng.random(len(chain)) - 0.3 * depth, 1)
    rows = rng.permutation(len(chain))
    correlation = depth_correlation(uncertainty[rows], chain[rows], depth[rows])
    parts = [(uncertainty[chain == c], depth[chain == c]) for c in range(20)]
    expected = [stats.spearmanr(*part).statistic if np.ptp(part[0]) else 0 for part in parts]
    assert correlation.within == pytest.approx(np.mean(expected))
    assert correlation.pooled == pytest.approx(stats.spearmanr(uncertainty, depth).statistic)
    assert depth_correlation(-depth, chain, depth) == pytest.approx((-1, -1))
    with pytest.raises(ValueError, match="only one prompt"):
        depth_correlation([1, 2, 3], [0, 0, 1], [0, 1, 0])


def test_more_measures_by_loops():
    """AUGRC, coverage at a risk, FPR95 and the chance of a hit, in loops over thresholds, with ties."""
    rng = np.random.default_rng(0)
    for ties in (False, True):
        uncertainty = rng.normal(size=120)
        uncertainty = uncertainty.round(1) if ties else uncertainty
        hit = (rng.random(120) < 1 / (1 + np.exp(2 * uncertainty - 1))).astype(float)
        area = selective(uncertainty, hit, risks=[5, 20])
        risks, orders = np.zeros(120), 400
        for _ in range(orders if ties else 1):
            order = np.lexsort([rng.random(120), uncertainty])
            risks += np.cumsum(1 - hit[order]) / (orders if ties else 1)
        counts = np.arange(1, 121)
        assert area.augrc == pytest.approx(np.mean(risks / 120), abs=2e-3 if ties else 1e-12)
        if not ties:
            for risk in (5, 20):
                allowed = [count for count in counts if risks[count - 1] / count <= risk / 100]
                assert area.coverage[str(risk)] == max(allowed, default=0) / 120
        right, wrong = false_positive_rates(uncertainty, hit)
        let_through = [
            (uncertainty <= t)[hit == 0].mean()
            for t in np.unique(uncertainty)
            if (uncertainty <= t)[hit == 1].mean() >= 0.95
        ]
        held_back = [
            (uncertainty >= t)[hit == 1].mean()
            for t in np.unique(uncertainty)
            if (uncertainty >= t)[hit == 0].mean() >= 0.95
        ]
        assert (right, wrong) == (pytest.approx(min(let_through)), pytest.approx(min(held_back)))
    assert false_positive_rates([1, 2], [1, 1]) == (None, None)


def test_false_positive_rates_by_a_foreign_library():
    """torchmetrics' specificity at a sensitivity, with right answers and with errors as positives."""
    from torchmetrics.functional.classification import binary_specificity_at_sensitivity as specificity

    rng = np.random.default_rng(1)
    uncertainty, hit = rng.random(300), (rng.random(300) < 0.6).astype(int)
    score, target = torch.tensor(uncertainty), torch.tensor(hit)
    expected = [1 - specificity(1 - score, target, 0.95)[0].item(), 1 - specificity(score, 1 - target, 0.95)[0].item()]
    assert false_positive_rates(uncertainty, hit) == pytest.approx(expected, abs=1e-6)


def of_torch_uncertainty(name):
    """A module of torch-uncertainty's metrics, without the package, which imports a training framework."""
    package = importlib.util.find_spec("torch_uncertainty")
    if package is None:
        pytest.skip("`pip install --no-deps torch-uncertainty einops` is no requirement: its own are too many")
    path = Path(package.origin).parent / "metrics" / "classification" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"of_torch_uncertainty_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_selective_measures_by_torch_uncertainty():
    """Its areas are trapezes over the same curves, so they differ by the last of Q steps; the shares are equal."""
    curves, rates = of_torch_uncertainty("risk_coverage"), of_torch_uncertainty("fpr")
    rng = np.random.default_rng(0)
    confidence = 0.3 + 0.7 * rng.beta(3, 2, 2000)
    hit = (rng.random(2000) < confidence).astype(int)
    probability = torch.tensor(np.stack([confidence, *[(1 - confidence) / 3] * 3], axis=1))
    target, area = torch.tensor(1 - hit), selective(-confidence, hit)

    def measured(metric, *arguments):
        metric.update(*arguments)
        return metric.compute().item()

    assert measured(curves.AURC(), probability, target) == pytest.approx(area.aurc, abs=1e-3)
    assert measured(curves.AUGRC(), probability, target) == pytest.approx(area.augrc, abs=1e-3)
    assert measured(curves.CovAt5Risk(), probability, target) == pytest.approx(area.coverage["5"], abs=1e-6)
    assert measured(curves.RiskAt80Cov(), probability, target) == pytest.approx(1 - area.recall["80"], abs=1e-3)
    score, right = torch.tensor(confidence), torch.tensor(hit)
    expected = measured(rates.FPR95(pos_label=1), score, right), measured(rates.FPR95(pos_label=1), -score, 1 - right)
    assert false_positive_rates(-confidence, hit) == pytest.approx(expected, abs=1e-6)
