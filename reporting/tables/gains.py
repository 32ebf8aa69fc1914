"""The first table of retrieval: every variant against the one without an uncertainty, with significance."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from metrics.comparison import Difference, PairedBootstrap, holm, paired_difference
from reporting.runs import baseline_of
from reporting.tables import Cell, Column, Row, make
from reporting.tables.columns import AUROC, rows_of
from reporting.words import FREE, LEVEL, MINUS, RETRIEVAL, SIGNIFICANT
from utils.errors import UserError


class Figure(NamedTuple):
    """A figure that variants are compared in."""

    key: str
    group: str
    title: str
    digits: int
    scale: float
    note: str = ""


FIGURES = (
    Figure("text_to_image_r1", "R@1, %", RETRIEVAL["text_to_image"], 1, 100),
    Figure("image_to_text_r1", "R@1, %", RETRIEVAL["image_to_text"], 1, 100),
    Figure("query_auroc", "AUROC, text→image", "query-only", 3, 1, AUROC),
    Figure(
        "entropy_auroc", "AUROC, text→image", "entropy", 3, 1, f"{AUROC}; entropy of the posterior over the gallery"
    ),
)


class Gain(NamedTuple):
    """A figure of a variant and its difference from the baseline."""

    value: float
    difference: Difference | None
    adjusted: float | None  # p-value of the difference, adjusted for all variants

    @property
    def significant(self):
        """Whether the difference survives the adjustment."""
        return self.adjusted is not None and self.adjusted < LEVEL


@lru_cache(maxsize=8)
def gains_of(block):
    """The Gains of a block's variants: {figure: {variant: Gain}}; empty without a baseline to compare with.

    A query-only uncertainty is compared with the baseline's entropy over the gallery, which costs no training. Those
    that need no model stand beside the learned ones, as "clip, few words".
    Figures are means over seeds. Images are resampled, with all their captions.
    """
    base = baseline_of(block)
    if base is None or len(block.results) < 2:
        return {}
    draws = {}  # {figure: {variant: statistic (1 + B,)}}
    first = block.results[base][0].arrays
    captions, images = len(first["text_to_image_hit"]), len(first["image_to_text_hit"])
    owner = first["image_of_text"] if "image_of_text" in first else np.arange(captions)
    scene = first["group_of_image"] if "group_of_image" in first else np.arange(images)
    groups = {"text_to_image": scene[owner] if "image_of_text" in first else owner, "image_to_text": scene}
    count = max(1000, 100 * len(block.results))  # a p-value of 2 / count must survive Holm over all rows
    bootstraps = {direction: PairedBootstrap(group, count) for direction, group in groups.items()}
    for variant, runs in block.results.items():
        arrays = [_checked(run, captions, images) for run in runs]
        hits = {direction: np.stack([each[f"{direction}_hit"] for each in arrays]) for direction in RETRIEVAL}
        for direction in RETRIEVAL:
            draws.setdefault(f"{direction}_r1", {})[variant] = bootstraps[direction].mean(hits[direction])
        uncertainties = {"entropy_auroc": "text_to_image_entropy", "query_auroc": "text_uncertainty"}
        for figure, name in uncertainties.items():
            if all(name in each for each in arrays):
                uncertainty = np.stack([each[name] for each in arrays])
                auroc = bootstraps["text_to_image"].auroc(uncertainty, hits["text_to_image"])
                draws.setdefault(figure, {})[variant] = auroc
    free = {
        name: f"{base}, {title}"
        for name, title in FREE.items()
        if all(f"text_{name}" in run.arrays and np.ptp(run.arrays[f"text_{name}"]) for run in block.results[base])
    }
    hit = np.stack([run.arrays["text_to_image_hit"] for run in block.results[base]])
    for name, row in free.items():
        uncertainty = np.stack([run.arrays[f"text_{name}"] for run in block.results[base]])
        draws.setdefault("query_auroc", {})[row] = bootstraps["text_to_image"].auroc(uncertainty, hit)
    gains = {}
    for figure, by_variant in draws.items():
        against = draws["entropy_auroc"][base] if figure == "query_auroc" else by_variant[base]
        others = {variant: paired_difference(draw, against) for variant, draw in by_variant.items() if variant != base}
        tested = [variant for variant, difference in others.items() if difference]
        adjusted = dict(zip(tested, holm([others[variant].p for variant in tested]), strict=True)) if tested else {}
        gains[figure] = {
            variant: Gain(float(draw[0]), others.get(variant), adjusted.get(variant))
            for variant, draw in by_variant.items()
        }
    return gains


def _checked(run, captions, images):
    """The arrays of a Result; raises UserError unless they are of as many captions and images as the baseline's."""
    sizes = len(run.arrays["text_to_image_hit"]), len(run.arrays["image_to_text_hit"])
    if sizes != (captions, images):
        raise UserError(
            f"the arrays of {run.folder / run.path} are of {sizes[0]:,} captions and {sizes[1]:,} images, those of the"
            f" baseline of {captions:,} and {images:,}: delete it and evaluate again."
        )
    return run.arrays


def gains(block):
    """Every variant against the baseline, with intervals over images."""
    by_figure, base = gains_of(block), baseline_of(block)
    if not by_figure:
        return None
    rows = {row for by_variant in by_figure.values() for row in by_variant}
    columns, cells = [], {row: {} for row in rows | block.results.keys()}
    for figure in FIGURES:
        key, less = f"gain_{figure.key}", f"less {base}" + ("'s entropy" if figure.key == "query_auroc" else "")
        columns.append(Column(key, figure.group, figure.title, figure.digits, None, note=figure.note))
        columns.append(Column(f"{key}_less", figure.group, less, figure.digits, None, None))
        ends = ("low", "high", "adjusted_p")
        columns += [Column(f"{key}_{end}", figure.group, end, figure.digits, None, None, shown=False) for end in ends]
        for variant, gain in by_figure.get(figure.key, {}).items():
            if np.isfinite(gain.value):  # no AUROC where all answers are right, or all wrong
                cells[variant][key] = Cell(figure.scale * gain.value)
            if gain.difference:
                low, high = figure.scale * gain.difference.low, figure.scale * gain.difference.high
                mean = figure.scale * gain.difference.mean
                printed = [f"{value:+.{figure.digits}f}".replace("-", MINUS) for value in (mean, low, high)]
                mark = SIGNIFICANT if gain.significant else ""
                text = f"{printed[0]} [{printed[1]}, {printed[2]}]{mark}"
                cells[variant] |= {f"{key}_less": Cell(mean, text=text), f"{key}_low": Cell(low)}
                cells[variant] |= {f"{key}_high": Cell(high), f"{key}_adjusted_p": Cell(gain.adjusted)}
    groups = rows_of(block, columns, cells=lambda runs, _: cells[runs[0].values["variant"]])
    free = [Row(row, None, None, cells[row]) for row in sorted(rows - block.results.keys())]
    note = (
        "In brackets: the 95 % bootstrap interval of the difference over images, each drawn with all its captions."
        f" {SIGNIFICANT}: p < {LEVEL} after Holm's adjustment over the rows. This is the sampling error of the images;"
        " the spread over seeds stands in the other tables. An AUROC is of a method's own answers: where these differ,"
        " compare AURC as well."
    )
    if "image_of_text" not in block.results[base][0].arrays:
        note += " These results do not hold which captions share an image, so captions were drawn singly."
    return make("gains", f"Against {base}", columns, groups, note, free)
