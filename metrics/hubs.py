"""Hub correction: a score less a constant for each gallery item, which says how near the item is to any query.

Some gallery items are near every query ("hubs") and are answered wrongly for many. G gallery items, B queries of a bank
that has nothing to do with those to come. A constant for each item leaves the scores of two queries comparable, so the
softmax of the corrected scores is a posterior.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F

from metrics.calibration import nll_of
from metrics.score_tiles import tiles

KINDS = ("nnn", "inverted-softmax")
DIRECTIONS = ("text_to_image", "image_to_text")
NEAREST, WEIGHTS = (4, 16, 64), (0.25, 0.5, 0.75)
FOLDS, CAPTIONS = 5, 1500  # of the cross-validation, and about the most captions that it reads


class Correction(NamedTuple):
    """What is subtracted from a score: `weight` times the constants of `kind`."""

    kind: str  # one of KINDS, or none
    weight: float = 0.0
    k: int | None = None  # of nnn
    ratio: float = 1.0  # factor on the scale of the posterior that makes up for the correction
    nll: float | None = None  # mean in nats that cross-validation measured


NONE = Correction("none")


@torch.inference_mode()
def constants(score, gallery, bank, correction, scale=1.0):
    """What to subtract from the scores of each of G items, (G,); zeros for `none`.

    score: function from a slice of items to their scores (g, B) with the queries of the bank. bank: B. scale: that of
    the posterior. `nnn`: weight times the mean of the k largest scores (Chowdhury et al., 2024, arXiv 2410.24114).
    `inverted-softmax`: weight times the log-mean-exp of the scores at half the scale (after Smith et al., 2017,
    arXiv 1702.03859).

    >>> scores = torch.tensor([[0.75, 0.25], [0.0, 0.0]])
    >>> constants(lambda rows: scores[rows], 2, 2, Correction("nnn", weight=0.5, k=1)).tolist()
    [0.375, 0.0]
    """
    if correction.kind == "none":
        return torch.zeros(gallery)
    parts = [_level(scores, correction.kind, correction.k, scale) for _, scores in tiles(score, gallery, bank)]
    return correction.weight * torch.cat(parts)


def _level(scores, kind, k, scale):
    """How near items (g,) are to any query, from their scores (g, B) with those of the bank."""
    if kind == "nnn":
        return scores.topk(min(k, scores.shape[1]), dim=1).values.mean(dim=1)
    sharpness = scale / 2
    return ((sharpness * scores).logsumexp(dim=1) - math.log(scores.shape[1])) / sharpness


class Fold(NamedTuple):
    """Queries, gallery and bank of one direction that have no image in common."""

    score: torch.Tensor  # (Q, G)
    positive: torch.Tensor  # (Q, G) whether the item answers the query
    of_bank: torch.Tensor  # (G, B)


def _folds(frozen, image_of_text, seed, refit):
    """Cut unit embeddings (N, D), (M, D) into parts by image, each with the others as bank: {direction: [Fold]}."""
    (image, text), rng, owner = frozen, np.random.default_rng(seed), np.asarray(image_of_text)
    _, first = np.unique(owner, return_index=True)  # a caption of each image
    chosen = rng.permutation(len(image))[: max(2 * FOLDS, CAPTIONS * len(image) // len(text))]
    part_of = np.full(len(image), -1)
    part_of[chosen] = np.arange(len(chosen)) % FOLDS
    result = {direction: [] for direction in DIRECTIONS}
    for part in range(FOLDS):
        inside, outside = part_of == part, (part_of >= 0) & (part_of != part)
        images, captions = np.flatnonzero(inside), np.flatnonzero(inside[owner])
        if refit:
            image, text = refit(frozen[0][outside], frozen[1][first[outside]])(*frozen)
        positive = torch.from_numpy(owner[captions][:, None] == images)
        score = text[captions] @ image[images].T
        to_image, to_text = image[images] @ text[outside[owner]].T, text[captions] @ image[outside].T
        result["text_to_image"].append(Fold(score, positive, to_image))
        result["image_to_text"].append(Fold(score.T, positive.T, to_text))
    return result


@torch.no_grad()
def choose(image, text, image_of_text, scale, seed=0, refit=None):
    """Choose the correction of each kind by cross-validation: {direction: {kind: Correction}}, `none` among the kinds.

    image (N, D), text (M, D), image_of_text (M,): pairs of frozen embeddings that nothing is evaluated on; each image
    has a caption. scale: of their cosines, of the frozen model. refit: `Linear.refit` or the like, which moves each
    fold as it learns from the others, or None. The least mean negative log probability of the right items decides, each
    candidate at the scale that suits it best. With fewer than two images a fold, `none` is all there is.

    >>> near = torch.eye(12) + torch.tensor([[1.0], *[[0.0]] * 11]).T  # the first image is near every caption
    >>> chosen = choose(torch.eye(12), near, range(12), scale=1.0)
    >>> chosen["text_to_image"]["nnn"].nll < chosen["text_to_image"]["none"].nll
    True
    """
    if len(image) < 2 * FOLDS:
        return {direction: {"none": NONE} for direction in DIRECTIONS}
    frozen = [F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (image, text)]
    chosen = {}
    for direction, parts in _folds(frozen, image_of_text, seed, refit).items():
        plain_scale, nll = _fit(parts, [torch.zeros(len(part.of_bank)) for part in parts], scale)
        chosen[direction] = {"none": NONE._replace(nll=nll)}
        for kind, k in [("nnn", k) for k in NEAREST] + [("inverted-softmax", None)]:
            levels = [_level(part.of_bank, kind, k, scale) for part in parts]
            for weight in WEIGHTS:
                fitted, nll = _fit(parts, [weight * level for level in levels], scale)
                best = chosen[direction].get(kind)
                if best is None or nll < best.nll:
                    chosen[direction][kind] = Correction(kind, weight, k, fitted / plain_scale, nll)
    return chosen


def _fit(parts, subtracted, scale):
    """The scale of corrected scores with the least mean NLL over Folds, and that NLL."""
    corrected = [part.score - level for part, level in zip(parts, subtracted, strict=True)]
    rights = [part.positive.nonzero(as_tuple=True) for part in parts]
    queries = sum(map(len, corrected))

    def nll(log_factor):
        factor = scale * math.exp(log_factor)
        pairs = zip(corrected, rights, strict=True)
        return sum(nll_of(score, *right, factor).sum().item() for score, right in pairs) / queries

    best = scipy.optimize.minimize_scalar(nll, bounds=(-2.5, 2.5), method="bounded", options={"xatol": 1e-2})
    return scale * math.exp(best.x), float(best.fun)


def fixed(kind):
    """The Correction of a kind where nothing can be chosen, as there are no labels: auto is nnn.

    >>> fixed("auto")
    Correction(kind='nnn', weight=0.5, k=16, ratio=1.0, nll=None)
    """
    return Correction("nnn", 0.5, 16) if kind in ("auto", "nnn") else Correction(kind, 0.5)


def decide(chosen, kind):
    """The Correction of each direction for --hubs `kind`: `auto` takes the kind with the least NLL.

    >>> decide({"text_to_image": {"none": NONE}}, "auto")["text_to_image"].kind
    'none'
    """
    best = {}
    for direction, kinds in chosen.items():
        if kind == "auto":
            best[direction] = min(kinds.values(), key=lambda correction: correction.nll or 0.0)
        else:
            best[direction] = kinds.get(kind, NONE)
    return best
