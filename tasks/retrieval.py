"""Cross-modal retrieval: an image for every caption and a caption for every image."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from scipy import sparse

from metrics import eccv, retrieval, summary
from metrics.calibration import members_of
from metrics.comparison import PairedBootstrap, interval
from metrics.hubs import constants
from metrics.score_tiles import all_scores, even_slices
from metrics.uncertainty import levels, trend
from models.base import adapt_all
from tasks import (
    STORED_SCORES,
    ExampleNames,
    arrays_of,
    choose_levels_by,
    evaluate_side,
    examples,
    few_words,
    hierarchy,
    lengths,
    nearest_answers,
    of_candidates,
    posterior_scales,
    progress_bar,
    uncertainty_of,
    with_progress,
    without_correction,
)

# Items that are scored at once, on a CPU and on a device: what methods compute beside the score stays in a CPU's cache.
GALLERY, DEVICE_GALLERY = 2**11, 2**17
COCO_5K = 5000  # images of the test split, whose fifths are COCO 1K


class Side(NamedTuple):
    """Retrieval in one direction: Q queries, a gallery of G items, P positives."""

    plain_score: Callable  # from rows of queries to their scores (q, G), before hub correction
    gallery: int
    query: np.ndarray  # (P,) rows of the positives' queries
    item: np.ndarray  # (P,) rows of the positives' items
    scale: float  # of the posterior
    correction: tuple | None = None  # constants (G,), and the scale of the posterior without them

    def score(self, rows):
        """Scores (q, G) of rows of queries, corrected; valid until the next call, see Blocks."""
        return self.plain_score(rows) - self.correction[0] if self.correction else self.plain_score(rows)


class Truth(NamedTuple):
    """Ground truth of one direction if captions are known to be true of more images than their own, else None."""

    matches: sparse.csr_array | None = None  # (Q, G), 1 where an item fits a query
    limit: np.ndarray | None = None  # (Q,) Bayes-optimal R@1
    ambiguity: np.ndarray | None = None  # (Q,) of captions


def sides(compute, image, text, image_of_text, scale):
    """Both directions between N adapted images and M captions, {name: Side}; few scores (N, M) are computed once.

    scale: of the posterior.
    """
    images, texts = len(image.mean), len(text.mean)
    caption = np.arange(texts)
    to_text, to_image = by_image(compute, image, text), by_caption(compute, image, text)
    if images * texts <= STORED_SCORES:
        scores = all_scores(to_text, images, texts)
        blocks = Blocks(images, scores.device)
        to_text, to_image = scores.__getitem__, lambda rows: blocks.scores(lambda block: scores[block, rows].T)
    text_side = Side(to_image, images, caption, image_of_text, scale)
    image_side = Side(to_text, texts, image_of_text, caption, scale)
    return {"text_to_image": text_side, "image_to_text": image_side}


def by_image(compute, image, text):
    """The function from rows of N adapted images to their scores (n, M) with M captions, as Blocks have them."""
    captions = Blocks(len(text.mean), text.mean.device)

    def score(rows):
        part = image.rows(rows)
        return captions.scores(lambda block: compute(part, text.rows(block)))

    return score


def by_caption(compute, image, text):
    """The function from rows of M adapted captions to their scores (m, N) with N images, as Blocks have them."""
    images = Blocks(len(image.mean), image.mean.device)

    def score(rows):
        part = text.rows(rows)
        return images.scores(lambda block: compute(image.rows(block), part).T)

    return score


class Blocks:
    """Scores of queries, a block of a gallery of G items at a time, on a device.

    They are valid until the next call, which reuses their memory: new memory would cost as much as two readers.
    """

    def __init__(self, gallery, device):
        self.slices = even_slices(gallery, GALLERY if device.type == "cpu" else DEVICE_GALLERY)
        self.gallery, self.kept = gallery, None

    def scores(self, compute):
        """Scores (q, G); compute: the function from a slice of the gallery to those of its items, (q, g)."""
        for block in self.slices:
            scores = compute(block)
            if self.kept is None or len(self.kept) < len(scores):
                self.kept = scores.new_empty((len(scores), self.gallery))
            self.kept[: len(scores), block] = scores
        return self.kept[: len(scores)]


def truths(pairs):
    """Ground truth of both directions: {name: Truth}."""
    matches = pairs.matches
    if matches is None:
        return {"text_to_image": Truth(), "image_to_text": Truth()}
    captions = np.bincount(pairs.image_of_text, minlength=len(pairs.image))
    to_image = retrieval.bayes_optimal_text_to_image(matches)
    to_text = retrieval.bayes_optimal_image_to_text(matches, captions)
    return {
        "text_to_image": Truth(matches.T.tocsr(), to_image, retrieval.ambiguity(matches)),
        "image_to_text": Truth(matches.tocsr(), to_text),
    }


def scenes(pairs):
    """Number (N,) of what an image shows: images that depend on each other are drawn together, with all their captions.

    Where true matches are known, two images that the same captions are true of show the same scene; else each image
    is a scene of its own.
    """
    if pairs.matches is None:
        return np.arange(len(pairs.image))
    matches = pairs.matches.tocsr().sorted_indices()
    rows = [matches.indices[start:stop].tobytes() for start, stop in zip(matches.indptr, matches.indptr[1:])]
    number = {}
    return np.array([number.setdefault(row, len(number)) for row in rows])


def evaluate(adaptor, pairs, choices, device):
    """Evaluate retrieval in both directions; returns the figures, and per-query arrays for the .npz."""
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", adaptor.pooled), device)
    text = adapt_all(adaptor.adapt_text, pairs.fed("text", adaptor.pooled), device)
    uncertainties = {"image": uncertainty_of(image), "text": uncertainty_of(text)}
    choose_levels_by(choices.levels_by, uncertainties["image"], uncertainties["text"])  # raises UserError early
    scales, truth, result = posterior_scales(adaptor, pairs), truths(pairs), {}
    arrays = {"image_of_text": pairs.image_of_text}  # intervals draw the captions of an image together
    arrays |= {f"{name}_uncertainty": values for name, values in uncertainties.items() if values is not None}
    arrays |= {f"{name}_limit": side.limit for name, side in truth.items() if side.limit is not None}
    free = {
        "text": {"words": few_words(pairs.items["text"]), "length": lengths(pairs.text)},
        "image": {"length": lengths(pairs.image)},
    }
    arrays |= {f"{side}_{name}": values for side, part in free.items() for name, values in part.items()}
    scene = scenes(pairs)
    drawn = {"text": PairedBootstrap(scene[pairs.image_of_text]), "image": PairedBootstrap(scene)}
    arrays["group_of_image"] = scene
    ambiguity = truth["text_to_image"].ambiguity
    candidates = {}
    if adaptor.compared_answers:
        for side, query, answer in (("text", text, image), ("image", image, text)):
            best = nearest_answers(query, answer, adaptor.compared_answers)
            candidates[side] = of_candidates(adaptor, side, query, answer, best, choices.quiet)
    bank = choices.hubs and adapted_bank(adaptor, choices.bank, device)
    count = len(pairs.image) * len(pairs.text)
    passes = 2 if ambiguity is None else 4  # of each direction one, and one for mAP@R if the true matches are known
    bar = progress_bar(count, 1 if count <= STORED_SCORES else passes, choices)
    computes = {"log_likelihood": adaptor.log_likelihood, "similarity": adaptor.similarity}
    for name in choices.scores:
        compute = with_progress(computes[name], bar)
        both = part = None  # so that the matrix of another kind of score is not kept beside the next
        both = sides(compute, image, text, pairs.image_of_text, scales[name])
        if choices.hubs:
            both = corrected(both, computes[name], image, text, bank, choices.hubs)
        figures, side_arrays = evaluate_sides(both, uncertainties, truth, choices, drawn, free, candidates)
        figures = {"score": name, "posterior_scale": scales[name]} | figures
        if result:
            result["other_score"] = figures
            continue
        result = figures | coco(compute, image, text, pairs)  # of scores without hub correction
        arrays |= side_arrays
        for side, part in both.items():
            names = example_names(side, truth[side], pairs)
            result[side]["examples"] = examples(side_arrays[f"{side}_uncertainty"], part.score, names)
    bar.close()
    if ambiguity is not None:
        # Recall of the best possible method whose uncertainty is the true ambiguity.
        groups = levels(ambiguity, choices.levels, choices.drop_remainder)
        best = [float(truth["text_to_image"].limit[rows].mean()) for rows in groups]
        result["bayes_optimal"] = {"levels": best} | trend(best)._asdict()
        arrays["ambiguity"] = ambiguity
    if pairs.chains is not None:
        figures, chain_arrays = hierarchy.evaluate(adaptor, pairs, choices, device)
        result |= figures
        arrays |= chain_arrays
    return result, arrays


def evaluate_sides(both, uncertainties, truth, choices, drawn, free, candidates):
    """Figures of both directions, {name: Side}, under one kind of score, and per-query arrays.

    uncertainties, drawn, free, candidates: of images and of captions, see `evaluate_side`.
    """
    figures, arrays, rankings, before = {}, {}, [], {}
    for (name, side), query, answer in zip(both.items(), ("text", "image"), ("image", "text"), strict=True):
        of_query, of_answer = uncertainties[query], uncertainties[answer]
        levels_by = choose_levels_by(choices.levels_by if query == "image" else None, of_query, of_answer)
        # The captions of one image answer the same query.
        members = members_of(side.query) if query == "image" else None
        score, *targets, scale, correction = side
        group, limit, ambiguity = drawn[query].group, truth[name].limit, truth[name].ambiguity
        judged = summary.judge(score, *targets, scale, group, members, correction)
        part, uncertainty = evaluate_side(
            judged.ranking, of_query, of_answer, choices, levels_by, drawn[query], free[query], limit, ambiguity, group,
            candidates.get(query),
        )  # fmt: skip
        if truth[name].matches is not None:
            precision = retrieval.at_r(side.score, truth[name].matches)
            for key, values in (("map_at_r", precision.mean_average_precision), ("r_precision", precision.r_precision)):
                part[key] = float(values.mean())
                part["interval"][key] = interval(drawn[query].mean(values))
        part["calibration"] = {
            entry: summary.of_forecast(*forecast, drawn[query]) for entry, forecast in judged.forecasts.items()
        }
        figures[name], rankings = part, [*rankings, judged.ranking]
        arrays |= arrays_of(name, judged.ranking, uncertainty)
        if choices.hubs:
            before[name] = without_correction(*judged.uncorrected, drawn[query], arrays[f"{name}_hit"])
    figures["rsum"] = retrieval.rsum(*rankings, ks=summary.KS)
    return figures | ({"uncorrected": before} if before else {}), arrays


def adapted_bank(adaptor, bank, device):
    """Adapt the images and the captions of a Bank: {direction: its queries}."""
    image = adapt_all(adaptor.adapt_image, bank.image.numpy(), device)
    return {"text_to_image": adapt_all(adaptor.adapt_text, bank.text.numpy(), device), "image_to_text": image}


def corrected(both, compute, image, text, bank, hubs):
    """Both directions with their hub correction, {name: Side}.

    bank: the adapted queries of each direction. hubs: the Correction of each.
    """
    scores = {
        "text_to_image": by_image(compute, image, bank["text_to_image"]),
        "image_to_text": by_caption(compute, bank["image_to_text"], text),
    }
    result = {}
    for name, side in both.items():
        chosen, queries = hubs[name], len(bank[name].mean)
        result[name] = side
        if chosen.kind != "none":
            subtracted = constants(scores[name], side.gallery, queries, chosen, side.scale)
            result[name] = side._replace(scale=side.scale * chosen.ratio, correction=(subtracted, side.scale))
    return result


def example_names(side, truth, pairs):
    """Names of the queries and answers of a direction in the report's examples."""
    captions, images, owner = pairs.items["text"], pairs.items["image"], pairs.image_of_text

    def is_match(query, item):
        return bool(truth.matches[query, item])

    is_true = None if truth.matches is None else is_match
    if side == "text_to_image":
        targets = [images[row] for row in owner]
        return ExampleNames(captions, images, targets, lambda text, image: bool(owner[text] == image), is_true)
    targets = [captions[row] for row in np.unique(owner, return_index=True)[1]]
    return ExampleNames(images, captions, targets, lambda image, text: bool(owner[text] == image), is_true)


def coco(compute, image, text, pairs):
    """COCO 1K, CxC and ECCV Caption if these are 5,000 images of COCO; COCO 1K alone if they are not annotated."""
    if pairs.meta["id_space"] != "coco" or len(pairs.image) != COCO_5K:
        return {}
    try:
        annotated = eccv.find_annotated(pairs.image_id, pairs.text_id)
    except (eccv.NotInstalled, eccv.NotAnnotated) as error:
        if find_spec("eccv_caption") is None:
            print(f"Without CxC and ECCV Caption: {error}", file=sys.stderr)
        return {"coco": folds(compute, image, text, pairs.image_of_text)}
    image, text = image.rows(annotated.image), text.rows(annotated.text)
    return {"coco": eccv.evaluate(lambda images, texts: compute(image.rows(images), text.rows(texts)))}


def folds(compute, image, text, image_of_text):
    """COCO 1K in the order of these images, with the keys of metrics/eccv.py."""

    def score(images, texts):
        return compute(image.rows(images), text.rows(texts))

    to_image, to_text = retrieval.fold_recalls(score, image_of_text, summary.KS)
    figures = {f"coco_1k_r{k}": {"text_to_image": to_image[k], "image_to_text": to_text[k]} for k in summary.KS}
    return figures | {"coco_1k_rsum": 100 * (sum(to_image.values()) + sum(to_text.values()))}
