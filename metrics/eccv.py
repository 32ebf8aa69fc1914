"""COCO 5K, COCO 1K, CxC and ECCV Caption, computed by the package `eccv_caption` with its annotations.

CxC: Parekh et al. (EACL 2021), arXiv 2004.15020. ECCV Caption: Chun et al. (ECCV 2022), arXiv 2204.03359. They annotate
the 5,000 images of Karpathy's test split and five captions of each; the package contains the ids and the annotations.
The examples need the package and score its whole split, for seconds; doctest skips them.
"""

import contextlib
import io
import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from metrics import retrieval

KS = (1, 5, 10)
FOLDS = 5
RECALLS = ("coco_5k", "coco_1k", "cxc")
# The package misspells eccv_rprecision, so that it is computed only together with eccv_map_at_r.
TARGETS = (*(f"{name}_recalls" for name in RECALLS), "eccv_r1", "eccv_map_at_r", "eccv_rprecision")
SIDES = {"t2i": "text_to_image", "i2t": "image_to_text"}


class NotInstalled(ImportError):
    """The package eccv_caption is not installed."""


class NotAnnotated(LookupError):
    """Images or captions that CxC and ECCV Caption annotate are missing from a gallery."""


@lru_cache
def annotations():
    """Open the package's annotations, a `Metrics` of eccv_caption; raises NotInstalled without the package.

    >>> len(annotations().coco_ids)  # doctest: +SKIP
    25000
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that ujson is not installed
            from eccv_caption import Metrics
    except ImportError:
        sentence = "CxC and ECCV Caption need eccv_caption: `pip install -r requirements-extra.txt`."
        raise NotInstalled(sentence) from None
    return Metrics()


class Annotated(NamedTuple):
    """Rows of the annotated images (5,000,) and captions (25,000,) among the rows of a cache."""

    image: np.ndarray
    text: np.ndarray


def _ids():
    """Ids of the annotated images and captions in the order of the package's folds."""
    text = annotations().coco_ids
    owner = annotations().coco_gts["t2i"]
    return np.array(list(dict.fromkeys(owner[id][0] for id in text.tolist()))), text


def find_annotated(image_id, text_id):
    """Find the annotated images and captions among a cache's COCO ids, (N,) and (M,): `Annotated` rows.

    Of images with six or seven captions, five are annotated, which are those of the published gallery. Raises
    NotAnnotated if one of the images or captions is missing, as in every other split.

    >>> owner, text_id = annotations().coco_gts["t2i"], annotations().coco_ids  # doctest: +SKIP
    >>> find_annotated([owner[id][0] for id in text_id], text_id).image.shape  # doctest: +SKIP
    (5000,)
    """
    rows = []
    for kind, annotated, ids in zip(("images", "captions"), _ids(), (image_id, text_id), strict=True):
        row_of = {id: row for row, id in enumerate(np.asarray(ids).tolist())}
        missing = sum(id not in row_of for id in annotated.tolist())
        if missing:
            raise NotAnnotated(
                f"{missing:,} of the {len(annotated):,} {kind} that CxC and ECCV Caption annotate are missing: they"
                " need all of Karpathy's test split, which is --dataset coco-karpathy --split test."
            )
        rows.append(np.array([row_of[id] for id in annotated.tolist()]))
    return Annotated(*rows)


def ranked_ids(score):
    """Rank the annotated images and captions: two dicts from query ids to ranked ids, image to text and text to image.

    score: function from a slice of images and a slice of captions, in the order of `find_annotated`, to their scores
    (n, m). A list has the best items of the whole gallery, as many as any metric reads, followed by the best of the
    query's own fold that are not among them: COCO 1K reads only the items of one fold, of which the best of the whole
    gallery may hold too few. The figures are exactly those of the whole ranking.

    >>> import torch  # doctest: +SKIP
    >>> image, text = torch.randn(5000, 8), torch.randn(25000, 8)  # doctest: +SKIP
    >>> i2t, t2i = ranked_ids(lambda images, texts: image[images] @ text[texts].T)  # doctest: +SKIP
    >>> len(i2t), len(t2i)  # doctest: +SKIP
    (5000, 25000)
    """
    image_id, text_id = _ids()
    gts, all_rows = annotations().eccv_gts, slice(None)
    i2t, t2i = (
        min(size, max(*KS, *map(len, gts[side].values())))
        for side, size in (("i2t", len(text_id)), ("t2i", len(image_id)))
    )
    best = {
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
        of_gallery, of_fold = item[best[side]].tolist(), item[np.concatenate(folds[side])].tolist()
        # An item that is not among the best of the gallery scores below them, or ties with a later row: appending it
        # keeps the order.
        lists[side] = {
            id: list(dict.fromkeys(first + then))
            for id, first, then in zip(query.tolist(), of_gallery, of_fold, strict=True)
        }
    return lists["i2t"], lists["t2i"]


def measure(i2t, t2i):
    """Metrics of eccv_caption of ranked ids, {metric: {text_to_image, image_to_text}} in [0, 1], and two RSUMs.

    i2t, t2i: dicts from the id of an image (a caption) to ids of captions (images), best first: of the whole gallery,
    or as `ranked_ids` returns them. coco_1k_rsum and coco_5k_rsum are sums of six recalls in percent. Raises ValueError
    if a query is missing or a list is too short, for which the package gives wrong figures or an IndexError.

    >>> import torch  # doctest: +SKIP
    >>> image, owner = torch.arange(5000.0)[:, None], torch.arange(25000.0) // 5  # doctest: +SKIP
    >>> i2t, t2i = ranked_ids(lambda images, texts: -(image[images] - owner[texts]).abs())  # doctest: +SKIP
    >>> measure(i2t, t2i)["coco_5k_r1"]["text_to_image"]  # doctest: +SKIP
    1.0
    """
    _check_lengths("i2t", i2t)
    _check_lengths("t2i", t2i)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
        metrics = annotations().compute_all_metrics(i2t, t2i, target_metrics=TARGETS, Ks=KS)
    names = [f"{name}_r{k}" for name in RECALLS for k in KS]
    names += ["eccv_r1", "eccv_map_at_r", "eccv_rprecision"]
    result = {name: {side: float(metrics[name][key]) for key, side in SIDES.items()} for name in names}
    sums = {
        f"{name}_rsum": 100 * sum(value for k in KS for value in result[f"{name}_r{k}"].values())
        for name in ("coco_1k", "coco_5k")
    }
    return result | sums


def _check_lengths(side, lists):
    """Raise ValueError unless every query's list has all items that COCO 1K and ECCV Caption read."""
    image_id, text_id = _ids()
    query, item = (image_id, text_id) if side == "i2t" else (text_id, image_id)
    fold_of = {id: row * FOLDS // len(item) for row, id in enumerate(item.tolist())}
    needed, positives = min(max(KS), len(item) // FOLDS), annotations().eccv_gts[side]
    for row, id in enumerate(query.tolist()):
        ranked = lists.get(id, ())
        fold = row * FOLDS // len(query)
        in_fold = sum(fold_of.get(x) == fold for x in ranked)
        in_all = len(positives.get(id, ()))
        if len(ranked) < in_all or in_fold < needed:
            raise ValueError(
                f"the list of {side} for id {id} has {len(ranked)} items, {in_fold} of its own fold: COCO 1K needs"
                f" {needed} of the fold, and ECCV Caption needs {in_all} in all"
            )


def evaluate(score):
    """COCO 5K and 1K, CxC and ECCV Caption of a score as in `ranked_ids`: the metrics that `measure` returns.

    >>> import torch  # doctest: +SKIP
    >>> image, owner = torch.arange(5000.0)[:, None], torch.arange(25000.0) // 5  # doctest: +SKIP
    >>> evaluate(lambda images, texts: -(image[images] - owner[texts]).abs())["coco_5k_rsum"]  # doctest: +SKIP
    600.0
    """
    return measure(*ranked_ids(score))
