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
PROBE = slice(0, 8)  # rows that are adapted in every search, to learn the form of the score


class Gallery:
    """One side, `image` or `text`, of memory-mapped pairs, which queries of the other side are scored against.

    score: `log_likelihood` or `similarity`. A score that follows from a cosine and terms of each item, see `PairScore`,
    needs no adapted item once its terms are known.
    """

    def __init__(self, adaptor, pairs, side, score, device):
        self.adaptor, self.side, self.score, self.device = adaptor, side, score, device
        self.embeddings = pairs.fed(side, adaptor.pooled)
        self.blocks = [slice(start, start + BLOCK) for start in range(0, len(self.embeddings), BLOCK)]

    def frozen(self, rows):
        """Frozen embeddings (n, D) of a slice of rows."""
        return torch.as_tensor(np.array(self.embeddings[rows])).to(self.device).float()

    @torch.inference_mode()
    def adapted(self, frozen):
        adapt = self.adaptor.adapt_image if self.side == "image" else self.adaptor.adapt_text
        return adapt(frozen)

    def _in_order(self, queries, items):
        return (items, queries) if self.side == "image" else (queries, items)

    def form(self, queries, frozen):
        """The scores of some frozen items as a PairScore; None where they are no such function of a cosine."""
        image, text = self._in_order(queries, self.adapted(frozen))
        if self.score == "log_likelihood" and (form := self.adaptor.pair_score(image, text)) is not None:
            return form
        changed = ["similarity", *(["log_likelihood"] if self.score == "log_likelihood" else [])]
        if any(getattr(type(self.adaptor), name) is not getattr(Adaptor, name) for name in changed):
            return None
        return PairScore(*(F.normalize(each.mean, dim=-1) for each in (image, text)))

    def terms_of(self, queries, frozen):
        """The terms (n,) of some frozen items, {name: (n,)}, empty where all have the same; None where none suffice.

        That is where the score is no function of a cosine, and where the method moves or computes embeddings.
        """
        form = None if self.adaptor.pooled else self.form(queries, frozen)
        if form is None or not torch.allclose(getattr(form, self.side), F.normalize(frozen, dim=-1), atol=1e-6):
            return None
        names = ("row", "row_parameter") if self.side == "image" else ("slope", "column", "column_parameter")
        values = {name: getattr(form, name) for name in names}
        return {name: value.cpu().numpy() for name, value in values.items() if getattr(value, "ndim", 0)}

    @torch.inference_mode()
    def terms(self, queries, kept=None, quiet=None):
        """As `terms_of`, of every row; queries: any.

        kept: a file that keeps them, and what it must be of, so that no later search adapts more than PROBE items.
        """
        first = self.terms_of(queries, self.frozen(PROBE))
        if first is None:
            return None
        if kept and (terms := _read_terms(*kept, len(self.embeddings), first)) is not None:
            return terms
        parts = []
        for rows in tqdm(self.blocks, unit="block", desc="gallery", disable=quiet):
            parts.append(self.terms_of(queries, self.frozen(rows)))
            if parts[-1] is None:
                return None
        terms = {name: np.concatenate([part[name] for part in parts]) for name in first}
        if kept and all(np.isfinite(values).all() for values in terms.values()):
            with contextlib.suppress(OSError, UserError):  # a full disk, or a read-only folder: all is computed again
                save_arrays(kept[0], of=np.array(kept[1]), **terms)
        return {name: torch.from_numpy(values) for name, values in terms.items()}

    @torch.inference_mode()
    def scores(self, queries, kept=None):
        """Scores (Q, G) of adapted queries; kept: see `terms`. Raises FloatingPointError for one that is not finite."""
        compute = {"log_likelihood": self.adaptor.log_likelihood, "similarity": self.adaptor.similarity}[self.score]
        terms, parts = self.terms(queries, kept), []
        form = None if terms is None else self.form(queries, self.frozen(PROBE))
        silent = None if terms is None else True  # a product alone takes no second
        for rows in tqdm(self.blocks, unit="block", desc="gallery", disable=silent):
            if terms is None:
                scores = compute(*self._in_order(queries, self.adapted(self.frozen(rows))))
            else:
                of_block = {name: values[rows].to(self.device) for name, values in terms.items()}
                unit = F.normalize(self.frozen(rows), dim=-1)
                scores = replace(form, **{self.side: unit}, **of_block).dense()
            parts.append(scores.T if self.side == "image" else scores)
        scores = torch.cat(parts, dim=1).cpu()
        if not torch.isfinite(scores).all():
            raise FloatingPointError("a score is not finite")
        return scores


def kept(config, evaluated_on, side, score, weights, pairs):
    """The file in which `Gallery.terms` keeps a side of a gallery, and what it is of; weights: their hash."""
    path = config.result(evaluated_on, f"gallery-{side}-{score}").with_suffix(".npz")
    return path, f"{weights} {pairs.meta['fingerprint']}"


def keep(adaptor, pairs, score, device, config, evaluated_on, weights, quiet):
    """Keep the terms of both sides, so that the first search is as fast as any other."""
    image, text = (Gallery(adaptor, pairs, side, score, device) for side in ("image", "text"))
    for gallery, other in ((image, text), (text, image)):
        place = kept(config, evaluated_on, gallery.side, score, weights, pairs)
        gallery.terms(other.adapted(other.frozen(PROBE)), place, quiet or None)


def _read_terms(path, of, count, first):
    """Terms that a file keeps, {name: (G,)}; None where there is none of these weights, this gallery and this code.

    first: the terms of the first items, computed anew: code that has changed since gives others.
    """
    try:
        with np.load(path) as file:
            terms = dict(file)
        if str(terms.pop("of")) != of or any(values.shape != (count,) for values in terms.values()):
            return None
        if terms.keys() != first.keys() or not all(
            np.allclose(terms[name][PROBE], first[name], rtol=1e-4, atol=1e-6) for name in first
        ):
            return None
        return {name: torch.from_numpy(values) for name, values in terms.items()}
    except UNREADABLE:
        return None


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
