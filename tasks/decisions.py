"""What the tasks of decisions share: queries with their galleries, and which of them others are judged by.

Decisions are learned from labeled queries and judged on others. By default both are of the evaluated split, in the same
gallery: each half of the images is judged by what the other half taught. With --val the labels of another split teach,
in galleries as large as the evaluated one.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from tqdm import tqdm

from metrics.calibration import halves
from models.base import Embedding, adapt_all
from tasks import of_candidates, posterior_scales, uncertainty_of, with_progress
from tasks.classification import class_embeddings
from tasks.retrieval import Side, adapted_bank, corrected, scenes, sides
from utils.errors import UserError


class Part(NamedTuple):
    """Q queries of one direction and their gallery of G items."""

    side: Side  # scores, the scale of their posterior, and which items answer which queries
    query: torch.Tensor  # (Q, D) unit means of the queries
    items: torch.Tensor  # (G, D) and of the gallery
    group: np.ndarray  # (Q,) the image of each query, or the scene, by a number that is its own in all parts
    uncertainty: np.ndarray | None  # (Q,) of the method, if it has one for queries
    of_answer: np.ndarray | None  # (G,) of the method, if it has one for answers
    true: sparse.csr_array | None = None  # (Q, G) which items fit a query, if known: its own are among them
    column: np.ndarray | None = None  # (Q,) the group that the user puts each query in
    of_candidates: Callable | None = None  # from best answers (Q, K) to further uncertainties, {name: (Q,)}

    @property
    def own(self):
        """The first arguments of `retrieval.rank`, with each query's own items as answers."""
        return self.side.score, self.side.gallery, self.side.query, self.side.item

    @property
    def matches(self):
        """Rows (P,) of the queries and of the items that fit them: by the known truth, else their own."""
        return (self.side.query, self.side.item) if self.true is None else self.true.nonzero()


class Adapted(NamedTuple):
    """All of a split, adapted once: parts are cut from it."""

    pairs: object  # opened datasets.embeddings.Pairs
    image: Embedding
    text: Embedding  # of captions, or of classes
    group: np.ndarray  # (N,) as `Part.group`


def adapt(adaptor, pairs, device, first=0):
    """Adapt a split; its groups are numbered from `first` on."""
    of_text = pairs.fed("text", adaptor.pooled) if pairs.classes is None else class_embeddings(pairs, adaptor.pooled)
    image = adapt_all(adaptor.adapt_image, pairs.fed("image", adaptor.pooled), device)
    group = scenes(pairs) if pairs.classes is None else np.arange(len(pairs.image))
    return Adapted(pairs, image, adapt_all(adaptor.adapt_text, of_text, device), first + group)


def parts(adaptor, adapted, choices, device, bar, images=None):
    """The Part of each direction, {name: Part}, of all images or of some rows of them and their captions."""
    pairs, name = adapted.pairs, choices.scores[0]
    images = np.arange(len(pairs.image)) if images is None else images
    scale = posterior_scales(adaptor, pairs)[name]
    likelihood = adaptor.log_likelihood if pairs.classes is None else adaptor.classify
    plain = {"log_likelihood": likelihood, "similarity": adaptor.similarity}[name]
    compute = with_progress(plain, bar)
    image, group = adapted.image.rows(images), adapted.group[images]
    column = None if choices.by is None else choices.by(pairs)[images]
    of_image = uncertainty_of(image)
    if pairs.classes is not None:
        rows = np.arange(len(images))
        side = Side(
            lambda rows: compute(image.rows(rows), adapted.text), len(pairs.classes), rows, pairs.label[images], scale
        )
        units = image.direction, adapted.text.direction
        return {"image_to_class": Part(side, *units, group, of_image, uncertainty_of(adapted.text), column=column)}
    captions = np.flatnonzero(np.isin(pairs.image_of_text, images))
    text, owner = adapted.text.rows(captions), np.searchsorted(images, pairs.image_of_text[captions])
    both = sides(compute, image, text, owner, scale)
    if choices.hubs:
        both = corrected(both, plain, image, text, adapted_bank(adaptor, choices.bank, device), choices.hubs)
    true = None if pairs.matches is None else pairs.matches.tocsr()[images][:, captions]
    of_text = uncertainty_of(text)
    of_caption = [None if each is None else each[owner] for each in (group, column)]
    turned = None if true is None else true.T.tocsr()
    of_texts, of_images = (text.direction, of_caption[0], of_text), (image.direction, group, of_image)
    by_text = comparison(adaptor, "text", text, image, choices.quiet)
    by_image = comparison(adaptor, "image", image, text, choices.quiet)
    return {
        "text_to_image": _part(both["text_to_image"], of_texts, of_images, turned, of_caption[1], by_text),
        "image_to_text": _part(both["image_to_text"], of_images, of_texts, true, column, by_image),
    }


def _part(side, query, items, true, column, of_candidates):
    return Part(side, query[0], items[0], query[1], query[2], items[2], true, column, of_candidates)


def comparison(adaptor, side, query, answer, quiet):
    """`of_candidates` as a function of the best answers (Q, K) alone; None for a method that compares none."""
    return partial(of_candidates, adaptor, side, query, answer, quiet=quiet) if adaptor.compared_answers else None


def galleries(count, images, seed=0):
    """Cut `count` images at random into galleries of `images` each: list of ascending rows.

    What is left over is left out; with fewer than one gallery's worth, all are one gallery.
    """
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[start : start + images]) for start in range(0, max(1, count - images + 1), images)]


class Fold(NamedTuple):
    """Which of all queries teach and which are judged, masks over those of all parts."""

    taught_by: np.ndarray
    judged: np.ndarray


class Measured(NamedTuple):
    """What was measured in one direction: of the evaluated split first, then of the galleries of --val."""

    parts: list[Part]
    records: list  # what `measure` returns of each part
    folds: list[Fold]  # each query of the evaluated split is judged in one of them

    @property
    def group(self):
        """Group of every query of every part."""
        return np.concatenate([part.group for part in self.parts])

    @property
    def facts(self):
        """What a result says first of a direction; `taught_by`: images (or scenes) that teach, and their galleries."""
        images = min(len(np.unique(self.group[fold.taught_by])) for fold in self.folds)
        sizes = sorted({part.side.gallery for part in self.parts[1:] or self.parts})
        facts = {"queries": len(self.parts[0].group), "gallery": self.parts[0].side.gallery}
        facts |= {"taught_by": {"images": images, "galleries": sizes}}
        return facts | {"levels_by": None, "uncertainty": {}}


def measured(adaptor, pairs, choices, device, measure):
    """Measure the queries of the evaluated split and of --val in both directions: {direction: Measured}.

    measure: function from a Part to what is known of its queries.
    """
    whole = adapt(adaptor, pairs, device)
    bar = tqdm(unit="score", unit_scale=True, desc="evaluate", disable=choices.quiet or None)
    by_direction = {name: [(part, measure(part))] for name, part in parts(adaptor, whole, choices, device, bar).items()}
    if choices.val is not None:
        other, count = adapt(adaptor, choices.val, device, first=whole.group.max() + 1), len(choices.val.image)
        # A gallery of classes is the same however many images there are.
        for images in galleries(count, len(pairs.image) if pairs.classes is None else count):
            for name, part in parts(adaptor, other, choices, device, bar, images).items():
                by_direction[name].append((part, measure(part)))
    bar.close()
    result = {}
    for name, measurements in by_direction.items():
        parts_of, records = (list(column) for column in zip(*measurements))
        result[name] = Measured(parts_of, records, folds(parts_of))
    return result


def joined(measured):
    """Records that are dicts of arrays, of all parts: {name: (Q, ...)}."""
    return {key: np.concatenate([each[key] for each in measured.records]) for key in measured.records[0]}


def folds(parts):
    """The Folds of parts, of which the first is judged: by the others, or half by half if there is no other.

    Raises UserError unless two images teach in each.
    """
    group = np.concatenate([part.group for part in parts])
    evaluated = np.arange(len(group)) < len(parts[0].group)
    teaching = len(np.unique(group)) // 2 if len(parts) == 1 else len(np.unique(group[~evaluated]))
    if teaching < 2:
        raise UserError(
            f"{('no', 'one')[teaching]} image teaches, and two are the least: evaluate a larger split, or name a larger"
            " --val."
        )
    if len(parts) > 1:
        return [Fold(~evaluated, evaluated)]
    first = halves(group)
    return [Fold(first, ~first), Fold(~first, first)]
