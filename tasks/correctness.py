"""Correctness: is the answer right? Predictors that learn it from labels, beside those that need none.

Answers are classes, or, in retrieval, items of a gallery. Every learned predictor has a linear rival that has seen the
same queries: a probe of the classes, whose probability of CLIP's answer is a prediction too, and a logistic regression
on what ViLU reads.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from metrics import answering, calibration, correctness
from metrics.comparison import PairedBootstrap, interval, paired_difference
from metrics.score_tiles import read
from metrics.uncertainty import false_positive_rates, selective
from models import icpe, vilu
from tasks import decisions
from utils.errors import UserError

RANKS = 10  # best answers by whose probabilities `rel-u, ranks` compares queries of any gallery
FREE, RIVALS = "probability", ("linear", "probe")  # with which the others are compared
OF_CLASSES = "vilu, official"  # a recipe for few images with classes: of many captions its 800 epochs take hours
FOLDS = 3  # of a linear model's penalty
LEAST_CLASSES = 4  # two halves with something to choose in each


class Predictor(NamedTuple):
    """A prediction that the answer is right."""

    labels: str  # what it has seen of the queries that teach
    is_probability: bool
    predict: Callable  # from records of the queries that teach and of those asked to values (q,), larger = surer
    needs: str = ""  # `classes`, or `seen classes`: of which images teach


class Trial(NamedTuple):
    """Queries that teach and queries that are judged by them."""

    taught: dict  # records (T, ...), see `_read`
    asked: dict  # records (q, ...)
    rows: np.ndarray  # (q,) of those asked, in the evaluated split


def evaluate(adaptor, pairs, choices, device):
    """Evaluate predictors of right answers; returns the figures, and per-query arrays for the .npz.

    `held_out` has the same of candidates that no predictor has seen: half of the classes, or the gallery of the half of
    the images that is judged. Galleries of --val are of other images anyway. Raises UserError for an unknown predictor,
    and unless both right and wrong answers teach.
    """
    for name in choices.predictors or ():
        if name not in PREDICTORS:
            raise UserError(f"there is no predictor '{name}': name some of {', '.join(map(repr, PREDICTORS))}.")
        if PREDICTORS[name].needs and pairs.classes is None:
            raise UserError(f"'{name}' needs images with classes, and {pairs.folder} has captions: leave it out.")
    classes = pairs.classes is not None
    asked = choices.predictors or [name for name in PREDICTORS if classes or name != OF_CLASSES]
    names = [name for name in PREDICTORS if name in (*asked, FREE) and (classes or not PREDICTORS[name].needs)]
    directions = decisions.measured(adaptor, pairs, choices, device, partial(_read, whole=classes))
    result, arrays = {"score": choices.scores[0]}, {}
    for direction, measured in directions.items():
        records, part = _joined(measured.records), measured.parts[0]
        if classes:
            splits = [pairs] if choices.val is None else [pairs, choices.val]
            records["image"] = np.concatenate([split.image for split in splits])
        trials = [
            Trial(_rows(records, fold.taught_by), _rows(records, fold.judged), np.flatnonzero(fold.judged))
            for fold in measured.folds
        ]
        if any(np.ptp(trial.taught["hit"]) == 0 for trial in trials):
            raise UserError("all answers that teach are right, or all are wrong: name a --val split that has both.")
        if any(np.ptp(trial.asked["hit"]) == 0 for trial in trials):
            raise UserError("all answers that are judged are right, or all are wrong: name a larger --split.")
        figures, side = _judge(trials, part.group, names, choices.quiet)
        seen = classes or choices.val is None
        facts = {"candidates": "seen" if seen else "held out", "labels": "own" if part.true is None else "true"}
        result[direction] = measured.facts | facts | figures
        arrays |= {f"{direction}_{name}": values for name, values in side.items()}
        other = {"text_to_image": "image_to_text", "image_to_text": "text_to_image"}.get(direction)
        trials = _held_out(measured, other and directions[other].parts[0].group) if seen else []
        if trials and all(np.ptp(each["hit"]) for trial in trials for each in (trial.taught, trial.asked)):
            chosen = [name for name in names if PREDICTORS[name].needs != "seen classes"]
            result[direction]["held_out"], side = _judge(trials, part.group, chosen, choices.quiet)
            arrays |= {f"{direction}_held_out_{name}": values for name, values in side.items()}
    return result, arrays


def _read(part, whole=False):
    """What predictors read of the queries of a part, {name: (Q, ...)}; whole: also the logits (Q, G) and labels."""
    side, positives = part.side, part.matches

    def reader(tile):
        logit = side.scale * tile.scores
        posterior = logit.cpu().double().softmax(dim=1)  # in float64, in which no probability of an answer is 1
        values, best = answering.uncertainties(tile.scores, side.scale)
        right = torch.zeros_like(logit, dtype=torch.bool)
        right[tile.targets] = True
        ranks = posterior.topk(min(RANKS, side.gallery), dim=1).values
        features = torch.stack([values[name] for name in answering.NAMES], dim=1)
        inputs = vilu.inputs(part.query[tile.rows], part.items, logit)
        values = [inputs, features, right.gather(1, best[:, None])[:, 0]]
        values += [F.pad(ranks, (0, RANKS - ranks.shape[1])), correctness.doctor(posterior)]
        return [*values, logit] if whole else values

    (columns,) = read(side.score, side.gallery, *positives, reader)
    names = ("inputs", "uncertainties", "hit", "ranks", "doctor", "logit")
    records = dict(zip(names, columns)) | {"group": part.group}
    if not np.isfinite(records["inputs"]).all():
        raise FloatingPointError("a score is not finite")
    records["hit"] = records["hit"].astype(np.float32)
    return records | ({"label": np.asarray(side.item)} if whole else {})


def _rows(records, index):
    return {name: values[index] for name, values in records.items()}


def _joined(records):
    return {name: np.concatenate([each[name] for each in records]) for name in records[0]}


def _held_out(measured, group_of_item):
    """Trials in which queries teach with some candidates, and others are judged with the others.

    group_of_item: (G,) of a gallery, which is cut as its images are; None for classes, of which each half teaches the
    other.
    """
    parts = measured.parts
    if group_of_item is None and parts[0].side.gallery < LEAST_CLASSES:
        return []
    trials = []
    for fold in measured.folds:
        if group_of_item is None:
            label = np.concatenate([part.side.item for part in parts])
            first = calibration.halves(np.arange(parts[0].side.gallery))
            cuts = [(half, ~half, half[label], ~half[label]) for half in (first, ~first)]
        else:
            taught = np.isin(group_of_item, measured.group[fold.taught_by])
            cuts = [(taught, ~taught, True, True)]
        for taught_with, asked_with, teaches, is_asked in cuts:
            rows = fold.judged & is_asked
            taught = _restricted(parts, fold.taught_by & teaches, taught_with, group_of_item is None)
            asked = _restricted(parts, rows, asked_with, group_of_item is None)
            trials.append(Trial(taught, asked, np.flatnonzero(rows)))
    return trials


def _restricted(parts, chosen, kept, whole):
    """Records of the queries `chosen`, a mask over those of all parts, among the items `kept`, a mask."""
    records, starts = [], np.cumsum([len(part.group) for part in parts])[:-1]
    for part, mask in zip(parts, np.split(chosen, starts), strict=True):
        rows, items = np.flatnonzero(mask), np.flatnonzero(kept)
        query, item = part.matches
        inside = mask[query] & kept[item]
        query, item = (np.cumsum(mask) - 1)[query[inside]], (np.cumsum(kept) - 1)[item[inside]]

        def score(part_rows, part=part, rows=rows, items=items):
            return part.side.score(rows[part_rows])[:, items]

        side = part.side._replace(plain_score=score, gallery=len(items), query=query, item=item, correction=None)
        cut = part._replace(side=side, query=part.query[rows], items=part.items[items], group=part.group[rows])
        if len(rows):
            records.append(_read(cut._replace(true=None), whole))
    return _joined(records)


def _judge(trials, group, names, quiet):
    """Figures of predictors, judged in trials of the queries of a split with these groups (Q,), and arrays (Q,).

    A figure is the mean over the trials, by their queries: what each learned has a scale of its own.
    """
    predicted = {name: np.full(len(group), np.nan) for name in names}
    hit, of_probe = np.full(len(group), np.nan), np.full(len(group), np.nan)
    for trial in trials:
        taught, asked = trial.taught, trial.asked
        hit[trial.rows] = asked["hit"]
        if "probe" in names:
            asked = asked | {"probe": _of_probe(taught, asked)}
            of_probe[trial.rows] = asked["probe"].argmax(axis=1) == asked["label"]
        for name in names:
            predicted[name][trial.rows] = PREDICTORS[name].predict(taught, asked, quiet)
    figures = {"accuracy": float(hit.mean())} | ({"probe_accuracy": float(of_probe.mean())} if "probe" in names else {})
    judged = [(trial.rows, PairedBootstrap(group[trial.rows])) for trial in trials]

    def over_trials(measure):
        """The mean of a measure of rows and the bootstrap of their queries."""
        return np.average([measure(*each) for each in judged], axis=0, weights=[len(rows) for rows, _ in judged])

    statistics = {
        name: over_trials(lambda rows, drawn, v=values: drawn.auroc(-v[rows], hit[rows]))
        for name, values in predicted.items()
    }
    figures["correctness"] = {
        name: {"labels": PREDICTORS[name].labels} | _figures(name, values, hit, over_trials, statistics)
        for name, values in predicted.items()
    }
    return figures, predicted | {"hit": hit}


def _figures(name, predicted, hit, over_trials, statistics):
    """Figures of one predictor; `less`: its AUROC less others', by the same draws. statistics: AUROCs (1 + B,)."""
    statistic, figures = statistics[name], {"less": {}}
    figures |= {"auroc": float(statistic[0]), "interval": interval(statistic[np.isfinite(statistic)])}
    for other in (FREE, *RIVALS):
        if other in statistics and other != name:
            figures["less"][other] = paired_difference(statistic, statistics[other])._asdict()
    figures["fpr95"] = float(over_trials(lambda rows, drawn: false_positive_rates(-predicted[rows], hit[rows])[0]))
    figures["aurc"] = float(over_trials(lambda rows, drawn: selective(-predicted[rows], hit[rows]).aurc))
    if PREDICTORS[name].is_probability:
        error = over_trials(lambda rows, drawn: drawn.calibration_error(predicted[rows], hit[rows]))
        figures |= {"ece": float(error[0]), "ece_interval": interval(error, basic=True)}
        least = 1 / (len(hit) + 2)
        figures["nll"] = calibration.scores_of_chance(predicted.clip(least, 1 - least), hit)["log_score"]
    return figures


def _probabilities(records, scale=1.0):
    """Probabilities (q, C) of classes."""
    return torch.from_numpy(scale * records["logit"].astype(np.float64)).softmax(dim=1).numpy()


def _of_answer(probability, asked):
    """Probability (q,) of CLIP's class."""
    return probability[np.arange(len(probability)), asked["logit"].argmax(axis=1)]


def _temperature(taught, asked, quiet):
    logit = torch.from_numpy(taught["logit"])
    queries = np.arange(len(logit)), taught["label"]
    return _probabilities(asked, calibration.fit_scale(logit.__getitem__, logit.shape[1], *queries) or 1.0).max(axis=1)


def _relative(probabilities, taught, asked, quiet):
    matrix = correctness.relative_matrix(probabilities(taught), taught["hit"])
    return -correctness.relative(probabilities(asked), matrix)


def _logistic(taught, asked, quiet):
    return answering.fit(taught["uncertainties"].astype(np.float64), taught["hit"])(asked["uncertainties"])


def _linear(taught, asked, quiet):
    mean, spread = (getattr(taught["inputs"], name)(axis=0, dtype=np.float64) for name in ("mean", "std"))
    features = [(each["inputs"] - mean) / np.where(spread > 0, spread, 1) for each in (taught, asked)]
    hit, penalties = taught["hit"].astype(int), np.logspace(-5, 0, 6)
    return _regression(features[0], hit, taught["group"], features[1], penalties)[:, 1]


def _vilu(preset, taught, asked, quiet):
    inputs, hit = torch.from_numpy(taught["inputs"]), torch.from_numpy(taught["hit"])
    model = vilu.fit(inputs, hit, preset, taught["group"], quiet)
    with torch.inference_mode():
        return model(torch.from_numpy(asked["inputs"])).sigmoid().double().numpy()


def _icpe(preset, taught, asked, quiet):
    classes = taught["logit"].shape[1]
    gaussian = icpe.class_probability(taught["image"], taught["label"], asked["image"], classes, preset)
    return (_of_answer(_probabilities(asked), asked) + _of_answer(gaussian, asked)) / 2


def _of_probe(taught, asked):
    """Probabilities (q, C) of classes by a linear probe of unit embeddings."""
    dim, classes = (taught["inputs"].shape[1] - 2) // 3, taught["logit"].shape[1]
    image = taught["inputs"][:, :dim], asked["inputs"][:, :dim]
    return _regression(image[0], taught["label"], taught["group"], image[1], np.logspace(-2, 4, 7), classes)


def _regression(taught, label, group, asked, penalties, classes=2):
    """Probabilities (q, C) by logistic regression of features (T, F), with the penalty of least cross-validated loss.

    Queries of one group (T,) are held out together.
    """
    from sklearn.linear_model import LogisticRegression  # only here: it takes a second to import

    def probability(rows, features, penalty):
        result = np.zeros((len(features), classes))
        if np.ptp(label[rows]) == 0:
            result[:, label[rows][0]] = 1
            return result
        model = LogisticRegression(C=penalty, max_iter=1000).fit(taught[rows], label[rows])
        result[:, model.classes_] = model.predict_proba(features)
        return result

    _, number = np.unique(group, return_inverse=True)
    fold = np.random.default_rng(0).permutation(number.max() + 1)[number] % FOLDS
    least, losses = 1 / (len(label) + 2), []
    for penalty in penalties:
        surprise = np.empty(len(label))
        for out in (fold == each for each in np.unique(fold)):
            stated = probability(~out, taught[out], penalty)[np.arange(out.sum()), label[out]]
            surprise[out] = -np.log(stated.clip(least))
        losses.append(surprise.mean())
    return probability(np.full(len(label), True), asked, penalties[int(np.argmin(losses))])


PREDICTORS = {
    FREE: Predictor("none", True, lambda taught, asked, quiet: asked["ranks"][:, 0]),
    "doctor": Predictor("none", False, lambda taught, asked, quiet: -asked["doctor"]),
    "temperature": Predictor("classes", True, _temperature, "classes"),
    "rel-u": Predictor("right or wrong", False, partial(_relative, _probabilities), "seen classes"),
    "rel-u, ranks": Predictor("right or wrong", False, partial(_relative, lambda records: records["ranks"])),
    "logistic": Predictor("right or wrong", True, _logistic),
    "linear": Predictor("right or wrong", True, _linear),
    "vilu": Predictor("right or wrong", True, partial(_vilu, "default")),
    "vilu, official": Predictor("right or wrong", True, partial(_vilu, "official")),
    "icpe": Predictor("classes", True, partial(_icpe, "default"), "seen classes"),
    "icpe, official": Predictor("classes", True, partial(_icpe, "official"), "seen classes"),
    "probe": Predictor("classes", True, lambda taught, asked, quiet: _of_answer(asked["probe"], asked), "seen classes"),
}  # fmt: skip
