"""K-fold cross-validation: a fold is a split that is chosen from the cache of a whole one when it is opened.

`train2of5` is all but the second of five parts of the split `all`, `test2of5` that part; `val-train2of5` is of `val`.
"""

import re
from typing import NamedTuple

import numpy as np

WHOLE = "all"  # the split whose parts have no name before them


class Fold(NamedTuple):
    """One fold of a split: the part `number`, from 1, of `folds`, or all others where it is trained on."""

    whole: str
    train: bool
    number: int
    folds: int


def fold_of(split):
    """Read the name of a split as a Fold; None where it names no fold."""
    form = re.fullmatch(r"(?:(.+)-)?(train|test)(\d+)of(\d+)", split)
    return form and Fold(form[1] or WHOLE, form[2] == "train", int(form[3]), int(form[4]))


def named(whole, kind, number, folds):
    """Name the split of a fold; kind: "train" or "test"."""
    return f"{'' if whole == WHOLE else f'{whole}-'}{kind}{number}of{folds}"


def mask(fold, images, image_of_text=None, matches=None):
    """Choose the images of a Fold: a mask (N,), the same on every machine.

    Captions stay with their images, and images that share a true caption stay together. image_of_text: (M,), or None
    where images have classes. matches: sparse (N, M), which images each caption is true of, or None. Raises ValueError
    where the fold cannot be.
    """
    number, folds = fold.number, fold.folds
    if not 1 <= number <= folds or folds < 2:
        raise ValueError(f"there is no fold {number} of {folds}")
    group = np.arange(images)
    if matches is not None:
        from scipy import sparse  # takes longer to load than --help may take
        from scipy.sparse.csgraph import connected_components

        texts = matches.shape[1]
        pairs = sparse.coo_array((np.ones(texts), (image_of_text, np.arange(texts))), shape=matches.shape)
        true = pairs + matches.astype(bool)
        joined = connected_components(sparse.block_array([[None, true], [true.T, None]]), directed=False)[1]
        group = np.unique(joined[:images], return_inverse=True)[1]
    size = np.bincount(group)
    if len(size) < folds:
        kept = "" if len(size) == images else f", kept in {len(size):,} groups by the captions that they share,"
        raise ValueError(f"{images:,} images{kept} make no {folds} folds")
    place, filled = np.empty(len(size), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    shuffled = np.random.default_rng(0).permutation(len(size))
    for one in shuffled[np.argsort(-size[shuffled], kind="stable")]:  # the largest first, each into the emptiest fold
        place[one] = filled.argmin()
        filled[place[one]] += size[one]
    return (place[group] == number - 1) != fold.train
