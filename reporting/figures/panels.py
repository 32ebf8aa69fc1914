"""Figures of evaluations with a panel per method: reliability, ambiguity, distributions."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator

from reporting.figures import style
from reporting.runs import TASKS
from reporting.words import DIRECTIONS, MINUS

DOTS = "#868e97"  # visible on light and on dark pages, as pixels do not change their color
POINTS = 1000  # queries drawn as points in one panel
BINS, FEWEST = 12, 10  # bins of ambiguity, and the fewest queries for which one is drawn
BARS = 30  # bins of a histogram
PERCENTILES = (10, 50, 90)


@style.figure(
    TASKS,
    "Reliability",
    "Whether the probability of the best answer is the share of such answers that are right: on the diagonal it is."
    " Above it a method is underconfident, below it overconfident. The larger a marker, the more queries in its bin."
    " The captions of an image share the probability of being its answer. ECE: expected calibration error (15 bins),"
    " before and after temperature scaling on the other half of the queries; matched: that of plain cosines at a"
    " classifier's matched temperature. First seed.",
)
def reliability(block, looks, width=style.WIDE):
    """Share of right answers over confidence in the best one, a panel per variant and direction; None where unknown.

    Of first seeds, before and after temperature scaling; a marker's area is the share of queries in its bin. Of a
    matched temperature the title gives the ECE alone. Arguments as for recall_by_level.
    """
    grids = {}
    for direction in block.directions:
        parts = {variant: runs[0].values[direction].get("calibration") for variant, runs in block.results.items()}
        grids[direction] = {variant: part for variant, part in parts.items() if part}
    grids = {direction: panels for direction, panels in grids.items() if panels}
    if not grids:
        return None
    wide, most = width >= style.WIDE, max(map(len, grids.values()))
    across = len(grids) if wide and most <= 2 else 1
    columns = min((4 if wide else 2) // across, most)
    height = 0.45 + (1.3 if wide else 1.45)
    with matplotlib.rc_context(style.rc()):
        heights = [0.6 + math.ceil(len(panels) / columns) * height for panels in grids.values()]
        in_line = 3 if wide and across == 1 else 2
        figure, parts = style.parts(width, heights, 0.25 if in_line == 3 else 0.45, across)
        for (part, legend), (direction, panels) in zip(parts, grids.items()):
            part.suptitle(DIRECTIONS[direction], fontsize=9)
            rows = math.ceil(len(panels) / columns)
            grid = part.subplots(rows, columns, squeeze=False).ravel()
            for axes, (variant, calibration) in zip(grid, panels.items()):
                handles = _reliability_panel(axes, variant, calibration, looks[variant])
            style.finish_grid(grid, len(panels), columns)
            part.supxlabel("Confidence in the best answer (%)", fontsize=9)
            part.supylabel("Right answers (%)", fontsize=9)
            legend.legend(handles=handles, loc="center", ncols=in_line, fontsize=8)
    return figure


def _reliability_panel(axes, variant, calibration, look):
    """Draw the bins of one variant; returns handles for a legend that holds for all."""
    color, handles = style.mark(look)["color"], []
    handles += axes.plot([0, 100], [0, 100], color=style.LIGHT["limit"], linestyle=":", linewidth=1, label="calibrated")
    for name, title in (("model", "unscaled"), ("temperature", "after temperature scaling")):
        if name not in calibration:
            continue
        bins = calibration[name]["reliability"]
        count, x, y = (np.array(bins[key], dtype=float) for key in ("count", "confidence", "accuracy"))
        face = color if name == "model" else style.LIGHT["paper"]
        dash = "-" if name == "model" else (0, (3, 1))
        axes.plot(100 * x, 100 * y, color=color, linestyle=dash, linewidth=1)
        size = 4 + 90 * count / count.sum()  # visible even with few queries
        axes.scatter(100 * x, 100 * y, size, facecolor=face, edgecolor=color, linewidth=0.9, zorder=3)
        ink = {"color": style.LIGHT["ink"], "linestyle": dash, "linewidth": 1, "marker": "o"}
        face = style.LIGHT["ink" if name == "model" else "paper"]
        handles.append(Line2D([], [], label=title, **ink, markerfacecolor=face))
    errors = [f"{calibration[name]['ece_15']:.3f}" for name in ("model", "temperature") if name in calibration]
    # A third curve would hide the others.
    matched = f"\nmatched {calibration['matched']['ece_15']:.3f}" if "matched" in calibration else ""
    axes.set_title(f"{variant}\nECE {' → '.join(errors)}{matched}", fontsize=8)
    axes.set(xlim=(-4, 104), ylim=(-4, 104), xticks=(0, 50, 100), yticks=(0, 50, 100))
    axes.set_box_aspect(0.85)  # centered in its place
    axes.grid()
    return handles


@style.figure(
    TASKS,
    "Uncertainty against true ambiguity",
    "Each dot is a query (a sample of them). A faithful uncertainty rises with ambiguity. Line: median; band: the"
    " middle 80 % of queries. First seed.",
    line_per_method=True,
)
def uncertainty_against_ambiguity(block, looks, width=style.WIDE):
    """Uncertainty over true ambiguity, a panel per variant: queries as points, medians and 10-90 % bands per bin.

    Ambiguity: of a caption the log of the number of matching images; of a classified image the entropy of people's
    labels. Of first seeds; None where it is unknown. Arguments as for recall_by_level.
    """
    samples = {variant: sample for variant, runs in block.results.items() if (sample := _sample(runs[0]))}
    if not samples:
        return None
    human = block.task == "classification"
    columns = min(3, len(samples)) if width >= style.WIDE else min(2, len(samples))
    rows = math.ceil(len(samples) / columns)
    with matplotlib.rc_context(style.rc() | {"axes.titley": None}):  # above the axis at the top
        figure = Figure(figsize=(width, 0.9 + 1.75 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for i, (variant, (ambiguity, uncertainty, spearman)) in enumerate(samples.items()):
            axes = panels[i]
            _ambiguity_panel(axes, ambiguity, uncertainty, looks[variant])
            correlation = f"{spearman:.3f}".replace("-", MINUS)
            axes.set_title(f"{variant}\nSpearman {correlation}", fontsize=8)
            if i < columns and not human:  # all panels have the same captions: one row of counts
                counts = 10.0 ** np.arange(0, np.log10(np.exp(ambiguity.max())) + 1e-9)
                top = axes.secondary_xaxis("top")
                top.xaxis.set_major_locator(FixedLocator(np.log(counts)))
                top.set_xticks(np.log(counts), labels=[f"{count:,.0f}" for count in counts], fontsize=8)
                top.set_xlabel("Matching images", fontsize=8)
        for axes in panels[len(samples) :]:
            axes.remove()
        style.unlabelled(*panels[: len(samples)])
        figure.supxlabel("Entropy of human labels (nats)" if human else "True ambiguity (nats)", fontsize=9)
        figure.supylabel("Uncertainty (own scale)", fontsize=9)
    return figure


def _sample(result):
    """A result's ambiguity (Q,), uncertainty (Q,), and their Spearman correlation; None where it lacks one."""
    if "image_to_class" in result.values:
        part = result.values["image_to_class"]
        record, names = part["uncertainty"].get(part["levels_by"]), ("human_entropy", "image_to_class_uncertainty")
    elif "text_to_image" in result.values:
        part = result.values["text_to_image"]
        record, names = part["uncertainty"].get("query"), ("ambiguity", "text_uncertainty")
    else:
        return None
    if not record or "spearman" not in record:
        return None
    return *(result.arrays[name] for name in names), record["spearman"]


def _ambiguity_panel(axes, ambiguity, uncertainty, look):
    options = style.mark(look) | {"markersize": 3.5}
    step = math.ceil(len(ambiguity) / POINTS)
    # Pixels, as a thousand vector dots make a page slow and a file large.
    axes.plot(ambiguity[::step], uncertainty[::step], ".", rasterized=True, color=DOTS, markersize=2.5, alpha=0.5)
    centers, (low, middle, high) = binned(ambiguity, uncertainty)
    axes.fill_between(centers, low, high, color=options["color"], alpha=0.3, linewidth=0)
    axes.plot(centers, middle, **options)
    if style.spans_decades(uncertainty):
        axes.set_yscale("log")
        style.few_ticks(axes.yaxis)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def percentile_ranks(uncertainty):
    """Ranks (Q,) of uncertainties in percent: their units differ by method, ranks do not."""
    _, place, count = np.unique(uncertainty, return_inverse=True, return_counts=True)  # scipy.stats loads in a second
    ranks = np.cumsum(count) - (count - 1) / 2  # the middle of those that ties share
    return 100 * (ranks[place] - 0.5) / len(uncertainty)


def bins_of(ambiguity):
    """Masks (Q,) of the bins of equal width in ambiguity that hold enough queries: list."""
    bins = np.digitize(ambiguity, np.linspace(0, ambiguity.max(), BINS + 1)[1:-1])
    return [bins == i for i in range(BINS) if (bins == i).sum() >= FEWEST]


def binned(ambiguity, uncertainty):
    """Percentiles of uncertainty in bins of ambiguity: mean ambiguity (B,), percentiles (3, B)."""
    bins = bins_of(ambiguity)
    centers = np.array([ambiguity[rows].mean() for rows in bins])
    return centers, np.array([np.percentile(uncertainty[rows], PERCENTILES) for rows in bins]).reshape(-1, 3).T


@style.figure(
    TASKS,
    "Distributions of uncertainty",
    "Uncertainties of captions and of images; each method has its own scale and unit. First seed.",
)
def uncertainty_distributions(block, looks, width=style.WIDE):
    """Histograms of captions' and images' uncertainties, a panel per variant on its own scale; None without any.

    Of first seeds. Arguments as for recall_by_level.
    """
    samples = {variant: _uncertainties(runs[0]) for variant, runs in block.results.items()}
    samples = {variant: arrays for variant, arrays in samples.items() if arrays}
    if not samples:
        return None
    columns = min(3, len(samples)) if width >= style.WIDE else min(2, len(samples))
    rows = math.ceil(len(samples) / columns)
    with matplotlib.rc_context(style.rc()):
        figure = Figure(figsize=(width, 0.8 + 1.35 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (variant, arrays) in zip(panels, samples.items()):
            _histograms(axes, arrays, style.mark(looks[variant])["color"], 4 if width >= style.WIDE else 2)
            axes.set_title(variant, fontsize=8)
        for axes in panels[len(samples) :]:
            axes.remove()
        style.unlabelled(*panels[: len(samples)])
        figure.supxlabel("Uncertainty (own scale)", fontsize=9)
        figure.supylabel("Share per bin (%)", fontsize=9)
        handles = {
            "captions": Patch(facecolor=style.LIGHT["others"], edgecolor=style.LIGHT["ink"], label="captions"),
            "images": Patch(fill=False, edgecolor=style.LIGHT["ink"], linestyle=(0, (3, 1)), label="images"),
        }
        drawn = {name for arrays in samples.values() for name in arrays}
        shown = [handle for name, handle in handles.items() if name in drawn]
        figure.legend(handles=shown, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _uncertainties(result):
    """The uncertainties of a result: dict of "captions", "images" to arrays."""
    part = result.values.get("image_to_class")
    if part:  # its array is of the uncertainty that levels follow, which need not be the image's
        return {"images": result.arrays["image_to_class_uncertainty"]} if part["levels_by"] == "query" else {}
    if "text_to_image" not in result.values:
        return {}
    names = {"captions": "text_uncertainty", "images": "image_uncertainty"}
    return {title: result.arrays[name] for title, name in names.items() if name in result.arrays}


def _histograms(axes, samples, color, ticks):
    every = np.concatenate(list(samples.values()))
    low, high = every.min(), every.max()
    if low == high:
        axes.axvline(low, color=color)
        axes.set_xlim(low - 1, low + 1)
        axes.text(0.97, 0.9, "all the same", transform=axes.transAxes, ha="right", va="top", fontsize=8)
        axes.set_xticks([low], labels=[f"{low:.3g}".replace("-", MINUS)])
        axes.set_yticks([])
        return
    log = style.spans_decades(every)
    edges = np.geomspace(low, high, BARS + 1) if log else np.linspace(low, high, BARS + 1)
    edges[[0, -1]] = low, high  # rounding would lose the last one
    for name, values in samples.items():
        share = 100 * np.histogram(values, edges)[0] / len(values)
        if name == "captions":
            axes.stairs(share, edges, fill=True, color=color, alpha=0.35)
        axes.stairs(share, edges, color=color, linestyle="-" if name == "captions" else (0, (3, 1)), linewidth=1.2)
    if log:
        axes.set_xscale("log")
        style.few_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylim(bottom=0)
