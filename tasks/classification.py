"""Zero-shot classification: images answered by the averaged prompts of their classes."""

import numpy as np
import torch

from metrics import calibration, retrieval, summary, uncertainty
from models.backbones.last_map import cut
from models.base import adapt_all, cosine
from tasks import HELD, Said, counted, doubts_of, examples, follow, judge_side, posterior_scales, score_bar


def class_embeddings(pairs, pooled=False, block=8192):
    """Average the prompts of every class, (C, D): unit vectors, as is usual (Radford et al., arXiv 2103.00020, 3.1.4).

    The average is as long as the prompts are on average, for methods that read something into the length. pooled: what
    the last map was given is averaged with the same weights, (C, D + P), so that the map still takes it there.
    """
    fed, owner = pairs.fed("text", pooled), torch.from_numpy(np.array(pairs.class_of_text))
    total, length = torch.zeros(len(pairs.classes), fed.shape[1]), torch.zeros(len(pairs.classes), 1)
    for start in range(0, len(fed), block):
        text, own = torch.from_numpy(np.array(fed[start : start + block])).float(), owner[start : start + block]
        of_text = cut(text, pairs.dim)[0].norm(dim=-1, keepdim=True)
        total.index_add_(0, own, text / of_text)
        length.index_add_(0, own, of_text)
    of_total = cut(total, pairs.dim)[0].norm(dim=-1, keepdim=True).clamp_min(1e-12)  # opposite prompts
    return (total / of_total * length / owner.bincount()[:, None]).numpy()


def evaluate(adaptor, pairs, choices, device):
    """Classify images; returns the figures, and per-image arrays for the .npz."""
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", adaptor.pooled), device)
    prompt = adapt_all(adaptor.adapt_text, class_embeddings(pairs, adaptor.pooled), device)
    scales, row, label = posterior_scales(adaptor, pairs), np.arange(len(pairs.label)), pairs.label
    human = None if pairs.human is None else uncertainty.label_entropy(pairs.human)
    doubts = doubts_of(image), doubts_of(prompt)
    by = follow(choices.levels_by, *doubts)
    result, arrays = {}, {} if human is None else {"human_entropy": human}
    count = len(label) * len(pairs.classes)
    bar = score_bar(count, 1 if count <= HELD else 3, choices)
    computes = {"log_likelihood": adaptor.classify, "similarity": adaptor.similarity}

    def scored(compute, image=image):
        """A function of rows of images to their scores, which are held if they are few."""

        def score(rows):
            return compute(image.rows(rows), prompt)

        if len(image.mean) * len(pairs.classes) > HELD:
            return score
        return retrieval.whole(score, len(image.mean), len(pairs.classes)).__getitem__

    def judged_by(score, scale):
        return calibration.forecast(score, len(pairs.classes), row, label, scale), [scale]

    val = choices.val
    if val is not None:
        held_out = adapt_all(adaptor.adapt_image, val.fed("image", adaptor.pooled), device)
        about_val = len(val.classes), np.arange(len(val.label)), val.label

    for name in choices.scores:
        score = scored(counted(computes[name], bar))
        ranking = retrieval.rank(score, len(pairs.classes), row, label, scales[name])
        side, doubt = judge_side(ranking, *doubts, choices, by, truth=human)
        found = summary.forecasts(score, len(pairs.classes), row, label, scales[name], row)
        if val is not None:
            fitted = calibration.fit_scale(scored(computes[name], held_out), *about_val)
            found |= {} if fitted is None else {"validation": judged_by(score, fitted)}
        with torch.inference_mode():
            matched = adaptor.matched_scale(image, prompt) if name == "log_likelihood" else None
        if matched is not None:
            found["matched"] = judged_by(scored(cosine), matched)
        side["calibration"] = {
            entry: summary.of_forecast(*pair) | summary.of_answers(pair[0]) for entry, pair in found.items()
        }
        if "validation" in found:
            side["calibration"]["validation"]["split"] = val.folder.name
        figures = {"score": name, "posterior_scale": scales[name], "image_to_class": side}
        if result:
            result["other_score"] = figures
            continue
        own = [pairs.classes[number] for number in label]
        about = Said(pairs.items["image"], pairs.classes, own, lambda image, number: bool(label[image] == number))
        side["examples"] = examples(doubt, score, about)
        result = figures
        arrays |= {f"image_to_class_{field}": value for field, value in ranking._asdict().items()}
        arrays |= {"image_to_class_hit": retrieval.recall_at(ranking, 1), "image_to_class_uncertainty": doubt}
        arrays |= {
            f"image_to_class_{entry}_{field}": getattr(of_entry, field)
            for entry, (of_entry, _) in found.items()
            for field in ("nll", "confidence", "hit")
        }
    bar.close()
    return result, arrays
