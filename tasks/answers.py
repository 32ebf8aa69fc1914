"""Answers of a gallery to new queries: the best items, how likely the first is right, and a set that holds a right one.

What turns scores into these was learned by the tasks `conformal` and `unanswerable`, whose results hold it.
"""

import re

import numpy as np
import torch

from metrics import answering, conformal
from metrics.matching import shifted
from models.base import Embedding

KIND = "lac"  # of the sets: the smallest on average; a threshold for each level makes up for its uneven coverage
BLOCK = 8192  # rows of the gallery that are in memory at once


@torch.inference_mode()
def gallery_scores(adaptor, pairs, kind, queries, score, device):
    """Scores (Q, G) of adapted queries of a kind, `image` or `text`, against the other side of memory-mapped pairs."""
    other = "text" if kind == "image" else "image"
    adapt = adaptor.adapt_text if kind == "image" else adaptor.adapt_image
    compute = {"log_likelihood": adaptor.log_likelihood, "similarity": adaptor.similarity}[score]
    rows, parts = pairs.fed(other, adaptor.pooled), []
    for start in range(0, len(rows), BLOCK):
        block = adapt(torch.as_tensor(np.array(rows[start : start + BLOCK])).to(device).float())
        parts.append(compute(queries, block) if kind == "image" else compute(block, queries).T)
    scores = torch.cat(parts, dim=1).cpu()
    if not torch.isfinite(scores).all():
        raise FloatingPointError("a score is not finite")
    return scores


def answers(scores, query: Embedding, sets, rejection, alpha, share, best=5):
    """What is to be said of Q queries by their scores (Q, G): list of dicts.

    `best`: the items of the highest scores, with their posterior probabilities. `right`: the probability that the first
    is right. `nothing_fits`: the probability that no item is. `set`: the fewest items that hold a right one in 1 -
    alpha of queries that have one; `set_size` counts them. sets, rejection: of a direction in the results of the tasks
    `conformal` and `unanswerable`. share: of queries without an answer.
    """
    scale = sets["fitted"]["scale"]
    values, _ = answering.uncertainties(scores, scale)
    features = np.stack([values[name].double().numpy() for name in rejection["fitted"]["features"]], axis=-1)
    models = {name: answering.Logistic(**rejection["fitted"][name]) for name in ("answer", "right")}
    answered = shifted(models["answer"](features), 1 - rejection["fitted"]["prior"], 1 - share)
    right = answered * models["right"](features)
    nonconformity, item = conformal.nonconformity(scores, scale)
    limit = _limits(values, query, sets["fitted"], alpha)
    size = torch.searchsorted(nonconformity[KIND], limit[:, None], right=True)[:, 0]
    probability = 1 - nonconformity["lac"]
    return [
        {
            "best": [
                {"item": int(number), "score": float(scores[row, number]), "probability": float(share_of)}
                for number, share_of in zip(item[row, :best], probability[row, :best])
            ],
            "right": float(right[row]), "nothing_fits": float(1 - answered[row]),
            "set_size": int(size[row]), "set": item[row, : int(size[row])].tolist(),
        }
        for row in range(len(scores))
    ]  # fmt: skip


def unseen_words(texts, captions):
    """Words of each text that occur in no caption, whatever their case: a list for each text, in its order."""
    seen = {word for caption in captions for word in _words(caption)}
    return [[word for word in dict.fromkeys(_words(text)) if word not in seen] for text in texts]


def _words(text):
    return re.findall(r"\w+", text.casefold())


def _limits(values, query, fitted, alpha):
    """Thresholds (Q,): of the level of each query's uncertainty, or of all where that cannot be known before."""
    limits = fitted["thresholds"][KIND][f"{alpha:g}"]
    by = {"query": query.uncertainty, "entropy": values["entropy"]}.get(fitted["levels_by"])
    if by is None:
        limits = [limits["all"]] * len(query.mean)
    else:
        level = np.searchsorted(fitted["edges"], by.cpu().double().numpy(), side="right")
        limits = [limits["levels"][number] for number in level]
    return torch.tensor([torch.inf if limit is None else limit for limit in limits], dtype=torch.float64)
