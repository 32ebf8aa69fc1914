"""Tasks that an adaptor is evaluated on: one file per task, each with `evaluate(adaptor, pairs, choices, device)`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from datasets.bank import Bank
from datasets.embeddings import Pairs
from metrics import calibration, summary
from metrics.comparison import interval
from metrics.retrieval import recall_at
from metrics.score_tiles import Columns, tiles
from metrics.uncertainty import auroc, selective
from utils.errors import UserError

STORED_SCORES = 2**27  # scores, 512 MB, that are computed once and stored; more are computed anew for every pass
PAIRS = 2**13  # of a query and an answer, that `of_candidates` compares at once
EXAMPLES, BEST_ANSWERS = 10, 5  # most and least certain queries in the report, and best answers to each


class Absent(NamedTuple):
    """Captions of what no image shows, and their frozen embeddings, as `Pairs.fed` gives them."""

    text: list[str]
    embedding: np.ndarray


@dataclass(frozen=True)
class Choices:
    """Options of eval.py that tasks read."""

    scores: list[str]  # one or both of SCORES; the first ranks, the other's figures are reported beside it
    levels: int  # of uncertainty
    levels_by: str | None = None  # of images: one of FOLLOWED; None: their own uncertainty, else the answer's
    drop_remainder: bool = False  # levels of one size, as in the public AsymVLM code
    quiet: bool = False  # no progress bar
    val: Pairs | None = None  # images of the same classes, on all of which a temperature is fitted
    hubs: dict | None = None  # the hubs.Correction of each direction, if scores are corrected
    bank: Bank | Pairs | None = None  # that a correction needs: training queries, or images without their labels
    prior: float | None = None  # share of matches among pairs, or of queries without an answer; None: by the data
    alphas: tuple[float, ...] = ()  # shares of queries whose set may miss the right answer
    by: Callable | None = None  # from Pairs to the group (N,) that the user puts each image in
    absent: Absent | None = None  # captions of what no image shows
    predictors: tuple[str, ...] | None = None  # of right answers; None: all


def with_progress(compute, bar):
    """Wrap a function that computes scores: it advances a progress bar by their number."""

    def score(*adapted):
        scores = compute(*adapted)
        bar.update(scores.numel())
        return scores

    return score


def progress_bar(count, passes, choices):
    """Progress bar over `count` scores that are computed `passes` times for every requested kind of score."""
    total = count * passes * len(choices.scores)
    return tqdm(total=total, unit="score", unit_scale=True, desc="evaluate", disable=choices.quiet or None)


def posterior_scales(adaptor, pairs):
    """Factor that turns each kind of score into logits: {score: factor}."""
    return {"similarity": pairs.meta["logit_scale"], "log_likelihood": adaptor.posterior_scale}


def uncertainty_of(embedding):
    """Uncertainty of adapted embeddings, (N,) or None; raises FloatingPointError if one is not finite."""
    if embedding.uncertainty is None:
        return None
    uncertainty = embedding.uncertainty.cpu().double().numpy()
    if not np.isfinite(uncertainty).all():
        raise FloatingPointError("an uncertainty is not finite")
    return uncertainty


def lengths(embeddings, block=8192):
    """Lengths (N,) of frozen embeddings (N, D): an uncertainty that needs no model.

    Where all are the same up to a hundredth, as of normalized embeddings, the rounding of the cache is not one: 1.
    """
    parts = [np.asarray(embeddings[start : start + block], np.float64) for start in range(0, len(embeddings), block)]
    length = np.concatenate([np.linalg.norm(part, axis=1) for part in parts])
    low, high = np.percentile(length, [1, 99])  # a single zero among normalized embeddings is no spread
    return length if high - low > 0.01 * length.mean() else np.ones_like(length)


def few_words(texts):
    """Minus the number of words (N,) of texts: an uncertainty that needs no model."""
    return -np.array([len(text.split()) for text in texts], dtype=np.float64)


@torch.inference_mode()
def nearest_answers(query, answer, count):
    """Rows (Q, K) of the answers with the highest cosines to each adapted query, best first; K: `count`, or all."""
    best = Columns(len(query.mean))
    for rows, cosines in tiles(lambda rows: query.direction[rows] @ answer.direction.T, best.queries, len(answer.mean)):
        best.put(rows, cosines.topk(min(count, cosines.shape[1]), dim=1).indices)
    return best[0]


@torch.inference_mode()
def of_candidates(adaptor, side, query, answer, best, quiet):
    """Uncertainties of adapted queries of modality `side` by their best answers, {name: (Q,)}; most methods have none.

    best: (Q, K), rows of the adapted answers. Raises FloatingPointError if one is not finite.
    """
    values, columns, step = {}, Columns(len(best)), max(1, PAIRS // best.shape[1])
    for start in tqdm(range(0, len(best), step), desc="candidates", disable=quiet or None):
        rows = slice(start, min(start + step, len(best)))
        answers = answer.rows(torch.from_numpy(best[rows]).to(answer.mean.device))
        values = adaptor.of_candidates(query.rows(rows), answers, side)
        columns.put(rows, *values.values())
    if not all(np.isfinite(column).all() for column in columns):
        raise FloatingPointError("an uncertainty is not finite")
    return dict(zip(values, columns))


def choose_levels_by(requested, query, answer):
    """Choose which of FOLLOWED the levels follow: `requested`, else the first that the adaptor has, else None.

    query, answer: the adaptor's uncertainties of queries and answers, or None. Raises UserError if the adaptor lacks
    the requested one.
    """
    available = []
    if query is not None:
        available.append("query")
    if answer is not None:
        available.append("retrieved")
    if len(available) == 2:
        available.append("sum")
    if requested is None:
        return available[0] if available else None
    if requested not in available:
        raise UserError(
            f"--levels_by {requested} needs an uncertainty that the method lacks for images; it has"
            f" {', '.join(available) or 'none'}."
        )
    return requested


def evaluate_side(
    ranking, query, answer, choices, levels_by, drawn, free=None, limit=None, truth=None, group=None, candidates=None
):
    """Figures of ranked queries and of all their uncertainties; returns them and the uncertainty (Q,) of `levels_by`.

    query (Q,), answer (G,): the adaptor's uncertainties, or None. levels_by: one of FOLLOWED, as `choose_levels_by`
    returns it; None means the entropy over the gallery. drawn: a PairedBootstrap of the queries. free: uncertainties
    that need no model, {name: (Q,)}. limit, truth, group: as in `summary.of_uncertainty`. candidates: uncertainties
    by the best answers, {name: (Q,)}.
    """
    uncertainties = {}
    if query is not None:
        uncertainties["query"] = query
    if answer is not None:
        uncertainties["retrieved"] = answer[ranking.top]
    if len(uncertainties) == 2:
        uncertainties["sum"] = uncertainties["query"] + uncertainties["retrieved"]
    query_only = {"query", *(free or ())}
    uncertainties |= (candidates or {}) | (free or {}) | summary.gallery_aware(ranking)
    figures = summary.of_ranking(ranking, limit, drawn) | {"levels_by": levels_by, "uncertainty": {}}
    options = choices.levels, choices.drop_remainder, limit, truth, group, drawn.times[1:]
    for name, uncertainty in uncertainties.items():
        family = {"family": "query-only" if name in query_only else "gallery-aware"}
        figures["uncertainty"][name] = family | summary.of_uncertainty(uncertainty, ranking, *options)
    return figures, uncertainties[levels_by or "entropy"]


def without_correction(ranking, forecast, drawn, hit):
    """Figures of one direction before hub correction, and what it gains in R@1, with its interval over images.

    ranking, forecast: of the uncorrected scores. drawn: a PairedBootstrap of the queries. hit: (Q,) of the corrected.
    """
    plain = recall_at(ranking, 1)
    gain = drawn.mean(hit - plain)
    bins = calibration.reliability(forecast.confidence, forecast.hit)
    return summary.of_ranking(ranking, drawn=drawn) | {
        "gain": {"recall": {"1": float(gain[0])}, "interval": {"recall": {"1": interval(gain)}}},
        "uncertainty": {
            name: {"auroc": auroc(values, plain), "aurc": selective(values, plain).aurc}
            for name, values in summary.gallery_aware(ranking).items()
        },
        "calibration": {"ece_15": calibration.calibration_error(bins), "nll": float(forecast.nll.mean())},
    }


def arrays_of(side, ranking, uncertainty):
    """Per-query arrays of a direction for the .npz: ranking, hit of R@1 and uncertainty, {"<side>_<name>": (Q,)}."""
    fields = {"own" if name == "tied_positives" else name: field for name, field in ranking._asdict().items()}
    fields |= {"hit": recall_at(ranking, 1), "uncertainty": uncertainty}
    return {f"{side}_{name}": field for name, field in fields.items()}


class ExampleNames(NamedTuple):
    """Names of queries and answers in the report's examples, and which answers are right."""

    queries: Sequence[str]  # (Q,)
    answers: Sequence[str]  # (G,)
    targets: Sequence[str]  # (Q,) an answer that belongs to each query
    is_right: Callable[[int, int], bool]  # whether the answer belongs to the query
    is_true: Callable[[int, int], bool] | None = None  # whether the answer fits the query, if that is known


@torch.inference_mode()
def examples(uncertainty, score, names):
    """Queries of lowest and of highest uncertainty (Q,) with their best answers: {"most_certain": [...], ...}.

    score: function from rows of queries to their scores (q, G). No wording occurs twice.
    """
    distinct = {}
    for row in np.argsort(uncertainty, kind="stable").tolist():
        distinct.setdefault(names.queries[row], row)
    order = list(distinct.values())
    count = min(EXAMPLES, len(order) // 2)

    def describe(row, scores):
        values, items = scores.topk(min(BEST_ANSWERS, len(scores)))
        best = []
        for value, item in zip(values.tolist(), items.tolist(), strict=True):
            best.append({"answer": names.answers[item], "score": value, "right": names.is_right(row, item)})
            if names.is_true:
                best[-1]["true"] = names.is_true(row, item)
        return {
            "query": names.queries[row],
            "own": names.targets[row],
            "uncertainty": float(uncertainty[row]),
            "best": best,
        }

    def describe_all(rows):
        return [describe(row, scores) for row, scores in zip(rows, score(np.array(rows)), strict=True)]

    return {"most_certain": describe_all(order[:count]), "least_certain": describe_all(order[::-1][:count])}
