"""COCO 5K, COCO 1K, CxC and ECCV Caption, all as the package `eccv_caption` computes them and with its annotations.

CxC: Parekh et al. (EACL 2021), arXiv 2004.15020. ECCV Caption: Chun et al. (ECCV 2022), arXiv 2204.03359. They are
about the 5,000 images of Karpathy's test split and five captions of each; the package brings ids and annotations along.
"""

import contextlib
import io
import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from metrics import retrieval
from utils.errors import UserError

KS = (1, 5, 10)
FOLDS = 5
RECALLS = ("coco_5k", "coco_1k", "cxc")
# Asked for alone, the package's eccv_rprecision would be left out, by a slip of its spelling.
TARGETS = (*(f"{name}_recalls" for name in RECALLS), "eccv_r1", "eccv_map_at_r", "eccv_rprecision")
SIDES = {"t2i": "text_to_image", "i2t": "image_to_text"}


@lru_cache
def annotations():
    """Open the package's annotations; raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it does without ujson
            from eccv_caption import Metrics
    except ImportError:
        raise UserError("CxC and ECCV Caption need eccv_caption: `pip install -r requirements-extra.txt`.") from None
    return Metrics()


class Known(NamedTuple):
    """What the annotations are about, by its rows in a cache: images (5,000,), and five captions of each (25,000,)."""

    image: np.ndarray
    text: np.ndarray


def _ids():
    """Ids of the annotated images and captions in the order of the package's folds."""
    text = annotations().coco_ids
    owner = annotations().coco_gts["t2i"]
    return np.array(list(dict.fromkeys(owner[id][0] for id in text.tolist()))), text


def known(image_id, text_id):
    """Find the annotated images and captions among a cache's ids, (N,) and (M,), which are COCO's: `Known` rows.

    Of images with six or seven captions it keeps the five that the annotations know, which are the published gallery.
    Raises UserError where one of them is missing, as in any other split.
    """
    found = []
    for kind, ids, given in zip(("images", "captions"), _ids(), (image_id, text_id), strict=True):
        row_of = {id: row for row, id in enumerate(np.asarray(given).tolist())}
        missing = sum(id not in row_of for id in ids.tolist())
        if missing:
            raise UserError(
                f"{missing:,} of the {len(ids):,} {kind} that CxC and ECCV Caption annotate are not among these: they"
                " are about the whole of Karpathy's test split, which --dataset coco-karpathy --split test is."
            )
        found.append(np.array([row_of[id] for id in ids.tolist()]))
    return Known(*found)


def ranked_ids(score):
    """Rank the annotated images and captions: the two dicts of ranked ids that the package takes, by id.

    score: function from a slice of images and a slice of captions, in the order of `known`, to their scores (n, m).
    COCO 1K keeps of every list what is in one of five folds, so that short lists may hold too few of it: a list
    has the best of the whole gallery, as many as any metric reads, followed by the best of the query's own fold as far
    as they are not among them, which are exactly what the whole ranking would give.
    """
    image_id, text_id = _ids()
    gts, all_rows = annotations().eccv_gts, slice(None)
    i2t, t2i = (
        min(size, max(*KS, *map(len, gts[side].values())))
        for side, size in (("i2t", len(text_id)), ("t2i", len(image_id)))
    )
    found = {
        "i2t": retrieval.top(lambda rows: score(rows, all_rows), len(image_id), len(text_id), i2t),
        "t2i": retrieval.top(lambda rows: score(all_rows, rows).T, len(text_id), len(image_id), t2i),
    }
    folds = {"i2t": [], "t2i": []}
    images, texts = len(image_id) // FOLDS, len(text_id) // FOLDS
    for fold in range(FOLDS):
        i, t = fold * images, fold * texts

        def part(rows, start):
            return slice(rows.start + start, rows.stop + start)

        def text_of(rows, i=i, t=t):
            return score(part(rows, i), slice(t, t + texts))

        def image_of(rows, i=i, t=t):
            return score(slice(i, i + images), part(rows, t)).T

        folds["i2t"].append(t + retrieval.top(text_of, images, texts, min(max(KS), texts)))
        folds["t2i"].append(i + retrieval.top(image_of, texts, images, min(max(KS), images)))
    lists = {}
    for side, query, item in (("i2t", image_id, text_id), ("t2i", text_id, image_id)):
        best, own = item[found[side]].tolist(), item[np.concatenate(folds[side])].tolist()
        # What is not among the best of all scores below them, or ties and has a later row: order is kept.
        lists[side] = {
            id: list(dict.fromkeys(first + then)) for id, first, then in zip(query.tolist(), best, own, strict=True)
        }
    return lists["i2t"], lists["t2i"]


def measure(i2t, t2i):
    """Give what eccv_caption says of ranked ids, {metric: {text_to_image, image_to_text}} in [0, 1], and two RSUMs.

    i2t, t2i: dicts from an image's (a caption's) id to ids of captions (images), best first, whole or as `ranked_ids`
    gives them. coco_1k_rsum and coco_5k_rsum are the sums of six recalls in percent. Raises ValueError where a query
    is missing, or a list is too short for what is read of it: the package would count on, or end in an IndexError.
    """
    _refuse_short("i2t", i2t)
    _refuse_short("t2i", t2i)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
        found = annotations().compute_all_metrics(i2t, t2i, target_metrics=TARGETS, Ks=KS)
    result = {
        name: {said: float(found[name][side]) for side, said in SIDES.items()}
        for name in (*(f"{name}_r{k}" for name in RECALLS for k in KS), "eccv_r1", "eccv_map_at_r", "eccv_rprecision")
    }
    sums = {
        f"{name}_rsum": 100 * sum(value for k in KS for value in result[f"{name}_r{k}"].values())
        for name in ("coco_1k", "coco_5k")
    }
    return result | sums


def _refuse_short(side, lists):
    """Raise ValueError unless every query's list holds what 1K and ECCV Caption read of it."""
    image_id, text_id = _ids()
    query, item = (image_id, text_id) if side == "i2t" else (text_id, image_id)
    fold_of = {id: row * FOLDS // len(item) for row, id in enumerate(item.tolist())}
    needed, positives = min(max(KS), len(item) // FOLDS), annotations().eccv_gts[side]
    for row, id in enumerate(query.tolist()):
        ranked = lists.get(id, ())
        fold = row * FOLDS // len(query)
        own = sum(fold_of.get(x) == fold for x in ranked)
        if len(ranked) < len(positives.get(id, ())) or own < needed:
            raise ValueError(
                f"the list of {side} for id {id} has {len(ranked)} items, {own} of its own fold: COCO 1K needs"
                f" {needed} of them, and ECCV Caption {len(positives.get(id, ()))} in all"
            )


def evaluate(score):
    """COCO 5K and 1K, CxC and ECCV Caption of a score, which `ranked_ids` describes; returns what `measure` does."""
    return measure(*ranked_ids(score))
