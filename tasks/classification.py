"""Zero-shot classification: the answer to an image is the class whose averaged prompts score best."""

import numpy as np
import torch

from metrics import calibration, retrieval, summary
from metrics.comparison import PairedBootstrap
from metrics.hubs import constants
from metrics.score_tiles import all_scores
from metrics.uncertainty import label_entropy
from models.backbones.last_map import cut
from models.base import adapt_all, cosine
from tasks import (
    STORED_SCORES,
    ExampleNames,
    arrays_of,
    choose_levels_by,
    evaluate_side,
    examples,
    lengths,
    posterior_scales,
    progress_bar,
    uncertainty_of,
    with_progress,
    without_correction,
)


def class_embeddings(pairs, pooled=False, block=8192):
    """Average the normalized prompts of each class, (C, D), as is usual (Radford et al., arXiv 2103.00020, 3.1.4).

    The average gets the mean length of the prompts, for methods that read the length. pooled: the input of the text
    tower's last map is averaged with the same weights, (C, D + P), so that the map of the average is the average.
    """
    inputs, label = pairs.fed("text", pooled), torch.from_numpy(np.array(pairs.class_of_text))
    total, length = torch.zeros(len(pairs.classes), inputs.shape[1]), torch.zeros(len(pairs.classes), 1)
    for start in range(0, len(inputs), block):
        text = torch.from_numpy(np.array(inputs[start : start + block])).float()
        norm = cut(text, pairs.dim)[0].norm(dim=-1, keepdim=True)
        total.index_add_(0, label[start : start + block], text / norm)
        length.index_add_(0, label[start : start + block], norm)
    norm = cut(total, pairs.dim)[0].norm(dim=-1, keepdim=True).clamp_min(1e-12)  # opposite prompts cancel out
    return (total / norm * length / label.bincount()[:, None]).numpy()


def evaluate(adaptor, pairs, choices, device):
    """Evaluate classification; returns the figures, and per-image arrays for the .npz."""
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", adaptor.pooled), device)
    prompt = adapt_all(adaptor.adapt_text, class_embeddings(pairs, adaptor.pooled), device)
    scales, row, label = posterior_scales(adaptor, pairs), np.arange(len(pairs.label)), pairs.label
    uncertainties = uncertainty_of(image), uncertainty_of(prompt)
    levels_by = choose_levels_by(choices.levels_by, *uncertainties)
    classes, count = len(pairs.classes), len(label) * len(pairs.classes)
    bar = progress_bar(count, 1 if count <= STORED_SCORES else 3, choices)
    computes = {"log_likelihood": adaptor.classify, "similarity": adaptor.similarity}
    result, arrays, human_entropy = {}, {}, None
    if pairs.human is not None:
        arrays["human_entropy"] = human_entropy = label_entropy(pairs.human)

    def score_of(compute, image=image):
        """Function from rows of images to their scores, which are computed once if they are few."""

        def score(rows):
            return compute(image.rows(rows), prompt)

        if len(image.mean) * classes > STORED_SCORES:
            return score
        scores = all_scores(score, len(image.mean), classes)
        return lambda rows: scores[rows]

    def forecast_with(scale, score):
        return calibration.forecast(score, classes, row, label, scale), [scale]

    val = choices.val
    if val is not None:
        val_image = adapt_all(adaptor.adapt_image, val.fed("image", adaptor.pooled), device)
        val_targets = len(val.classes), np.arange(len(val.label)), val.label

    subtracted = {}  # from the scores of each class
    if choices.hubs:
        bank, correction = choices.bank, choices.hubs["image_to_class"]
        bank_image = adapt_all(adaptor.adapt_image, bank.fed("image", adaptor.pooled), device)
        for name in choices.scores:
            subtracted[name] = constants(
                lambda rows, c=computes[name]: c(bank_image, prompt.rows(rows)).T,
                classes, len(bank.image), correction, scales[name],
            )  # fmt: skip

    def less(score, name):
        """The same scores with the correction of their kind."""
        return (lambda rows: score(rows) - subtracted[name]) if subtracted else score

    drawn, free = PairedBootstrap(row), {"length": lengths(pairs.image)}
    for name in choices.scores:
        plain = score_of(with_progress(computes[name], bar))
        score, correction = less(plain, name), (subtracted[name], scales[name]) if subtracted else None
        judged = summary.judge(plain, classes, row, label, scales[name], row, correction=correction)
        ranking, forecasts = judged.ranking, judged.forecasts
        side, uncertainty = evaluate_side(ranking, *uncertainties, choices, levels_by, drawn, free, truth=human_entropy)
        if val is not None:
            fitted = calibration.fit_scale(less(score_of(computes[name], val_image), name), *val_targets)
            if fitted is not None:
                forecasts["validation"] = forecast_with(fitted, score)
        if name == "log_likelihood":
            with torch.inference_mode():
                matched = adaptor.matched_scale(image, prompt)
            if matched is not None:
                forecasts["matched"] = forecast_with(matched, score_of(cosine))
        side["calibration"] = {
            entry: summary.of_forecast(forecast, scale, drawn) | summary.of_answers(forecast)
            for entry, (forecast, scale) in forecasts.items()
        }
        if "validation" in forecasts:
            side["calibration"]["validation"]["split"] = val.folder.name
        figures = {"score": name, "posterior_scale": scales[name], "image_to_class": side}
        if subtracted:
            part = without_correction(*judged.uncorrected, drawn, retrieval.recall_at(ranking, 1))
            figures["uncorrected"] = {"image_to_class": part}
        if result:
            result["other_score"] = figures
            continue
        result = figures
        targets = [pairs.classes[number] for number in label]
        names = ExampleNames(
            pairs.items["image"], pairs.classes, targets, lambda image, number: bool(label[image] == number)
        )
        side["examples"] = examples(uncertainty, score, names)
        arrays |= arrays_of("image_to_class", ranking, uncertainty)
        for entry, (forecast, _) in forecasts.items():
            for field in ("nll", "confidence", "hit"):
                arrays[f"image_to_class_{entry}_{field}"] = getattr(forecast, field)
    bar.close()
    return result, arrays
