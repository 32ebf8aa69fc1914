"""Cross-modal retrieval: an image for every caption and a caption for every image."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from scipy import sparse

from metrics import eccv, retrieval, summary, uncertainty
from models.base import adapt_all
from tasks import HELD, Said, counted, doubts_of, examples, follow, hierarchy, judge_side, posterior_scales, score_bar
from utils.errors import UserError

COCO_5K = 5000  # images of the gallery whose fifths are COCO 1K


class Side(NamedTuple):
    """One direction of Q queries into a gallery of G items, as the metrics take it."""

    score: Callable  # from rows of queries to their scores (q, G)
    gallery: int
    query: np.ndarray  # (P,) rows of the positives
    item: np.ndarray  # (P,)


class Truth(NamedTuple):
    """What is known of a direction where captions are true of more than their own images; else None."""

    matches: sparse.csr_array | None = None  # (Q, G)
    limit: np.ndarray | None = None  # (Q,) Bayes-optimal R@1
    ambiguity: np.ndarray | None = None  # (Q,) of captions


def sides(compute, image, text, image_of_text):
    """Both directions between adapted images and captions by one score (N, M), {name: Side}; it is held if small."""
    images, texts = len(image.mean), len(text.mean)
    caption = np.arange(texts)

    def to_text(rows):
        return compute(image.rows(rows), text)

    def to_image(rows):
        return compute(image, text.rows(rows)).T

    if images * texts <= HELD:
        found = retrieval.whole(to_text, images, texts)
        to_text, to_image = found.__getitem__, found.T.contiguous().__getitem__
    return {
        "text_to_image": Side(to_image, images, caption, image_of_text),
        "image_to_text": Side(to_text, texts, image_of_text, caption),
    }


def truths(pairs):
    """What is known of both directions: {name: Truth}."""
    matches = pairs.matches
    if matches is None:
        return {"text_to_image": Truth(), "image_to_text": Truth()}
    own = np.bincount(pairs.image_of_text, minlength=len(pairs.image))
    to_image, to_text = (
        retrieval.bayes_optimal_text_to_image(matches),
        retrieval.bayes_optimal_image_to_text(matches, own),
    )
    return {
        "text_to_image": Truth(matches.T.tocsr(), to_image, retrieval.ambiguity(matches)),
        "image_to_text": Truth(matches.tocsr(), to_text),
    }


def evaluate(adaptor, pairs, choices, device):
    """Evaluate retrieval both ways; returns the figures, and per-query arrays for the .npz."""
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", adaptor.pooled), device)
    text = adapt_all(adaptor.adapt_text, pairs.fed("text", adaptor.pooled), device)
    doubts = {"image": doubts_of(image), "text": doubts_of(text)}
    scales, truth, result = posterior_scales(adaptor, pairs), truths(pairs), {}
    arrays = {f"{name}_uncertainty": doubt for name, doubt in doubts.items() if doubt is not None}
    arrays |= {f"{name}_limit": known.limit for name, known in truth.items() if known.limit is not None}
    ambiguity = truth["text_to_image"].ambiguity
    follow(choices.levels_by, doubts["image"], doubts["text"])  # refuses at once what would be refused in the end
    count = len(pairs.image) * len(pairs.text)
    # Of each direction: ranks, probabilities as they are and scaled, and what else is true.
    bar = score_bar(count, 1 if count <= HELD else 2 * (3 + (ambiguity is not None)), choices)
    for name in choices.scores:
        compute = counted(getattr(adaptor, name), bar)
        both = sides(compute, image, text, pairs.image_of_text)
        figures, found = judge(both, scales[name], doubts, truth, choices)
        figures = {"score": name, "posterior_scale": scales[name]} | figures
        if result:
            result["other_score"] = figures
            continue
        result = figures | coco(compute, image, text, pairs)
        arrays |= found
        for side, part in both.items():
            about = said(side, truth[side], pairs)
            result[side]["examples"] = examples(found[f"{side}_uncertainty"], part.score, about)
    bar.close()
    if ambiguity is not None:
        # What the best method would score if its uncertainty were the true ambiguity.
        groups = uncertainty.levels(ambiguity, choices.levels, choices.drop_remainder)
        best = [float(truth["text_to_image"].limit[rows].mean()) for rows in groups]
        result["bayes_optimal"] = {"levels": best} | uncertainty.trend(best)._asdict()
        arrays["ambiguity"] = ambiguity
    if pairs.chains is not None:
        figures, found = hierarchy.evaluate(adaptor, pairs, choices, device)
        result, arrays = result | figures, arrays | found
    return result, arrays


def judge(both, scale, doubts, truth, choices):
    """Figures of both directions, {name: Side}, by one score, and per-query arrays."""
    figures, arrays, rankings = {}, {}, []
    for (name, side), query, answer in zip(both.items(), ("text", "image"), ("image", "text"), strict=True):
        known = truth[name]
        ranking = retrieval.rank(*side, scale)
        by = follow(choices.levels_by if query == "image" else None, doubts[query], doubts[answer])
        # The captions of one image are no independent witnesses.
        group = side.item if query == "text" else np.arange(len(ranking.top))
        about = known.limit, known.ambiguity, group
        part, doubt = judge_side(ranking, doubts[query], doubts[answer], choices, by, *about)
        if known.matches is not None:
            found = retrieval.at_r(side.score, known.matches)
            part["map_at_r"] = float(found.mean_average_precision.mean())
            part["r_precision"] = float(found.r_precision.mean())
        shared = side.query if query == "image" else None  # by the captions of one image
        part["calibration"] = summary.of_probabilities(*side, scale, group, shared)
        figures[name] = part
        arrays |= {f"{name}_{field}": value for field, value in ranking._asdict().items()}
        arrays |= {f"{name}_hit": retrieval.recall_at(ranking, 1), f"{name}_uncertainty": doubt}
        rankings.append(ranking)
    return figures | {"rsum": retrieval.rsum(*rankings, ks=summary.KS)}, arrays


def said(side, known, pairs):
    """How the report names the queries and answers of a direction."""
    words, images, owner = pairs.items["text"], pairs.items["image"], pairs.image_of_text
    true = None if known.matches is None else lambda query, item: bool(known.matches[query, item])
    if side == "text_to_image":
        own = [images[row] for row in owner]
        return Said(words, images, own, lambda text, image: bool(owner[text] == image), true)
    own = [words[row] for row in np.unique(owner, return_index=True)[1]]
    return Said(images, words, own, lambda image, text: bool(owner[text] == image), true)


def coco(compute, image, text, pairs):
    """COCO 1K, CxC and ECCV Caption, where these are 5,000 images of COCO, and with what is known of them."""
    if pairs.meta["id_space"] != "coco" or len(pairs.image) != COCO_5K:
        return {}
    try:
        known = eccv.known(pairs.image_id, pairs.text_id)
    except UserError as error:
        if find_spec("eccv_caption") is None:
            print(f"Without CxC and ECCV Caption: {error}", file=sys.stderr)
        return {"coco": folds(compute, image, text, pairs.image_of_text)}
    image, text = image.rows(known.image), text.rows(known.text)
    return {"coco": eccv.evaluate(lambda images, texts: compute(image.rows(images), text.rows(texts)))}


def folds(compute, image, text, image_of_text):
    """COCO 1K in the order of these images, named as in metrics/eccv.py."""
    found = retrieval.fold_recalls(lambda i, t: compute(image.rows(i), text.rows(t)), image_of_text, summary.KS)
    to_image, to_text = found
    figures = {f"coco_1k_r{k}": {"text_to_image": to_image[k], "image_to_text": to_text[k]} for k in summary.KS}
    return figures | {"coco_1k_rsum": 100 * (sum(to_image.values()) + sum(to_text.values()))}
