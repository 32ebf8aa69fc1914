"""Figures of results; the only importer of matplotlib."""

import io
from itertools import groupby
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, StrMethodFormatter

from utils.files import atomic
from utils.tables import is_unified, level_recalls

# Hues that the color-blind tell apart (after Okabe and Ito), dark enough for paper or light enough for a dark page.
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2328", "grid": "#dfe3e8", "limit": "#6e7781", "points": "#a3abb5",
        "colors": ("#0072b2", "#d55e00", "#00876c", "#b0479a", "#9a7400", "#5b4fc7", "#8c2d19"),
    },
    "dark": {
        "paper": "#15181c", "ink": "#d7dbe0", "grid": "#343b44", "limit": "#9aa4af", "points": "#69727d",
        "colors": ("#56b4e9", "#f0884a", "#3cc7a2", "#dd8fce", "#e0b84c", "#a79cf5", "#e5846f"),
    },
}  # fmt: skip
MARKERS = "osD^v<>p"  # solid or hollow; one more than there are colors, so that both repeat only after 56 variants
TOGETHER = 4  # lines of a method in one panel
WIDE = 6.4  # inches; what is drawn narrower is for a small screen
POINTS = 1000  # captions drawn as points in one panel
BINS, FEWEST = 12, 10  # bins of ambiguity, and the fewest captions that say something about one
PERCENTILES = (10, 50, 90)


class Look(NamedTuple):
    """How a variant is drawn."""

    number: int  # in the palette
    unified: bool  # trained by the unified objective: hollow markers, and dashes


def looks(blocks):
    """Give each variant that has levels its Look, the same in every figure: dict of variant to Look.

    A variant and its twin of the other objective share a color.
    """
    drawn = {name: runs for block in blocks for name, runs in block.results.items() if level_recalls(runs)}
    twins = {name: tuple(part for part in name.split("+") if part != "infonce") for name in drawn}
    numbers = {twin: number for number, twin in enumerate(sorted(set(twins.values())))}
    return {name: Look(numbers[twins[name]], is_unified(runs)) for name, runs in drawn.items()}


def recall_by_level(block, looks, theme="light", width=WIDE):
    """R@1 (%) over the uncertainty levels of the captions, a line per variant; None where no variant has levels.

    As long as each line has a color of its own they share one panel; more lines stand apart by method, before the
    others in gray. block: tables.Block. looks: dict of variant to Look. width: inches.
    """
    lines = {variant: cells for variant, runs in block.results.items() if (cells := level_recalls(runs))}
    if not lines:
        return None
    together = len(lines) <= len(THEMES[theme]["colors"])
    panels = [list(lines)] if together else _by_method(lines, looks)
    columns = 1 if together else 3 if width >= WIDE else 2
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_style(theme)):
        across = max(1, int(12 * width / (8 + max(map(len, lines)))))  # entries of the legend in one line
        legend = -(-(len(lines) + 1) // across) if together else 1
        height = 3.3 if together else rows * (1.35 + 0.16 * max(map(len, panels))) + 0.2
        figure = Figure(figsize=(width, height + 0.19 * legend), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, shown in zip(grid, panels, strict=False):
            handles, context = _level_panel(axes, block, lines, shown, looks, theme)
            if not together:  # in the panel a legend would hide lines
                axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.04, 1), fontsize=8, borderpad=0)
        for axes in grid[len(panels) :]:
            axes.remove()
        over, up = "Uncertainty level of the caption (1 = least uncertain)", "R@1, text→image (%)"
        if together:
            axes.set(xlabel=over, ylabel=up)
            figure.legend(handles=[*handles, *context], loc="outside lower center", ncols=min(across, len(lines) + 1))
        else:
            figure.supxlabel(over, fontsize=9)
            figure.supylabel(up, fontsize=9)
            figure.legend(handles=context, loc="outside upper center", ncols=2)
    return figure


def _by_method(lines, looks):
    """Split variants into panels: those of a method, each beside its twin, and few enough to be told apart."""
    ordered = sorted(lines, key=lambda variant: looks[variant])
    methods = [list(group) for _, group in groupby(ordered, key=lambda variant: variant.partition("+")[0])]
    return [group[i : i + TOGETHER] for group in methods for i in range(0, len(group), TOGETHER)]


def _level_panel(axes, block, lines, shown, looks, theme):
    """Draw the lines of `shown` before the others in gray; returns their handles, and those of others and limit."""
    levels = np.arange(1, block.any["uncer_levels"] + 1)
    handles, context = [], []
    others = [[*(cell.mean for cell in cells), np.nan] for variant, cells in lines.items() if variant not in shown]
    if others:  # one path with gaps, for many would make a page large
        over = np.tile([*levels, np.nan], len(others))
        faint = {"color": THEMES[theme]["points"], "linewidth": 0.7, "alpha": 0.6}
        context += axes.plot(over, np.concatenate(others), label="other variants", **faint)
    for variant in shown:
        style = _mark(theme, looks[variant])
        mean, sd = np.array([(cell.mean, cell.sd or 0) for cell in lines[variant]]).T
        axes.fill_between(levels, mean - sd, mean + sd, color=style["color"], alpha=0.25, linewidth=0)
        handles += axes.plot(levels, mean, label=variant, **style)
    if "bayes_optimal" in block.any:
        limits = 100 * np.array(block.any["bayes_optimal"]["levels"])
        context += axes.plot(levels, limits, color=THEMES[theme]["limit"], linestyle=":", label="Bayes-optimal")
    axes.set_xticks(levels[:: -(-len(levels) // (20 if len(shown) == len(lines) else 5))])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    return handles, context


def uncertainty_against_ambiguity(samples, looks, theme="light", width=WIDE):
    """Uncertainty over true ambiguity, a panel per variant: captions as points, medians and 10-90 % bands per bin.

    samples: dict of variant to (ambiguity (M,) in nats, uncertainty (M,), their Spearman correlation). looks: dict of
    variant to Look. width: inches. None without samples.
    """
    if not samples:
        return None
    columns = min(3, len(samples)) if width >= WIDE else 1
    rows = -(-len(samples) // columns)
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(width, 0.9 + 2 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for i, (variant, (ambiguity, uncertainty, spearman)) in enumerate(samples.items()):
            axes = panels[i]
            counts = _ambiguity_panel(axes, ambiguity, uncertainty, theme, looks[variant])
            axes.set_title(f"{variant}\nSpearman {spearman:.3f}")
            if i < columns:  # the same captions in every panel: their counts are said once
                counts.set_xlabel("Matching images")
            if i + columns >= len(samples):
                axes.set_xlabel("True ambiguity (nats)")
        for axes in panels[len(samples) :]:
            axes.remove()
        figure.supylabel("Uncertainty (own scale)", fontsize=9)
    return figure


def _ambiguity_panel(axes, ambiguity, uncertainty, theme, look):
    """Draw one variant's panel; returns its upper axis, of how many images match."""
    style = _mark(theme, look)
    some = slice(None, None, -(-len(ambiguity) // POINTS))
    # Pixels, for a thousand vector dots make a page slow and a file large.
    points = {"color": THEMES[theme]["points"], "markersize": 2.5, "alpha": 0.5}
    axes.plot(ambiguity[some], uncertainty[some], ".", rasterized=True, **points)
    at, (low, middle, high) = binned(ambiguity, uncertainty)
    axes.fill_between(at, low, high, color=style["color"], alpha=0.3, linewidth=0)
    axes.plot(at, middle, **style)
    if 0 < 10 * uncertainty.min() < uncertainty.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MultipleLocator(2))
    counts = 10.0 ** np.arange(0, np.log10(np.exp(ambiguity.max())) + 1e-9)
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(np.log(counts)))
    top.set_xticks(np.log(counts), labels=[f"{count:,.0f}" for count in counts])
    return top


def binned(ambiguity, uncertainty):
    """Percentiles of uncertainty in bins of equal width in ambiguity: mean ambiguity (B,), percentiles (3, B)."""
    edges = np.linspace(0, ambiguity.max(), BINS + 1)
    bins = np.digitize(ambiguity, edges[1:-1])
    full = [bins == i for i in range(BINS) if (bins == i).sum() >= FEWEST]
    at = np.array([ambiguity[rows].mean() for rows in full])
    return at, np.array([np.percentile(uncertainty[rows], PERCENTILES) for rows in full]).reshape(-1, 3).T


def save(figure, stem):
    """Write a figure as `<stem>.png` and `<stem>.pdf`, with the same bytes each time."""
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"dpi": 300, "metadata": {"CreationDate": None}})):
        with atomic(stem.with_name(stem.name + suffix)) as partial, matplotlib.rc_context({"pdf.fonttype": 42}):
            figure.savefig(partial, format=suffix[1:], facecolor="white", **options)


def svg(figure):
    """A figure as SVG with a transparent background, with the same bytes each time."""
    file = io.BytesIO()
    # Letters as text, in a font of the reader's: drawn as curves they are most of a page's size. The fonts are named
    # again at every one, so let them be few.
    text = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}
    with matplotlib.rc_context({"svg.hashsalt": "report"} | text):
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _mark(theme, look):
    colors = THEMES[theme]["colors"]
    mark = {"color": colors[look.number % len(colors)], "marker": MARKERS[look.number % len(MARKERS)]}
    return mark | ({"linestyle": (0, (3, 1)), "markerfacecolor": THEMES[theme]["paper"]} if look.unified else {})


def _style(theme):
    ink, grid = THEMES[theme]["ink"], THEMES[theme]["grid"]
    colors = {f"{name}.color": ink for name in ("text", "xtick", "ytick")}
    return colors | {
        "axes.labelcolor": ink, "axes.edgecolor": ink, "axes.titlecolor": ink, "grid.color": grid,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.linewidth": 0.8,
        "font.size": 9, "axes.titlesize": 9, "legend.frameon": False, "lines.markersize": 4.5, "lines.linewidth": 1.5,
    }  # fmt: skip
