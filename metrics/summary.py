"""Figures of a result file: summaries of a ranking, of an uncertainty and of forecasts, as dicts for JSON.

Q queries, G gallery items, P positives: pairs of a query and an item that answers it.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from metrics import calibration, retrieval, score_tiles
from metrics.comparison import interval
from metrics.uncertainty import (
    aupr,
    auroc,
    bootstrap,
    false_positive_rates,
    kendall,
    level_means,
    levels,
    regret,
    selective,
    spearman,
    trend,
)

KS = (1, 5, 10)
BINS = (15, 20)
ENTROPY_LEVELS = 10  # levels of entropy in `of_learner`
FIT_SCORES = 2**24  # at most as many scores fit a temperature: 64 MB, 600 captions in a gallery of 25,000


def of_ranking(ranking, limit=None, drawn=None):
    """Recall@k, median rank of the first positive and, with the Bayes-optimal R@1 `limit` (Q,), the regret.

    drawn: a PairedBootstrap of the queries, for 95 % intervals of the recalls.

    >>> scores = torch.eye(2)
    >>> of_ranking(retrieval.rank(lambda rows: scores[rows], 2, [0, 1], [0, 1]))
    {'queries': 2, 'recall': {'1': 1.0, '5': 1.0, '10': 1.0}, 'median_rank': 1.0}
    """
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    figures = {"queries": len(hits[1]), "recall": {str(k): float(hits[k].mean()) for k in KS}}
    if drawn is not None:
        figures["interval"] = {"recall": {str(k): interval(drawn.mean(hits[k])) for k in KS}}
    figures["median_rank"] = float(np.median(retrieval.first_rank(ranking)))
    if limit is not None:
        figures |= {"bayes_recall": float(limit.mean()), "regret": regret(hits[1], limit)}
    return figures


def of_uncertainty(uncertainty, ranking, count, drop_remainder=False, limit=None, truth=None, group=None, times=None):
    """AUROC, AUPR, FPR95, selective prediction, levels and trend of an uncertainty (Q,) of ranked queries.

    `log_score` and `brier_score` are of the probability that the answer is right, see `calibration.chance_of_hit`.

    Trend, AUROC and recall by level have 95 % bootstrap intervals. count: number of levels; there are none if all
    queries are equally uncertain. limit: (Q,), Bayes-optimal R@1. truth: (Q,), in the ideal order, such as true
    ambiguity. group: (Q,), and times, as in `bootstrap`.

    >>> ranking = retrieval.rank(lambda rows: torch.eye(4)[rows], 4, range(4), [0, 1, 2, 0])
    >>> of_uncertainty(np.array([1.0, 2.0, 3.0, 4.0]), ranking, count=2)["levels"]["recall"]["1"]
    [1.0, 0.5]
    """
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    area = selective(uncertainty, hits[1])
    figures = {"auroc": auroc(uncertainty, hits[1]), "aupr": aupr(uncertainty, hits[1])}
    figures |= {"aurc": area.aurc, "e_aurc": area.e_aurc, "augrc": area.augrc}
    figures |= {"selective_recall": area.recall, "selective_coverage": area.coverage}
    if np.ptp(uncertainty) == 0:
        return figures | {"constant": True}
    figures["fpr95_right"], figures["fpr95_wrong"] = false_positive_rates(uncertainty, hits[1])
    chance = calibration.chance_of_hit(uncertainty, hits[1], np.arange(len(hits[1])) if group is None else group)
    if chance is not None:
        figures |= calibration.scores_of_chance(chance, hits[1])
    groups, options = levels(uncertainty, count, drop_remainder), (count, drop_remainder)
    by_level = {
        "count": [len(rows) for rows in groups],
        "uncertainty": [[float(uncertainty[rows].min()), float(uncertainty[rows].max())] for rows in groups],
        "recall": {str(k): level_means(uncertainty, hit, *options).tolist() for k, hit in hits.items()},
    }
    if limit is not None:
        by_level["bayes_recall"] = level_means(uncertainty, limit, *options).tolist()
    figures |= {"levels": by_level} | trend(by_level["recall"]["1"])._asdict()
    if truth is not None and np.ptp(truth) > 0:
        figures |= {"spearman": spearman(uncertainty, truth), "kendall": kendall(uncertainty, truth)}
    return figures | {"interval": bootstrap(uncertainty, hits[1], count, group, times, drop_remainder=drop_remainder)}


def gallery_aware(ranking):
    """Uncertainties (Q,) that follow from the scores over the gallery, without an adaptor: {name: (Q,)}.

    >>> ranking = retrieval.rank(lambda rows: torch.tensor([[0.75, 0.5]])[rows], 2, [0], [0])
    >>> gallery_aware(ranking)["margin"].tolist()
    [-0.25]
    """
    return {
        "top": -ranking.score,
        "margin": -ranking.margin,
        "entropy": ranking.entropy,
        "probability": -ranking.probability,
    }


class Judged(NamedTuple):
    """What one pass over the scores says of a ranking and of its posterior."""

    ranking: retrieval.Ranking
    forecasts: dict  # {name: (Forecast, scales)}: `model`, and `temperature` after temperature scaling
    uncorrected: tuple[retrieval.Ranking, calibration.Forecast]  # of the scores before correction


@torch.inference_mode()
def judge(score, gallery, query_of_positive, item_of_positive, scale, group, members=None, correction=None, seed=0):
    """Rank Q queries and forecast with their posterior, unscaled and after temperature scaling, in one pass.

    score: function from rows of queries to their scores (q, G). group: (Q,); the queries are split into two halves of
    whole groups, and each half is evaluated with the temperature fitted on the other, on at most FIT_SCORES scores.
    members: of the groups of items, see `calibration.members_of`. correction: constants (G,) that are subtracted from
    the scores, and the scale of the posterior without them. `temperature` is missing if there are not two groups, or
    if a half has too few mistakes to bound a temperature.

    >>> scores = torch.eye(2)[[0, 0, 1, 1] * 4]
    >>> list(judge(lambda rows: scores[rows], 2, range(16), [0, 1, 1, 1] * 4, 1.0, group=range(16)).forecasts)
    ['model', 'temperature']
    """
    query, item = np.asarray(query_of_positive), np.asarray(item_of_positive)
    scales, (subtracted, plain_scale) = {"model": [scale]}, correction or (None, None)
    readers = [partial(retrieval.ranks, scale=scale), partial(calibration.probabilities, scale=scale, members=members)]
    first, fitted = _fit_halves(score, gallery, query, item, group, subtracted, seed)
    if fitted:
        scales["temperature"] = fitted
        scale_of_query = torch.from_numpy(np.where(first, fitted[1], fitted[0]))  # that of the other half
        readers.append(partial(calibration.probabilities, scale=scale_of_query, members=members))
    if subtracted is not None:
        readers = [lambda tile, read=reader: read(tile.less(subtracted)) for reader in readers]
        readers.append(partial(retrieval.ranks, scale=plain_scale))
        readers.append(partial(calibration.probabilities, scale=plain_scale, members=members))
    ranking, *columns = score_tiles.read(score, gallery, query, item, *readers)
    ranking, uncorrected = retrieval.Ranking(*ranking), None
    if subtracted is not None:
        *columns, plain_ranking, plain = columns
        uncorrected = retrieval.Ranking(*plain_ranking), calibration.Forecast(*plain)
    columns = [calibration.Forecast(*column) for column in columns]
    forecasts = {name: (column, part) for (name, part), column in zip(scales.items(), columns, strict=True)}
    return Judged(ranking, forecasts, uncorrected or (ranking, columns[0]))


def _fit_halves(score, gallery, query, item, group, subtracted, seed):
    """Two halves of the queries, (Q,), True in the first, and the scales fitted on each; None where there are none."""
    if np.ptp(group) == 0:
        return None, None
    rng, first, fitted = np.random.default_rng(seed), calibration.halves(group, seed), []
    for half in (first, ~first):
        rows = np.sort(rng.permutation(np.flatnonzero(half))[: max(2, FIT_SCORES // gallery)])
        scores = score_tiles.all_scores(lambda part, r=rows: score(r[part]), len(rows), gallery)
        if subtracted is not None:
            scores = scores - subtracted
        fitted.append(calibration.fit_scale(lambda part, s=scores: s[part], gallery, *_among(rows, query, item)))
    return first, None if None in fitted else fitted


def _among(rows, query, item):
    """Positives of the queries in `rows`, which ascend: their positions in `rows`, and their items."""
    selected = np.isin(query, rows)
    return np.searchsorted(rows, query[selected]), item[selected]


def of_forecast(forecast, scales, drawn=None):
    """ECE, adaptive ECE, NLL, Brier score and reliability diagram of a Forecast.

    `ece_15_expected` and `ece_15_limit` are `calibration.expected_error`. scales: the factors on the scores, one for
    all queries or one for each half. drawn: a PairedBootstrap of the queries, for 95 % intervals.

    >>> certain = calibration.forecast(lambda rows: 100 * torch.eye(2)[rows], 2, [0, 1], [0, 0])
    >>> of_forecast(certain, scales=[1.0])["ece_15"]
    0.5
    """
    confidence, hit = forecast.confidence, forecast.hit
    bins = {count: calibration.reliability(confidence, hit, count) for count in BINS}
    figures = {f"ece_{count}": calibration.calibration_error(part) for count, part in bins.items()}
    count = min(BINS[0], len(hit))
    figures["adaptive_ece"] = calibration.calibration_error(calibration.adaptive_reliability(confidence, hit, count))
    figures |= {"nll": float(forecast.nll.mean()), "brier": float(forecast.brier.mean()), "scales": scales}
    figures["ece_15_expected"], figures["ece_15_limit"] = calibration.expected_error(confidence)
    if drawn is not None:
        statistics = {"nll": drawn.mean(forecast.nll), "brier": drawn.mean(forecast.brier)}
        statistics["ece_15"] = drawn.calibration_error(confidence, hit)
        figures["interval"] = {
            name: interval(statistic, basic=name == "ece_15") for name, statistic in statistics.items()
        }
    return figures | {"reliability": {name: part.tolist() for name, part in bins[BINS[0]]._asdict().items()}}


def of_answers(forecast):
    """Accuracy of a Forecast, and AUROC and AURC of detecting its errors by the entropy of the probabilities.

    >>> logits = torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    >>> of_answers(calibration.forecast(lambda rows: logits[rows], 2, [0, 1], [1, 0]))
    {'accuracy': 0.5, 'auroc': 1.0, 'aurc': 0.25}
    """
    entropy, hit = forecast.entropy, forecast.hit
    return {
        "accuracy": float(hit.mean()),
        "auroc": auroc(entropy, hit),
        "aurc": selective(entropy, hit).aurc,
    }


def of_learner(forecast):
    """Accuracy, NLL and ECE of a Forecast, its error in levels of entropy, and AUROCs of entropy and top probability.

    >>> logits = torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    >>> of_learner(calibration.forecast(lambda rows: logits[rows], 2, [0, 1], [1, 0]))["by_entropy"]["error"]
    [0.0, 1.0]
    """
    count = min(ENTROPY_LEVELS, len(forecast.hit))
    groups = levels(forecast.entropy, count) if count > 1 else [np.arange(count)]
    return {
        "accuracy": float(forecast.hit.mean()),
        "nll": float(forecast.nll.mean()),
        "ece": calibration.calibration_error(calibration.reliability(forecast.confidence, forecast.hit)),
        "by_entropy": {
            "count": [len(rows) for rows in groups],
            "entropy": [float(forecast.entropy[rows].mean()) for rows in groups],
            "error": [float(1 - forecast.hit[rows].mean()) for rows in groups],
        },
        "entropy_auroc": auroc(forecast.entropy, forecast.hit),
        "probability_auroc": auroc(-forecast.confidence, forecast.hit),
    }
