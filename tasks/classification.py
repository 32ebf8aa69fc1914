"""Zero-shot classification: images answered by the averaged prompts of their classes."""

import numpy as np
import torch
import torch.nn.functional as F

from metrics import retrieval, summary, uncertainty
from models.base import adapt_all
from tasks import Said, counted, doubts_of, examples, follow, judge_side, posterior_scales, score_bar


def class_embeddings(pairs):
    """Average the prompts of every class, (C, D): unit vectors, as is usual (Radford et al., arXiv 2103.00020, 3.1.4).

    The average is as long as the prompts are on average, for methods that read something into the length.
    """
    text, owner = torch.from_numpy(np.array(pairs.text)).float(), torch.from_numpy(np.array(pairs.class_of_text))
    length = text.norm(dim=-1, keepdim=True)
    total = torch.zeros(len(pairs.classes), text.shape[1] + 1)
    total.index_add_(0, owner, torch.cat([text / length, length], dim=-1))
    return (F.normalize(total[:, :-1], dim=-1) * total[:, -1:] / owner.bincount()[:, None]).numpy()


def evaluate(adaptor, pairs, choices, device):
    """Classify images; returns the figures, and per-image arrays for the .npz."""
    image = adapt_all(adaptor.adapt_image, pairs.image, device)
    prompt = adapt_all(adaptor.adapt_text, class_embeddings(pairs), device)
    scales, row, label = posterior_scales(adaptor, pairs), np.arange(len(pairs.label)), pairs.label
    human = None if pairs.human is None else uncertainty.label_entropy(pairs.human)
    doubts = doubts_of(image), doubts_of(prompt)
    by = follow(choices.levels_by, *doubts)
    result, arrays = {}, {} if human is None else {"human_entropy": human}
    bar = score_bar(len(label) * len(pairs.classes), 3, choices)

    def scored(compute):
        return lambda rows: compute(image.rows(rows), prompt)

    for name in choices.scores:
        score = scored(counted(getattr(adaptor, name), bar))
        ranking = retrieval.rank(score, len(pairs.classes), row, label, scales[name])
        side, doubt = judge_side(ranking, *doubts, choices, by, truth=human)
        side["calibration"] = summary.of_probabilities(score, len(pairs.classes), row, label, scales[name], row)
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
    bar.close()
    return result, arrays
