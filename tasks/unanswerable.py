"""Unanswerable queries: whether an uncertainty tells that nothing in the gallery fits, and what both rejections cost.

Each query is asked twice: in the whole gallery, and in the one without the items that fit it.
"""

import functools

import numpy as np

from metrics import answering, calibration
from metrics.comparison import PairedBootstrap, interval
from metrics.uncertainty import auroc, false_positive_rates, risk_coverage, selective
from models.base import adapt_all
from tasks import decisions, lengths, posterior_scales, uncertainty_of
from utils.errors import UserError

PRIOR = 0.5  # share of queries without an answer
LEARNED = "learned"


def evaluate(adaptor, pairs, choices, device):
    """Evaluate rejection in each direction; returns the figures, and per-query arrays for the .npz.

    The items that fit are those that are known to, or, where that is unknown, the query's own.
    """
    result, arrays = {"score": choices.scores[0]}, {}
    for name, measured in decisions.measured(adaptor, pairs, choices, device, _measure).items():
        part, columns = measured.parts[0], decisions.joined(measured)
        figures, side = _evaluate(measured, columns)
        result[name] = measured.facts | figures | {"labels": "own" if part.true is None else "true"}
        arrays |= {f"{name}_{key}": values for key, values in side.items()}
    if choices.absent is not None:
        figures, side = _absent(adaptor, pairs, choices, device)
        result["text_to_image"]["absent"] = figures
        arrays |= side
    return result, arrays


def _measure(part):
    """Uncertainties of each query with its items and without: {name: (Q, 2)}, and what `with_and_without` adds."""
    side = part.side
    columns = answering.with_and_without(side.score, side.gallery, *part.matches, part.side.scale)
    if part.of_answer is not None:
        columns["retrieved"] = part.of_answer[columns["best"]]
    values = [_information(part.of_candidates, best) for best in columns["best"].T]
    return columns | {name: np.stack([each[name] for each in values], axis=1) for name in values[0]}


def _information(compare, best):
    """The uncertainty (Q,) by comparison with the best answer (Q,): {name: values}; empty for a method without it."""
    return {} if compare is None else {"information": compare(best[:, None])["information"]}


def _features(columns):
    """What a probability follows from, with its items and without: (2, Q, F)."""
    return np.stack([columns[name] for name in answering.NAMES], axis=-1).transpose(1, 0, 2)


def _evaluate(measured, columns):
    """Figures of one direction, and per-query arrays: every uncertainty with and without, and right answers."""
    part = measured.parts[0]
    queries, usable = len(part.group), columns["left"] > 1
    if not all((rows & usable).any() for fold in measured.folds for rows in fold):
        raise UserError(
            "no query that teaches, or none that is judged, has two items that do not fit it: evaluate a larger split,"
            " or name a larger --val."
        )
    features = _features(columns)
    learned, right = np.full((len(usable), 2), np.nan), np.full((len(usable), 2), np.nan)
    for fold in measured.folds:
        models = _models(features, columns["hit"], fold.taught_by & usable)
        rows = fold.judged & usable
        for i in (0, 1):
            learned[rows, i] = models["answer"](features[i][rows])
            right[rows, i] = learned[rows, i] * models["right"](features[i][rows])
    chosen = usable[:queries]
    judged = np.flatnonzero(chosen)
    uncertainties = {
        name: columns[name][judged].astype(float)
        for name in (*answering.NAMES, "retrieved", "information")
        if name in columns
    }
    uncertainties |= {LEARNED: -learned[judged], "right": -right[judged]}
    hit, drawn = columns["hit"][judged].astype(float), PairedBootstrap(np.tile(part.group[judged], 2))
    figures = {"asked": len(judged), "fit_all": int(queries - len(judged)), "right": float(hit.mean())}
    figures["rejection"] = {name: rejection(*values.T, hit, drawn) for name, values in uncertainties.items()}
    has_answer = np.repeat([1.0, 0.0], len(judged))
    chance = learned[judged].T.ravel()
    error = drawn.calibration_error(chance, has_answer)
    bins = calibration.reliability(chance, has_answer)
    figures["answer"] = {"ece": float(error[0]), "ece_interval": interval(error, basic=True)}
    figures["answer"] |= {"reliability": {key: each.tolist() for key, each in bins._asdict().items()}}
    teach = np.logical_or.reduce([fold.taught_by for fold in measured.folds]) & usable
    models = _models(features, columns["hit"], teach)
    figures["fitted"] = {
        key: {"weight": np.asarray(model.weight).tolist(), "intercept": model.intercept}
        for key, model in models.items()
    } | {"features": list(answering.NAMES), "prior": PRIOR, "scale": part.side.scale}
    arrays = {"hit": hit, "group": part.group[judged]}
    for name, values in uncertainties.items():
        arrays |= {f"{name}_with": values[:, 0], f"{name}_without": values[:, 1]}
    return figures, arrays


def _models(features, hit, rows):
    """Probabilities that there is an answer, and that the best item is right if there is."""
    both = np.concatenate([features[0][rows], features[1][rows]])
    return {
        "answer": answering.fit(both, np.repeat([1.0, 0.0], rows.sum())),
        "right": answering.fit(features[0][rows], hit[rows]),
    }


def rejection(answerable, unanswerable, hit, drawn):
    """How well an uncertainty tells queries with an answer (A,) from those without (B,), and both rejections together.

    hit: (A,), right answers. Every answer to a query without one is wrong (SCOD; Xia & Bouganis, ACCV 2022). drawn: a
    PairedBootstrap of all A + B.
    """
    values = np.concatenate([answerable, unanswerable])
    has_answer = np.repeat([1.0, 0.0], [len(answerable), len(unanswerable)])
    right = np.concatenate([hit, np.zeros(len(unanswerable))])
    area = auroc(values, has_answer)
    statistic = drawn.auroc(values, has_answer)
    figures = {"auroc": area, "interval": interval(statistic[np.isfinite(statistic)])}  # a draw may lack either kind
    figures["fpr95"] = false_positive_rates(values, has_answer)[0]
    figures |= {"auroc_right": auroc(values, right), "aurc": selective(values, right).aurc}
    figures["best_aurc"] = float(risk_coverage(-right, right).mean())
    return figures


def _absent(adaptor, pairs, choices, device):
    """Figures of captions of what no image shows, against those of the split, by every uncertainty; and arrays."""
    adapted = decisions.adapt(adaptor, pairs, device)
    absent = adapt_all(adaptor.adapt_text, choices.absent.embedding, device)
    compute = {"log_likelihood": adaptor.log_likelihood, "similarity": adaptor.similarity}[choices.scores[0]]
    scale, name = posterior_scales(adaptor, pairs)[choices.scores[0]], "text_to_image"
    columns = {}
    for kind, text in (("present", adapted.text), ("absent", absent)):
        side = functools.partial(lambda rows, text: compute(adapted.image, text.rows(rows)).T, text=text)
        columns[kind], best = answering.of_queries(side, len(adapted.image.mean), len(text.mean), scale)
        if text.uncertainty is not None:
            columns[kind]["query"] = uncertainty_of(text)
        if adapted.image.uncertainty is not None:
            columns[kind]["retrieved"] = uncertainty_of(adapted.image)[best]
        columns[kind] |= _information(decisions.comparison(adaptor, "text", text, adapted.image, choices.quiet), best)
    length = lengths(np.concatenate([pairs.text[:], choices.absent.embedding[:, : pairs.dim]]))
    if np.ptp(length):
        columns["present"]["length"], columns["absent"]["length"] = np.split(length, [len(pairs.text)])
    group = adapted.group[pairs.image_of_text]
    drawn = PairedBootstrap(np.concatenate([group, group.max() + 1 + np.arange(len(absent.mean))]))
    figures = {"queries": len(absent.mean), "text": list(choices.absent.text), "rejection": {}}
    arrays = {}
    for key, values in columns["present"].items():
        other = columns["absent"][key]
        record = rejection(values, other, np.ones(len(values)), drawn)
        figures["rejection"][key] = {name: record[name] for name in ("auroc", "interval", "fpr95")}
        arrays |= {f"{name}_{key}_present": values, f"{name}_{key}_absent": other}
    return figures, arrays
