"""Matching: the probability that an image and a text belong together, and the thresholds from which on to trust it."""

import csv
import io
from collections import defaultdict

import numpy as np

from metrics import calibration, matching
from metrics.comparison import PairedBootstrap, interval
from tasks import decisions

PRECISIONS = (50, 80, 90, 95, 99)  # percent
FITS = {"platt": matching.fit_platt, "isotonic": matching.fit_isotonic}


def evaluate(adaptor, pairs, choices, device):
    """Evaluate match probabilities in each direction; returns the figures, and per-query arrays for the .npz.

    A pair matches if the text is known to be true of the image, or, where that is unknown, was written for it. A
    probability follows from the score of the pair, or from its posterior over the gallery, as log odds.
    """
    result, arrays = {"score": choices.scores[0]}, {}
    for name, measured in decisions.measured(adaptor, pairs, choices, device, _measure).items():
        part, rate = measured.parts[0], measured.records[0][0].base_rate
        prior = rate if choices.prior is None else choices.prior
        labels = "own" if part.true is None else "true"
        figures = measured.facts | {"prior": prior, "base_rate": rate, "labels": labels, "matching": {}}
        for basis, scored in _by_basis(measured).items():
            part_figures, part_arrays = _evaluate(scored, measured, prior, rate)
            part_figures["answer"], part_arrays["answer_confidence"] = _answer(scored, measured, prior, rate)
            figures["matching"][basis] = part_figures
            arrays |= {f"{name}_{basis}_{key}": values for key, values in part_arrays.items()}
        if adaptor.match_logit and choices.scores[0] == "log_likelihood" and not choices.hubs:
            judged = _judged(_by_basis(measured)["score"], measured)
            record = _judge(judged, 1 / (1 + np.exp(-judged.score)), prior, rate, PairedBootstrap(part.group))
            figures["matching"]["score"]["model"] = record
        result[name] = figures
    return result, arrays


def _measure(part):
    return matching.scored_pairs(part.side.score, part.side.gallery, *part.matches, part.side.scale)


def _by_basis(measured):
    """The Scored pairs of all parts, with the queries numbered through, by either basis of a probability."""
    queries = [len(part.group) for part in measured.parts]
    first = np.cumsum([0, *queries])
    pairs = [pairs._replace(query=pairs.query + start) for (pairs, _), start in zip(measured.records, first)]
    scored = matching.Scored(*(np.concatenate(column) for column in zip(*pairs)))
    total = np.concatenate([total for _, total in measured.records])
    scale = np.repeat([part.side.scale for part in measured.parts], queries)
    odds = matching.log_odds(scored.score, total[scored.query], scale[scored.query])
    return {"score": scored, "posterior": scored._replace(score=odds)}


def _judged(scored, measured):
    return scored.rows(scored.query < len(measured.parts[0].group))


def _evaluate(scored, measured, prior, rate):
    """Figures of the probabilities by one basis, of its thresholds, and what all that teaches would have taught."""
    judged, drawn = _judged(scored, measured), PairedBootstrap(measured.parts[0].group)
    probability, thresholds = _cross_fitted(scored, judged, measured.folds, prior)
    figures = {kind: _judge(judged, values, prior, rate, drawn) for kind, values in probability.items()}
    teaching = scored.rows(np.logical_or.reduce([fold.taught_by for fold in measured.folds])[scored.query])
    fitted = {kind: fit(teaching, prior) for kind, fit in FITS.items()}
    figures["fitted"] = {kind: [np.asarray(each).tolist() for each in one] for kind, one in fitted.items()}
    figures["thresholds"] = []
    for precision, of_pairs in zip(PRECISIONS, thresholds, strict=True):
        threshold = matching.threshold_for(teaching, teaching.at(prior), precision / 100)
        at_threshold = None if threshold is None else float(fitted["isotonic"](threshold))
        row = {"precision": precision / 100, "threshold": threshold, "probability": at_threshold}
        figures["thresholds"].append(row | {"measured": matching.beyond(judged, prior, of_pairs, drawn)})
    best = _best(judged)
    confidence = {f"{kind}_confidence": values[best] for kind, values in probability.items()}
    return figures, confidence | {"hit": judged.match[best]}


def _judge(judged, probability, prior, rate, drawn):
    """Figures of the probabilities (K,) of judged pairs, and of those of each query's best answer at the base rate."""
    best = _best(judged)
    confidence = matching.shifted(probability[best], prior, rate)
    figures = _of_best(confidence, judged.match[best], drawn)
    return matching.figures(judged, probability, prior, drawn) | {"best_answer": figures}


def _of_best(confidence, right, drawn):
    error = drawn.calibration_error(confidence, right)
    figures = {"ece": float(error[0]), "ece_interval": interval(error, basic=True)}
    figures |= {"confidence": float(confidence.mean()), "right": float(right.mean())}
    bins = calibration.reliability(confidence, right)
    figures["reliability"] = {key: each.tolist() for key, each in bins._asdict().items()}
    return figures


def _answer(scored, measured, prior, rate):
    """The probability that each query's best answer matches: figures, and the values (Q,).

    What wins among many is not like any pair. Both kinds of fits, to all pairs (at the base rate) and to best answers
    alone, are candidates; the likelihood of best answers chooses, by cross-validation among the images that teach.
    """
    best = _best(scored)
    score, right, group = scored.score[best], scored.match[best], measured.group
    confidence, chosen = np.empty(len(measured.parts[0].group)), []

    def fits(rows):
        taught = np.isin(np.arange(len(best)), rows)
        of_pairs, of_answers = scored.rows(taught[scored.query]), scored.rows(best[rows])
        candidates = {}
        for kind, fit in FITS.items():
            of_all = fit(of_pairs, prior)
            candidates[f"{kind}, pairs"] = lambda values, of_all=of_all: matching.shifted(of_all(values), prior, rate)
            if np.ptp(of_answers.match):
                of_answers = of_answers._replace(weight=np.ones(len(rows)))
                candidates[f"{kind}, best answers"] = fit(of_answers, of_answers.base_rate)
        return candidates

    for fold in measured.folds:
        rows = np.flatnonzero(fold.taught_by)
        first, least, losses = calibration.halves(group[rows]), 1 / (len(rows) + 2), defaultdict(list)
        for half in (first, ~first):
            for name, fit in fits(rows[half]).items():
                stated = fit(score[rows[~half]]).clip(least, 1 - least)
                losses[name].append(calibration.scores_of_chance(stated, right[rows[~half]])["log_score"])
        chosen.append(min((name for name in losses if len(losses[name]) == 2), key=lambda name: sum(losses[name])))
        judged = np.flatnonzero(fold.judged)
        confidence[judged] = fits(rows)[chosen[-1]](score[judged])
    drawn = PairedBootstrap(measured.parts[0].group)
    figures = {"best_answer": _of_best(confidence, right[: len(confidence)], drawn), "chosen": chosen}
    figures["best_answer"]["by_chance"] = calibration.expected_error(confidence)
    return figures, confidence


def _cross_fitted(scored, judged, folds, prior):
    """Probabilities of judged pairs {kind: (K,)}, and thresholds (K,) for each precision, by what the others teach."""
    probability = {kind: np.empty(len(judged.score)) for kind in FITS}
    thresholds = [np.empty(len(judged.score)) for _ in PRECISIONS]
    for fold in folds:
        teaching, rows = scored.rows(fold.taught_by[scored.query]), fold.judged[judged.query]
        for kind, fit in FITS.items():
            probability[kind][rows] = fit(teaching, prior)(judged.score[rows])
        for precision, of_pairs in zip(PRECISIONS, thresholds, strict=True):
            threshold = matching.threshold_for(teaching, teaching.at(prior), precision / 100)
            of_pairs[rows] = np.inf if threshold is None else threshold
    return probability, thresholds


def _best(scored):
    """The best-scored pair (Q,) of each query; a wrong one where a match ties with it."""
    order = np.lexsort([scored.match, -scored.score, scored.query])
    return order[np.unique(scored.query[order], return_index=True)[1]]


def thresholds_csv(result):
    """The threshold tables of a result as CSV, a line for each direction, basis and precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("precision", "recall", "answered")
    bounds = [f"{name}_{end}" for name in names for end in ("measured", "low", "high")]
    writer.writerow(["direction", "score", "basis", "prior", "precision", "threshold", "probability", *bounds])
    for direction, values in result.items():
        for basis, part in values["matching"].items() if isinstance(values, dict) else ():
            for row in part["thresholds"]:
                head = [direction, result["score"], basis, values["prior"]]
                cells = [row["precision"], row["threshold"], row["probability"]]
                for name in names:
                    cells += [row["measured"][name], *(row["measured"][f"{name}_interval"] or (None, None))]
                writer.writerow([*head, *cells])
    return text.getvalue()
