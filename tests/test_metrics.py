"""Metrics against loops, simulation and scipy."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from metrics import retrieval, uncertainty


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
    monkeypatch.setattr(retrieval, "TILE", tile)  # blocks of one query and of all
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


def test_recall_without_ties_is_exact():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((40, 30))
    item = rng.integers(0, 30, 40)
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 30, np.arange(40), item)
    for k in (1, 5, 10):
        expected = [item[i] in np.argsort(-scores[i])[:k] for i in range(40)]
        assert (retrieval.recall_at(ranking, k) == expected).all()


def test_constant_score_has_the_recall_of_a_guess():
    ranking = retrieval.rank(lambda rows: torch.zeros(len(range(50)[rows]), 20), 20, np.arange(50), np.arange(50) % 20)
    assert retrieval.recall_at(ranking, 5) == pytest.approx(np.full(50, 5 / 20))
    everything = retrieval.recall_at(ranking, 20)
    assert everything == pytest.approx(np.ones(50))


def test_gallery_aware_confidences_by_loop():
    rng = np.random.default_rng(5)
    scores = rng.standard_normal((7, 9))
    ranking = retrieval.rank(lambda rows: torch.tensor(scores[rows]), 9, np.arange(7), np.arange(7), scale=3.0)
    for row, *found in zip(scores, ranking.score, ranking.margin, ranking.entropy, ranking.probability, strict=True):
        second, first = np.sort(row)[-2:]
        posterior = np.exp(3 * row) / np.exp(3 * row).sum()
        expected = first, first - second, stats.entropy(posterior), posterior.max()
        assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="gallery of 1"):
        retrieval.rank(lambda rows: torch.zeros(1, 1), 1, [0], [0])


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(6)
    doubt = rng.integers(0, 6, 40).astype(float)
    hit = rng.choice([0.0, 1.0, 0.25], 40)
    right = total = 0.0
    for i, j in itertools.product(range(40), repeat=2):
        weight = (1 - hit[i]) * hit[j] * (i != j) + (i == j) * hit[i] * (1 - hit[i])
        total += weight
        right += weight * ((doubt[i] > doubt[j]) + (doubt[i] == doubt[j]) / 2)
    assert uncertainty.auroc(doubt, hit) == pytest.approx(right / total)
    sure = rng.integers(0, 2, 40)
    u = stats.mannwhitneyu(doubt[sure == 0], doubt[sure == 1]).statistic
    assert uncertainty.auroc(doubt, sure) == pytest.approx(u / (sure.sum() * (1 - sure).sum()))
    assert uncertainty.auroc(sure == 0, sure) == 1 and uncertainty.auroc(sure, sure) == 0
    assert uncertainty.auroc(np.ones(40), sure) == 0.5
    assert uncertainty.auroc(doubt, np.ones(40)) is None


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
    """Every choice of an image's own captions among those true of it, weighted by its odds."""
    rng = np.random.default_rng(7)
    true = rng.random((8, 14)) < 0.6
    own = rng.integers(1, 4, 8)
    others = true.sum(axis=0) - 1
    limits = []
    for i in range(8):
        fits = sorted((others[j] for j in range(14) if true[i, j]), key=float)
        chosen = list(itertools.combinations(range(len(fits)), own[i]))
        weights = [np.prod([1 / fits[j] for j in choice]) if fits[0] else 0 for choice in chosen]
        best = sum(weight for choice, weight in zip(chosen, weights, strict=True) if 0 in choice)
        limits.append(best / sum(weights) if fits[0] else 1)
    assert retrieval.bayes_optimal_image_to_text(sparse.csr_array(true), own) == pytest.approx(limits)


@pytest.mark.parametrize(("queries", "count"), [(100, 10), (1003, 10), (25014, 10), (7, 7), (7, 2)])
def test_levels_use_every_query_once(queries, count):
    doubt = np.random.default_rng(4).integers(0, 5, queries)  # many ties
    groups = uncertainty.levels(doubt, count)
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1 and sorted(np.concatenate(groups)) == list(range(queries))
    order = np.concatenate(groups)
    assert (np.diff(doubt[order]) >= 0).all()
    assert all(a < b for a, b in itertools.pairwise(order) if doubt[a] == doubt[b])


@pytest.mark.parametrize("count", [1, 0, -3, 11])
def test_levels_refuse_what_cannot_be_split(count):
    with pytest.raises(ValueError, match="10 queries cannot be split"):
        uncertainty.levels(np.arange(10), count)


def test_trend_against_scipy():
    recalls = np.random.default_rng(5).random(10)
    trend = uncertainty.trend(recalls)
    fit = stats.linregress(np.arange(10), recalls)
    assert trend.s == pytest.approx(stats.spearmanr(np.arange(10), recalls).statistic)
    assert trend.r2 == pytest.approx(fit.rvalue**2)
    assert trend.minus_s_r2 == pytest.approx(-trend.s * fit.rvalue**2)
    assert uncertainty.trend([0.9, 0.7, 0.5, 0.3]) == pytest.approx((-1, 1, 1))
    assert uncertainty.trend([0.4] * 5) == (0, 0, 0)


def test_falling_chains_by_loop():
    rng = np.random.default_rng(6)
    chain, depth = np.repeat(np.arange(20), 4), np.tile(np.arange(4), 20)
    doubt = np.round(rng.random(80) - 0.4 * depth, 1)  # some steps tie, and a tie does not fall
    rows = rng.permutation(80)
    whole, steps = uncertainty.falling_chains(doubt[rows], chain[rows], depth[rows])
    falls = [[doubt[4 * c + d + 1] < doubt[4 * c + d] for d in range(3)] for c in range(20)]
    assert whole == pytest.approx(np.mean([all(f) for f in falls]))
    assert steps == pytest.approx(np.mean(falls))
