"""Figures of results; the only importer of matplotlib."""

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MultipleLocator, NullFormatter, StrMethodFormatter

from utils.files import atomic
from utils.tables import level_recalls

# Hues that the color-blind tell apart (after Okabe and Ito), dark enough for paper or light enough for a dark page.
THEMES = {
    "light": {
        "ink": "#1f2328", "grid": "#dfe3e8", "limit": "#6e7781", "points": "#a3abb5",
        "colors": ("#0072b2", "#d55e00", "#00876c", "#b0479a", "#9a7400", "#5b4fc7", "#8c2d19"),
    },
    "dark": {
        "ink": "#d7dbe0", "grid": "#343b44", "limit": "#9aa4af", "points": "#69727d",
        "colors": ("#56b4e9", "#f0884a", "#3cc7a2", "#dd8fce", "#e0b84c", "#a79cf5", "#e5846f"),
    },
}  # fmt: skip
MARKERS = "osD^vPXp"  # one more than there are colors, so that both repeat only after 56 variants
WIDE = 6.4  # inches; what is drawn narrower is for a small screen
POINTS = 1500  # captions drawn as points in one panel
BINS, FEWEST = 12, 10  # bins of ambiguity, and the fewest captions that say something about one
PERCENTILES = (10, 50, 90)


def recall_by_level(block, place, theme="light", width=WIDE):
    """R@1 (%) over the uncertainty levels of the captions, a line per variant; None where no variant has levels.

    block: tables.Block. place: dict of variant to its number in the palette. width: inches.
    """
    lines = {variant: cells for variant, runs in block.results.items() if (cells := level_recalls(runs))}
    if not lines:
        return None
    levels = np.arange(1, block.any["uncer_levels"] + 1)
    with matplotlib.rc_context(_style(theme)):
        across = max(1, int(12 * width / (8 + max(map(len, lines)))))  # entries of the legend in one line
        figure = Figure(figsize=(width, 3.3 + 0.19 * -(-(len(lines) + 1) // across)), layout="constrained")
        axes = figure.subplots()
        for variant, cells in lines.items():
            color, marker = _mark(theme, place[variant])
            mean, sd = np.array([(cell.mean, cell.sd or 0) for cell in cells]).T
            axes.fill_between(levels, mean - sd, mean + sd, color=color, alpha=0.25, linewidth=0)
            axes.plot(levels, mean, color=color, marker=marker, label=variant)
        if "bayes_optimal" in block.any:
            limits = 100 * np.array(block.any["bayes_optimal"]["levels"])
            axes.plot(levels, limits, color=THEMES[theme]["limit"], linestyle="--", label="Bayes-optimal")
        axes.set(xlabel="Uncertainty level of the caption (1 = least uncertain)", ylabel="R@1, text→image (%)")
        axes.set_xticks(levels[:: -(-len(levels) // 20)])
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=min(across, len(lines) + 1))
    return figure


def uncertainty_against_ambiguity(samples, place, theme="light", width=WIDE):
    """Uncertainty over true ambiguity, a panel per variant: captions as points, medians and 10-90 % bands per bin.

    samples: dict of variant to (ambiguity (M,) in nats, uncertainty (M,), their Spearman correlation). place: dict of
    variant to its number in the palette. width: inches. None without samples.
    """
    if not samples:
        return None
    columns = min(3, len(samples)) if width >= WIDE else 1
    rows = -(-len(samples) // columns)
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=(width, 2.9 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (variant, (ambiguity, uncertainty, spearman)) in zip(panels, samples.items(), strict=False):
            _ambiguity_panel(axes, ambiguity, uncertainty, theme, place[variant])
            axes.set_title(f"{variant}\nSpearman {spearman:.3f}")
        for axes in panels[len(samples) :]:
            axes.remove()
    return figure


def _ambiguity_panel(axes, ambiguity, uncertainty, theme, number):
    color, marker = _mark(theme, number)
    some = slice(None, None, -(-len(ambiguity) // POINTS))
    # Pixels, for a thousand vector dots make a page slow and a file large.
    points = {"color": THEMES[theme]["points"], "markersize": 2.5, "alpha": 0.5}
    axes.plot(ambiguity[some], uncertainty[some], ".", rasterized=True, **points)
    at, (low, middle, high) = binned(ambiguity, uncertainty)
    axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0)
    axes.plot(at, middle, color=color, marker=marker)
    if 0 < 10 * uncertainty.min() < uncertainty.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.set(xlabel="True ambiguity (nats)", ylabel="Uncertainty (own scale)")
    counts = 10.0 ** np.arange(0, np.log10(np.exp(ambiguity.max())) + 1e-9)
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(np.log(counts)))
    top.set_xticks(np.log(counts), labels=[f"{count:,.0f}" for count in counts])
    top.set_xlabel("Matching images")


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
    # Letters as text, in a font of the reader's: drawn as curves they are most of a page's size.
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _mark(theme, number):
    colors = THEMES[theme]["colors"]
    return colors[number % len(colors)], MARKERS[number % len(MARKERS)]


def _style(theme):
    ink, grid = THEMES[theme]["ink"], THEMES[theme]["grid"]
    colors = {f"{name}.color": ink for name in ("text", "xtick", "ytick")}
    return colors | {
        "axes.labelcolor": ink, "axes.edgecolor": ink, "axes.titlecolor": ink, "grid.color": grid,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.linewidth": 0.8,
        "font.size": 9, "axes.titlesize": 9, "legend.frameon": False, "lines.markersize": 4.5, "lines.linewidth": 1.5,
    }  # fmt: skip
