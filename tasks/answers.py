"""Answers of a gallery to new queries: the best items, how likely the first is right, and a set that holds a right one.

What turns scores into these was learned by the tasks `conformal` and `unanswerable`, whose results hold it.
"""

import contextlib
import re
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from metrics import answering, conformal
from metrics.matching import shifted
from models.base import Adaptor, Embedding
from models.pair_loss import PairScore
from utils.errors import UserError
from utils.files import UNREADABLE, save_arrays

KIND = "lac"  # of the sets: the smallest on average; a threshold for each level makes up for its uneven coverage
BLOCK = 8192  # rows of the gallery that are in memory at once


@torch.inference_mode()
def gallery_scores(adaptor, pairs, kind, queries, score, device, kept=None):
    """Scores (Q, G) of adapted queries of a kind, `image` or `text`, against the other side of memory-mapped pairs.

    kept: a file (and what it must be of) in which a score that follows from a cosine and terms of each item keeps these
    terms, (G,), so that the next search adapts one item; see `PairScore`. Raises FloatingPointError for a score that is
    not finite.
    """
    other = "text" if kind == "image" else "image"
    adapt = adaptor.adapt_text if kind == "image" else adaptor.adapt_image
    compute = {"log_likelihood": adaptor.log_likelihood, "similarity": adaptor.similarity}[score]
    rows, parts = pairs.fed(other, adaptor.pooled), []

    def frozen(start):
        return torch.as_tensor(np.array(rows[start : start + BLOCK])).to(device).float()

    def in_order(items):
        return (queries, items) if kind == "image" else (items, queries)

    block = frozen(0)[:1]
    items = adapt(block)
    form = _pair_score(adaptor, score, *in_order(items))
    first = None if form is None else _terms(form, other, block, items)
    terms = None if first is None or kept is None else _read_terms(*kept, len(rows), first)
    computed = []
    silent = None if terms is None else True  # a product alone takes no second
    for start in tqdm(range(0, len(rows), BLOCK), unit="block", desc="gallery", disable=silent):
        block = frozen(start)
        if terms is None:
            items = adapt(block)
            each = None if form is None else _pair_score(adaptor, score, *in_order(items))
            computed.append(each and _terms(each, other, block, items))
        else:
            of_block = {name: values[start : start + BLOCK].to(device) for name, values in terms.items()}
            each = replace(form, **{other: F.normalize(block, dim=-1)}, **of_block)
        scores = compute(*in_order(items)) if each is None else each.dense()
        parts.append(scores if kind == "image" else scores.T)
    scores = torch.cat(parts, dim=1).cpu()
    if not torch.isfinite(scores).all():
        raise FloatingPointError("a score is not finite")
    if kept and computed and all(computed):
        _write_terms(*kept, {name: np.concatenate([each[name] for each in computed]) for name in computed[0]})
    return scores


def _pair_score(adaptor, score, image, text):
    """A score as a PairScore; None where it is no such function of a cosine."""
    if score == "log_likelihood" and (form := adaptor.pair_score(image, text)) is not None:
        return form
    changed = ["similarity", *(["log_likelihood"] if score == "log_likelihood" else [])]
    if any(getattr(type(adaptor), name) is not getattr(Adaptor, name) for name in changed):
        return None
    return PairScore(*(F.normalize(each.mean, dim=-1) for each in (image, text)))


def _terms(form, side, block, items):
    """The terms of the items of a `side`, {name: (n,)}; None where they are not needed, or do not suffice.

    That is where a method knows of an item only its embedding, and where it moves that.
    """
    unit = getattr(form, side)
    if items.uncertainty is None or not torch.allclose(unit, F.normalize(block, dim=-1), atol=1e-6):
        return None
    names = ("row", "row_parameter") if side == "image" else ("slope", "column", "column_parameter")
    values = {
        name: torch.as_tensor(getattr(form, name), dtype=unit.dtype)
        for name in names
        if getattr(form, name) is not None
    }
    return {name: value.expand(len(unit)).cpu().numpy() for name, value in values.items()}


def _read_terms(path, of, count, first):
    """Terms that a file keeps, {name: (G,)}; None where there is none of these weights, this gallery and this code.

    first: the terms of the first item, computed anew: code that has changed since gives others.
    """
    try:
        with np.load(path) as file:
            terms = dict(file)
        if str(terms.pop("of")) != of or any(values.shape != (count,) for values in terms.values()):
            return None
        if terms.keys() != first.keys() or not all(
            np.allclose(terms[name][:1], first[name], rtol=1e-4, atol=1e-6) for name in first
        ):
            return None
        return {name: torch.from_numpy(values) for name, values in terms.items()}
    except UNREADABLE:
        return None


def _write_terms(path, of, terms):
    with contextlib.suppress(OSError, UserError):  # a full disk, or a folder to read: the next search takes as long
        save_arrays(path, of=np.array(of), **terms)


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
    """Words of each text that occur in no caption, whatever their case: a list for each text, in its order.

    A text without a word, such as "?!", is itself one.
    """
    seen = {word for caption in captions for word in _words(caption)}
    return [[word for word in dict.fromkeys(_words(text)) if word not in seen] for text in texts]


def _words(text):
    return re.findall(r"\w+", text.casefold()) or [text.strip()]


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
