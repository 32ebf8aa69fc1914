"""Correctness: is a classifier's answer right? Predictors that learn it from labels, beside those that need none.

The rival of every learned predictor is a linear probe: it has seen the same images, and its probability of CLIP's
answer is a prediction too.
"""

import numpy as np
import torch

from metrics import calibration, correctness
from metrics.comparison import PairedBootstrap, interval
from metrics.score_tiles import all_scores
from metrics.uncertainty import auroc, false_positive_rates, selective
from models import vilu
from tasks import decisions
from utils.errors import UserError

LABELS = {  # what each predictor has seen of the images that teach
    "probability": "none", "doctor": "none", "temperature": "classes", "rel-u": "right or wrong",
    "vilu": "right or wrong", "vilu, official": "right or wrong", "probe": "classes",
}  # fmt: skip
PROBABILITIES = ("probability", "temperature", "vilu", "vilu, official", "probe")  # predict that the answer is right


def evaluate(adaptor, pairs, choices, device):
    """Evaluate predictors of right answers; returns the figures, and per-image arrays for the .npz.

    Raises UserError unless the images have classes, and both right and wrong answers teach.
    """
    if pairs.classes is None:
        raise UserError(f"{pairs.folder} has captions and no classes, which --task correctness needs.")
    [measured] = decisions.measured(adaptor, pairs, choices, device, _measure).values()
    splits = [pairs] if choices.val is None else [pairs, choices.val]
    adapted = [decisions.adapt(adaptor, split, device) for split in splits]
    image = torch.cat([each.image.direction for each in adapted]).cpu()
    text, logit = adapted[0].text.direction.cpu(), torch.cat(measured.records)
    label = torch.from_numpy(np.concatenate([np.asarray(split.label) for split in splits]))
    hit = (logit.argmax(dim=1) == label).float()
    predicted = {name: np.full(len(hit), np.nan) for name in LABELS}
    accuracy = np.full(len(hit), np.nan)
    for fold in measured.folds:
        taught = hit[torch.from_numpy(fold.taught_by)]
        if taught.min() == taught.max():
            raise UserError("all answers that teach are right, or all are wrong: name another --val split.")
        rows = torch.from_numpy(fold.judged)
        values, right = _predict(image, text, logit, label, hit, torch.from_numpy(fold.taught_by), rows, choices.quiet)
        for name, each in values.items():
            predicted[name][fold.judged] = each
        accuracy[fold.judged] = right
    judged = len(measured.parts[0].group)
    right, drawn = hit[:judged].double().numpy(), PairedBootstrap(measured.parts[0].group)
    side = measured.facts | {"accuracy": float(right.mean()), "probe_accuracy": float(accuracy[:judged].mean())}
    side["correctness"] = {
        name: _figures(values[:judged], right, drawn, name in PROBABILITIES) | {"labels": LABELS[name]}
        for name, values in predicted.items()
    }
    arrays = {f"image_to_class_{name}": values[:judged] for name, values in predicted.items()}
    return {"score": choices.scores[0], "image_to_class": side}, arrays | {"image_to_class_hit": right}


def _measure(part):
    """Logits (Q, C) of a part."""
    return part.side.scale * all_scores(part.side.score, len(part.group), part.side.gallery).cpu()


def _predict(image, text, logit, label, hit, taught_by, rows, quiet):
    """What every predictor says of the images `rows`, larger = more surely right, and whether the probe is right."""
    from sklearn.linear_model import LogisticRegression  # only here: they take a second to import
    from sklearn.model_selection import GridSearchCV

    probability = logit.double().softmax(dim=1).numpy()
    taught, asked = probability[taught_by], probability[rows]
    answer = logit[rows].argmax(dim=1).numpy()
    scale = calibration.fit_scale(
        lambda part: logit[taught_by][part], logit.shape[1], np.arange(len(taught)), label[taught_by].numpy()
    )
    values = {"probability": asked.max(axis=1), "doctor": -correctness.doctor(asked)}
    values["temperature"] = ((scale or 1.0) * logit[rows].double()).softmax(dim=1).numpy().max(axis=1)
    values["rel-u"] = -correctness.relative(asked, correctness.relative_matrix(taught, hit[taught_by].numpy()))
    for name, preset in (("vilu", "default"), ("vilu, official", "official")):
        model = vilu.fit(image[taught_by], text, logit[taught_by], hit[taught_by], preset, quiet)
        with torch.inference_mode():
            values[name] = model(image[rows], text, logit[rows]).sigmoid().double().numpy()
    penalties = {"C": np.logspace(-2, 4, 7)}
    probe = GridSearchCV(LogisticRegression(max_iter=1000), penalties, scoring="neg_log_loss", cv=3)
    probe.fit(image[taught_by].numpy(), label[taught_by].numpy())
    of_probe = np.zeros_like(asked)
    of_probe[:, probe.classes_] = probe.predict_proba(image[rows].numpy())
    values["probe"] = of_probe[np.arange(len(answer)), answer]
    return values, of_probe.argmax(axis=1) == label[rows].numpy()


def _figures(predicted, right, drawn, is_probability):
    statistic = drawn.auroc(-predicted, right)
    figures = {"auroc": auroc(-predicted, right), "interval": interval(statistic[np.isfinite(statistic)])}
    figures |= {"fpr95": false_positive_rates(-predicted, right)[0], "aurc": selective(-predicted, right).aurc}
    if is_probability:
        error = drawn.calibration_error(predicted, right)
        figures |= {"ece": float(error[0]), "ece_interval": interval(error, basic=True)}
        least = 1 / (len(right) + 2)
        figures["nll"] = calibration.scores_of_chance(predicted.clip(least, 1 - least), right)["log_score"]
    return figures
