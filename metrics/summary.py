"""What a result file says of a ranking, of an uncertainty and of probabilities: arrays in, dicts of figures out.

Q queries, G gallery items, P positives: pairs of a query and an item that answers it.
"""

import numpy as np
import torch

from metrics import calibration, retrieval, uncertainty

KS = (1, 5, 10)
BINS = (15, 20)
ENTROPY_LEVELS = 10  # in which a learner's errors are counted
ON = 2**24  # scores held at most while a temperature is fitted, 64 MB: 600 captions' in a gallery of 25,000


def of_ranking(ranking, limit=None):
    """Recall, the median rank of the first positive and, with the Bayes-optimal R@1 `limit` (Q,), the regret."""
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    figures = {"queries": len(hits[1]), "recall": {str(k): float(hits[k].mean()) for k in KS}}
    figures["median_rank"] = float(np.median(retrieval.first_rank(ranking)))
    if limit is not None:
        figures |= {"bayes_recall": float(limit.mean()), "regret": uncertainty.regret(hits[1], limit)}
    return figures


def of_uncertainty(doubt, ranking, count, drop_remainder=False, limit=None, truth=None, group=None):
    """What an uncertainty (Q,) of ranked queries is worth; of trend, AUROC and levels with 95 % bootstrap intervals.

    count: levels, of which there are none where all queries are equally uncertain. limit: Bayes-optimal R@1 (Q,).
    truth: (Q,) what an ideal uncertainty would be ordered as, such as true ambiguity. group: as in `bootstrap`.
    """
    hits = {k: retrieval.recall_at(ranking, k) for k in KS}
    area = uncertainty.selective(doubt, hits[1])
    figures = {"auroc": uncertainty.auroc(doubt, hits[1]), "aupr": uncertainty.aupr(doubt, hits[1])}
    figures |= {"aurc": area.aurc, "e_aurc": area.e_aurc, "selective_recall": area.recall}
    if np.ptp(doubt) == 0:
        return figures | {"constant": True}
    groups, options = uncertainty.levels(doubt, count, drop_remainder), (count, drop_remainder)
    levels = {
        "count": [len(rows) for rows in groups],
        "uncertainty": [[float(doubt[rows].min()), float(doubt[rows].max())] for rows in groups],
        "recall": {str(k): uncertainty.level_means(doubt, hit, *options).tolist() for k, hit in hits.items()},
    }
    if limit is not None:
        levels["bayes_recall"] = uncertainty.level_means(doubt, limit, *options).tolist()
    figures |= {"levels": levels} | uncertainty.trend(levels["recall"]["1"])._asdict()
    if truth is not None and np.ptp(truth) > 0:
        figures |= {"spearman": uncertainty.spearman(doubt, truth), "kendall": uncertainty.kendall(doubt, truth)}
    interval = uncertainty.bootstrap(doubt, hits[1], count, group, drop_remainder=drop_remainder)
    return figures | {"interval": interval}


def gallery_aware(ranking):
    """The uncertainties (Q,) that the scores over the gallery give, which need no adaptor: {name: (Q,)}."""
    doubts = {"top": -ranking.score, "margin": -ranking.margin, "entropy": ranking.entropy}
    return doubts | {"probability": -ranking.probability}


def of_probabilities(*args, **options):
    """How far the posterior over the gallery can be believed: figures of what `forecasts` gives, by the same name."""
    return {name: of_forecast(*found) for name, found in forecasts(*args, **options).items()}


@torch.inference_mode()
def forecasts(score, gallery, query_of_positive, item_of_positive, scale, group, group_of_item=None, seed=0):
    """Judge the posterior over the gallery as it is, and after temperature scaling: {name: (Forecast, scales)}.

    score: function from rows of queries to their scores (q, G). group (Q,): queries of one group stay together in one
    of two halves; the temperature that each half is judged with is fitted on the other, on no more than ON scores.
    group_of_item: as in `calibration.forecast`. Without two groups, or where a half has too few mistakes to bound a
    temperature, there is no `temperature`.
    """
    query, item = np.asarray(query_of_positive), np.asarray(item_of_positive)
    found = {"model": (calibration.forecast(score, gallery, query, item, scale, group_of_item), [scale])}
    if np.ptp(group) == 0:
        return found
    rng, first, scales = np.random.default_rng(seed), calibration.halves(group, seed), []
    for fitted in (first, ~first):
        rows = np.sort(rng.permutation(np.flatnonzero(fitted))[: max(2, ON // gallery)])
        held = retrieval.whole(lambda part, r=rows: score(r[part]), len(rows), gallery)
        scales.append(calibration.fit_scale(lambda part, h=held: h[part], gallery, *_among(rows, query, item)))
    if None in scales:
        return found
    whole = calibration.Forecast(*(np.empty_like(column) for column in found["model"][0]))
    for judged, by in ((~first, scales[0]), (first, scales[1])):
        rows = np.flatnonzero(judged)
        about = (lambda part, r=rows: score(r[part])), gallery, *_among(rows, query, item), by, group_of_item
        for column, part in zip(whole, calibration.forecast(*about), strict=True):
            column[rows] = part
    return found | {"temperature": (whole, scales)}


def _among(rows, query, item):
    """The positives of the queries in `rows`, ascending, by their numbers there."""
    mine = np.isin(query, rows)
    return np.searchsorted(rows, query[mine]), item[mine]


def of_forecast(forecast, scales):
    """Figures of a Forecast; scales: what made logits of the scores, one of all queries or one of each half."""
    pair = forecast.confidence, forecast.hit
    bins = {count: calibration.reliability(*pair, count) for count in BINS}
    figures = {f"ece_{count}": calibration.calibration_error(part) for count, part in bins.items()}
    count = min(BINS[0], len(forecast.hit))
    figures["adaptive_ece"] = calibration.calibration_error(calibration.adaptive_reliability(*pair, count))
    figures |= {"nll": float(forecast.nll.mean()), "brier": float(forecast.brier.mean()), "scales": scales}
    return figures | {"reliability": {name: part.tolist() for name, part in bins[BINS[0]]._asdict().items()}}


def of_answers(forecast):
    """How often a Forecast is right, and how well the entropy of its probabilities tells where."""
    entropy, hit = forecast.entropy, forecast.hit
    figures = {"accuracy": float(hit.mean()), "auroc": uncertainty.auroc(entropy, hit)}
    return figures | {"aurc": uncertainty.selective(entropy, hit).aurc}


def of_learner(forecast):
    """Accuracy, NLL and ECE of a Forecast; its error in levels of entropy of equal count, and how entropy tells it."""
    count = min(ENTROPY_LEVELS, len(forecast.hit))
    groups = uncertainty.levels(forecast.entropy, count) if count > 1 else [np.arange(count)]
    return {
        "accuracy": float(forecast.hit.mean()),
        "nll": float(forecast.nll.mean()),
        "ece": calibration.calibration_error(calibration.reliability(forecast.confidence, forecast.hit)),
        "by_entropy": {
            "count": [len(rows) for rows in groups],
            "entropy": [float(forecast.entropy[rows].mean()) for rows in groups],
            "error": [float(1 - forecast.hit[rows].mean()) for rows in groups],
        },
        "entropy_auroc": uncertainty.auroc(forecast.entropy, forecast.hit),
    }
