"""The list of all figures, and how they look: colors, markers, layout, files."""

import io
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from reporting.runs import has_uncertainty, is_unified
from utils.files import write_bytes

# Hues that the color-blind tell apart (after Okabe and Ito), dark enough for paper or light enough for a dark page.
# Figures are drawn in light colors; a page replaces them by its own, so no color may occur twice.
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2328", "grid": "#dfe3e8", "limit": "#6e7781", "others": "#a3abb5",
        "colors": ("#0072b2", "#d55e00", "#00876c", "#b0479a", "#9a7400", "#5b4fc7", "#8c2d19"),
    },
    "dark": {
        "paper": "#15181c", "ink": "#d7dbe0", "grid": "#343b44", "limit": "#9aa4af", "others": "#69727d",
        "colors": ("#56b4e9", "#f0884a", "#3cc7a2", "#dd8fce", "#e0b84c", "#a79cf5", "#e5846f"),
    },
}  # fmt: skip
LIGHT = THEMES["light"]
MARKERS = "o^sDv<>P"  # one more than there are colors, so both repeat only after 56 variants
WIDE = 6.4  # inches; narrower figures are for small screens


class Drawing(NamedTuple):
    """A registered figure."""

    name: str  # of its files
    title: str
    caption: str
    draw: Callable  # of a part, looks and width (inches): a matplotlib figure, or None where there is nothing to draw
    line_per_method: bool


REGISTERED = {}  # {task: list of Drawings}


def figure(tasks, title, caption, line_per_method=False):
    """Decorate a function that draws parts of these tasks: it appears in every report, under its title and caption.

    line_per_method: whether each method has its own line style, which the caption then explains.
    """

    def register(draw):
        for task in tasks:
            drawing = Drawing(draw.__name__, title, caption, draw, line_per_method)
            REGISTERED.setdefault(task, []).append(drawing)
        return draw

    return register


def drawings(part):
    """The figures that a part may have: list of Drawings."""
    return REGISTERED.get(part.task, [])


def names():
    """The names of all registered figures."""
    return {drawing.name for drawings in REGISTERED.values() for drawing in drawings}


class Look(NamedTuple):
    """How a variant is drawn."""

    number: int | None  # in the palette; None for gray, where it has no uncertainty
    unified: bool  # trained by the unified objective: hollow markers and dashes


def looks(blocks):
    """Give each variant of runs.Blocks its Look, the same in every figure: dict of variant to Look.

    A variant and its twin of the other objective share a color.
    """
    variants = [item for block in blocks for item in block.results.items()]
    unified = {name: is_unified(runs) for name, runs in variants}
    twins = {name: tuple(part for part in name.split("+") if part != "infonce") for name in unified}
    colored = sorted({twins[name] for name, runs in variants if has_uncertainty(runs[0])})
    return {
        name: Look(colored.index(twins[name]) if twins[name] in colored else None, unified[name]) for name in unified
    }


def lay_out(figure):
    """Place the parts of a figure once and for all: matplotlib would do so again for every file."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def save(figure, stem):
    """Write a figure as `<stem>.png` and `<stem>.pdf`, with the same bytes each time."""
    lay_out(figure)
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"dpi": 300, "metadata": {"CreationDate": None}})):
        content = io.BytesIO()
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            figure.savefig(content, format=suffix[1:], facecolor="white", **options)
        write_bytes(stem.with_name(stem.name + suffix), content.getbuffer())


def svg(figure, name):
    """A figure as an SVG element for a page, the same text each time.

    Its colors are the page's `variables`, and it fills the width of its place. name: unique on the page, so that no two
    figures share an id.
    """
    lay_out(figure)
    file = io.StringIO()
    # Letters as text in the reader's font: as curves they would be most of a page's size. Every letter names all fonts.
    options = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}
    with matplotlib.rc_context({"svg.hashsalt": "report"} | options):
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', text).group()
    # Style rules would hold for the whole page: the two that matplotlib writes become attributes of the root.
    body = re.sub(r"^.*?</metadata>|<style.*?</style>|</svg>\s*$", "", text, flags=re.DOTALL)
    hues = {hue: f"var(--{variable})" for variable, hue in variables("light").items()}
    body = re.sub("|".join(hues), lambda match: hues[match.group()], body)
    # Ids become numbers, as some of matplotlib's change from run to run; unused ones are dropped.
    used = {old: f"{name}-{i}" for i, old in enumerate(dict.fromkeys(re.findall(r"#([\w-]+)[\")]", body)))}
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{used[match[1]]}"' if match[1] in used else "", body)
    body = re.sub(r"#([\w-]+)([\")])", lambda match: f"#{used[match[1]]}{match[2]}", body)
    # Fewer digits: hundredths of a point are invisible. Only inside tags; the rest is text.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d\.\d\d)\d+", "", tag.group()), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg {box} aria-hidden="true" stroke-linejoin="round" stroke-linecap="butt">{body}</svg>'


def variables(theme):
    """The colors that an SVG takes from its page: {name of a CSS variable: color}."""
    single = {f"figure-{name}": hue for name, hue in THEMES[theme].items() if name != "colors"}
    return single | {f"figure-{i}": hue for i, hue in enumerate(THEMES[theme]["colors"])}


def mark(look):
    colors = LIGHT["colors"] if look.number is not None else [LIGHT["limit"]]
    markers = MARKERS if look.number is not None else "x"
    number = look.number or 0
    mark = {"color": colors[number % len(colors)], "marker": markers[number % len(markers)]}
    return mark | ({"linestyle": (0, (3, 1)), "markerfacecolor": LIGHT["paper"]} if look.unified else {})


def rc():
    colors = {f"{name}.color": LIGHT["ink"] for name in ("text", "xtick", "ytick")}
    return colors | {
        "axes.labelcolor": LIGHT["ink"], "axes.edgecolor": LIGHT["ink"], "axes.titlecolor": LIGHT["ink"],
        "grid.color": LIGHT["grid"], "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.linewidth": 0.8, "font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "axes.titley": 1.0,  # where it is anyway: matplotlib measures all that stands above a panel to find out
        "legend.frameon": False, "lines.markersize": 4.5, "lines.linewidth": 1.5,
        "text.parse_math": False,  # a name is no formula, whatever it holds
    }  # fmt: skip


def parts(width, heights, below, across=1):
    """A figure of parts over and beside one another: it, and pairs of a part and the place below it for a legend.

    heights: of the parts, in inches. below: of what is below each.
    """
    down = len(heights) // across
    heights = heights[:down]
    figure = Figure(figsize=(width, sum(heights) + below * down), layout="constrained")
    ratios = [ratio for height in heights for ratio in (height, below)]
    grid = figure.subfigures(2 * down, across, squeeze=False, height_ratios=ratios)
    return figure, list(zip(grid[::2].ravel(), grid[1::2].ravel()))


def legend_columns(labels, width):
    """The number of columns in which a legend of these labels fits into `width` inches."""
    return max(1, int(width / (0.55 + 0.075 * max(map(len, labels)))))


def finish_grid(grid, count, columns):
    """Finish a grid of panels (P,) of which `count` are used: one scale for all, which the outer ones label.

    matplotlib's own shared axes do the same in a time that grows with the square of their number.
    """
    for axes in grid[count:]:
        axes.remove()
    for name in "xy":
        scales = [getattr(axes, f"get_{name}lim")() for axes in grid[:count]]
        for axes in grid[:count]:
            axes.set(**{f"{name}lim": (min(low for low, _ in scales), max(high for _, high in scales))})
    for i, axes in enumerate(grid[:count]):
        axes.tick_params(labelbottom=i + columns >= count, labelleft=i % columns == 0)
        unlabelled(axes)


def unlabelled(*panels):
    """Tell that panels have no axis labels: matplotlib measures all tick labels to place even an empty one."""
    for axis in (axis for axes in panels for axis in (axes.xaxis, axes.yaxis)):
        axis.set_label_coords(0, 0)


def spans_decades(values):
    return 0 < 10 * values.min() < values.max()


def few_ticks(axis):
    """Label a logarithmic axis in plain numbers, between powers of ten only where there are few of those."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high < 300 * low else (1,), numticks=5))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def log_ticks(axes, values):
    """A logarithmic axis for a few whole numbers, some of which are named."""
    axes.set_xscale("log")
    shown = values[:: math.ceil(len(values) / 6)]
    axes.set_xticks(shown, labels=[f"{value:,}" for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())
