"""What an adaptor is evaluated on: one file per task, each with `evaluate(adaptor, pairs, choices, device)`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from datasets.embeddings import Pairs
from metrics import summary
from utils.errors import UserError

SCORES = ("log_likelihood", "similarity")
FOLLOWED = ("query", "retrieved", "sum")
HELD = 2**24  # scores, 64 MB, that are computed once; more are computed anew for every metric
EXAMPLES, SHOWN = 10, 5  # most and least certain queries kept for the report, and best answers to each


@dataclass(frozen=True)
class Choices:
    """What the user of eval.py chooses."""

    scores: list[str]  # one or both; the first ranks, the other's figures are given beside it
    levels: int  # of uncertainty
    levels_by: str | None = None  # of images: one of FOLLOWED; none: their own uncertainty, else the answer's
    drop_remainder: bool = False  # levels of one size, as the public AsymVLM code has them
    quiet: bool = False  # no progress bar
    val: Pairs | None = None  # images of the same classes, on all of which a temperature is fitted


def counted(compute, bar):
    """A function of scores that tells a progress bar how many it has given."""

    def score(*adapted):
        found = compute(*adapted)
        bar.update(found.numel())
        return found

    return score


def score_bar(count, passes, choices):
    """A progress bar over `count` scores that are computed in so many passes by each score that is asked for."""
    total = count * passes * len(choices.scores)
    return tqdm(total=total, unit="score", unit_scale=True, desc="evaluate", disable=choices.quiet or None)


def posterior_scales(adaptor, pairs):
    """What makes logits of each score."""
    return {"similarity": pairs.meta["logit_scale"], "log_likelihood": adaptor.posterior_scale}


def doubts_of(embedding):
    """The uncertainty of adapted embeddings, (N,) or None; raises FloatingPointError where one is not finite."""
    if embedding.uncertainty is None:
        return None
    doubts = embedding.uncertainty.cpu().double().numpy()
    if not np.isfinite(doubts).all():
        raise FloatingPointError("an uncertainty is not finite")
    return doubts


def follow(levels_by, query, answer):
    """Say which of FOLLOWED levels follow: what is asked for, or the first there is, None where there is neither.

    query, answer: the adaptor's uncertainties, or None. Raises UserError for one that the adaptor lacks.
    """
    has = {"query": query is not None, "retrieved": answer is not None}
    has = [*(name for name, there in has.items() if there), *(["sum"] if all(has.values()) else [])]
    if levels_by not in (None, *has):
        said = ", ".join(has) or "none at all"
        raise UserError(
            f"--levels_by {levels_by} wants an uncertainty that the method lacks for images; it has {said}."
        )
    return levels_by or next(iter(has), None)


def judge_side(ranking, query, answer, choices, by, limit=None, truth=None, group=None):
    """Figures of ranked queries, and the uncertainty (Q,) that stands for them.

    query (Q,), answer (G,): the adaptor's uncertainties, or None. by: which of FOLLOWED stands, as `follow` gives it;
    for None it is the entropy over the gallery. limit, truth, group: as in metrics/summary.py.
    """
    doubts = {"query": query, "retrieved": None if answer is None else answer[ranking.top]}
    doubts = {name: doubt for name, doubt in doubts.items() if doubt is not None}
    doubts |= {"sum": sum(doubts.values())} if len(doubts) == 2 else {}
    every = doubts | summary.gallery_aware(ranking)
    figures = summary.of_ranking(ranking, limit) | {"levels_by": by}
    figures["uncertainty"] = {
        name: {"family": "query-only" if name == "query" else "gallery-aware"}
        | summary.of_uncertainty(doubt, ranking, choices.levels, choices.drop_remainder, limit, truth, group)
        for name, doubt in every.items()
    }
    return figures, every[by or "entropy"]


class Said(NamedTuple):
    """How the report names queries and answers, and how the rows of a query and an answer belong together."""

    queries: Sequence[str]  # (Q,)
    answers: Sequence[str]  # (G,)
    own: Sequence[str]  # (Q,) an answer that each query belongs to
    right: Callable[[int, int], bool]  # whether the answer is the query's own
    true: Callable[[int, int], bool] | None = None  # whether it is true of it all the same, where that is known


@torch.inference_mode()
def examples(doubt, score, said):
    """The queries of least and of most uncertainty (Q,), no wording twice and none in both, with their best answers.

    score: function from rows of queries to their scores (q, G).
    """
    distinct = {}
    for row in np.argsort(doubt, kind="stable").tolist():
        distinct.setdefault(said.queries[row], row)
    order = list(distinct.values())
    count = min(EXAMPLES, len(order) // 2)

    def shown(rows):
        for row, scores in zip(rows, score(np.array(rows)), strict=True):
            value, item = scores.topk(min(SHOWN, len(scores)))
            best = [
                {"answer": said.answers[i], "score": v, "right": said.right(row, i)}
                | ({"true": said.true(row, i)} if said.true else {})
                for v, i in zip(value.tolist(), item.tolist(), strict=True)
            ]
            yield {"query": said.queries[row], "own": said.own[row], "uncertainty": float(doubt[row]), "best": best}

    return {"most_certain": [*shown(order[:count])], "least_certain": [*shown(order[::-1][:count])]}
