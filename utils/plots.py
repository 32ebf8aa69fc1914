"""Figures of results; the only importer of matplotlib."""

import io
import re
import textwrap
from collections import Counter
from functools import partial
from itertools import groupby
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from scipy import stats

from metrics.uncertainty import risk_coverage as risks
from utils import factor_traces, paper_tables
from utils.curves import ORDER, SCALE, TITLES, curves
from utils.files import atomic
from utils.paper_tables import is_unified
from utils.results import TASKS, has_uncertainty
from utils.tables import MINUS, NONE
from utils.terminal import followed

# Hues that the color-blind tell apart (after Okabe and Ito), dark enough for paper or light enough for a dark page.
# Figures are drawn in light colors; a page puts its own in their place, so that none may stand twice.
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
DOTS = "#868e97"  # what is drawn as pixels keeps its color: seen on light and on dark
MARKERS = "osD^v<>p"  # solid or hollow; one more than there are colors, so that both repeat only after 56 variants
TOGETHER = 4  # lines in one panel
WIDE = 6.4  # inches; what is drawn narrower is for a small screen
POINTS = 1000  # queries drawn as points in one panel
COVERAGES, FIRST = 50, 0.05  # points of a risk-coverage curve, and coverage of the first: fewer queries say too little
BINS, FEWEST = 12, 10  # bins of ambiguity, and the fewest queries that say something about one
BARS = 30  # bins of a histogram
PERCENTILES = (10, 50, 90)
SIDES = paper_tables.SIDES | paper_tables.CLASSES


class Look(NamedTuple):
    """How a variant is drawn."""

    number: int | None  # in the palette; None, which is gray, where it has no uncertainty of its own
    unified: bool  # trained by the unified objective: hollow markers, and dashes


class Line(NamedTuple):
    """One variant's line in a comparison, and its band if it has one."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    mark: str = ""  # behind its name in the legend


class Group(NamedTuple):
    """The lines that stand under one title, and what is drawn beside them in every panel: list of (Line, style)."""

    title: str
    lines: dict
    context: list


def looks(blocks):
    """Give each variant its Look, the same in every figure: dict of variant to Look.

    A variant and its twin of the other objective share a color.
    """
    found = [item for block in blocks for item in block.results.items()]
    unified = {name: is_unified(runs) for name, runs in found}
    twins = {name: tuple(part for part in name.split("+") if part != "infonce") for name in unified}
    own = sorted({twins[name] for name, runs in found if has_uncertainty(runs[0])})
    return {name: Look(own.index(twins[name]) if twins[name] in own else None, unified[name]) for name in unified}


def sides_of(block):
    """The directions in which a block's queries were answered, none where it is of chains of prompts alone."""
    return [side for side in SIDES if side in block.any]


def levels_of(part):
    """The levels of what stands for the method on one side of a result, and their interval; None where it has none."""
    record = part["uncertainty"].get(part["levels_by"], {})
    return (record["levels"], record["interval"]["level_recall"]) if "levels" in record else None


def recall_by_level(block, looks, width=WIDE):
    """R@1 (%) over uncertainty levels with 95 % intervals, a group of lines per side; None where nothing has levels.

    Over several seeds the mean of recalls, and the means of both bounds. block: results.Block. looks: dict of variant
    to Look. width: inches.
    """
    groups = []
    for side in sides_of(block):
        lines, doubts = {}, {}
        for variant, runs in block.results.items():
            found = [levels_of(run.values[side]) for run in runs]
            if None not in found:
                recalls = 100 * np.mean([levels["recall"]["1"] for levels, _ in found], axis=0)
                low, high = 100 * np.mean([interval for _, interval in found], axis=0).T
                lines[variant] = Line(np.arange(1, len(recalls) + 1), recalls, low, high)
                doubts[variant] = followed(side, runs[0].values[side]["levels_by"])
        if lines:
            title, lines = _whose(f"{SIDES[side]}: levels by uncertainty of the {{}}", lines, doubts)
            groups.append(Group(title, lines, _limit(block) if side == "text_to_image" else []))
    up = "Accuracy (%)" if block.task == "classification" else "R@1 (%)"
    return _comparison(groups, looks, width, "Uncertainty level (1 = least uncertain)", up, True)


def _limit(block):
    if "bayes_optimal" not in block.any:
        return []
    limits = 100 * np.array(block.any["bayes_optimal"]["levels"])
    style = {"color": LIGHT["limit"], "linestyle": ":", "label": "Bayes-optimal"}
    return [(Line(np.arange(1, len(limits) + 1), limits), style)]


def risk_coverage(block, looks, width=WIDE):
    """Share of wrong answers (%) among the least uncertain queries over the share of queries answered; first seeds.

    Beside the methods stand those without an uncertainty, in the order of their entropy over the gallery, and the best
    order of the answers of the method with the fewest wrong ones. Arguments as for recall_by_level.
    """
    groups = []
    for side in sides_of(block):
        lines, doubts, context = {}, {}, []
        answers = {variant: runs[0].arrays[f"{side}_hit"] for variant, runs in block.results.items()}
        for variant, runs in block.results.items():
            by = runs[0].values[side]["levels_by"]
            line = _curve(runs[0].arrays[f"{side}_uncertainty"], answers[variant])
            if by is None:
                style = {"color": LIGHT["ink"], "linestyle": (0, (5, 1, 1, 1) if looks[variant].unified else (4, 2))}
                context.append((line, style | {"linewidth": 1, "label": f"{variant}, entropy"}))
            else:
                lines[variant], doubts[variant] = line, followed(side, by)
        best = max(answers, key=lambda variant: answers[variant].mean())
        style = {"color": LIGHT["limit"], "linestyle": ":", "label": f"best order, {best}"}
        context.append((_curve(-answers[best], answers[best]), style))
        title = f"{SIDES[side]}: ordered by " + ("uncertainty of the {}" if lines else "entropy over the gallery")
        title, lines = _whose(title, lines, doubts)
        groups.append(Group(title, lines, context))
    return _comparison(groups, looks, width, "Coverage: queries answered (%)", "Wrong among them (%)", False)


def _curve(uncertainty, hit):
    at = np.unique(np.linspace(len(hit) * FIRST, len(hit) - 1, COVERAGES).astype(int))
    return Line(100 * (at + 1) / len(hit), 100 * risks(uncertainty, hit)[at])


def hierarchy(block, looks, width=WIDE):
    """Uncertainty of prompts by their depth in their chain: rank among all prompts (%), median and middle 80 %.

    Of first seeds; None where there are no chains or no uncertainties. Arguments as for recall_by_level.
    """
    lines = {}
    for variant, runs in block.results.items():
        if "query" not in runs[0].values.get("hierarchy", {}).get("uncertainty", {}):
            continue
        depth, uncertainty = (runs[0].arrays[name] for name in ("depth", "chain_uncertainty"))
        ranks = 100 * (stats.rankdata(uncertainty) - 0.5) / len(uncertainty)  # units differ by method, ranks do not
        depths = np.unique(depth)
        low, middle, high = np.array([np.percentile(ranks[depth == d], PERCENTILES) for d in depths]).T
        lines[variant] = Line(depths, middle, low, high)
    groups = [Group("", lines, [])] if lines else []
    over, up = "Depth in the chain (0 = most general prompt)", "Rank of uncertainty\namong all prompts (%)"
    return _comparison(groups, looks, width, over, up, True)


def _whose(title, lines, doubts):
    """Fill into a title whose uncertainty most lines follow, and mark the lines that follow others': title, lines."""
    names = [name for name, _ in Counter(doubts.values()).most_common()]
    marks = dict(zip(names, ("", *"*†‡"), strict=False))
    title = "; ".join([title.format(*names[:1]), *(f"{marks[name]} of the {name}" for name in names[1:])])
    return title, {variant: line._replace(mark=marks[doubts[variant]]) for variant, line in lines.items()}


def _comparison(groups, looks, width, over, up, each):
    """Draw groups of lines over and beside one another; None without groups.

    A few lines share one panel; more stand apart by method, before the others in gray. over, up: labels of both axes.
    each: whether x is one of few whole numbers, with a marker at each.
    """
    if not groups:
        return None
    together = all(_few(group.lines, looks) for group in groups)
    split = [[list(group.lines)] if together else _by_method(group.lines, looks) for group in groups]
    across = len(groups) if together and width >= WIDE else 1
    columns = min(3 if width >= WIDE else 2, max(map(len, split)))
    in_line = max(1, int(width / across / (0.55 + 0.075 * max(map(len, _labels(groups))))))
    entries = max(len(group.context) + (len(group.lines) if together else 1) for group in groups)
    heights = [2.3] * len(groups)
    if not together:
        heights = [0.6 + -(-len(panels) // columns) * (1.2 + 0.16 * max(map(len, panels))) for panels in split]
    with matplotlib.rc_context(_style()):
        below = 0.05 + 0.18 * -(-entries // in_line)
        figure, parts = _parts(width, heights, below, across)
        for (part, legend), group, panels in zip(parts, groups, split):
            part.suptitle("\n".join(textwrap.wrap(group.title, int(13.5 * width / across))), fontsize=9)
            rows = -(-len(panels) // columns)
            grid = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
            for axes, shown in zip(grid, panels):
                handles, context = _panel(axes, group, shown, looks, each)
                if not together:  # in the panel a legend would hide lines
                    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.06, 1), fontsize=8, borderpad=0)
            _finish_grid(grid, len(panels), columns)
            part.supxlabel(over, fontsize=9)
            part.supylabel(up, fontsize=9)
            legend.legend(handles=[*handles * together, *context], loc="center", ncols=in_line, fontsize=8)
    return figure


def _few(lines, looks):
    """Whether lines are few enough to be told apart in one panel, and no two look alike."""
    styles = {(_mark(looks[variant])["color"], looks[variant].unified) for variant in lines}
    return len(styles) == len(lines) <= TOGETHER


def _parts(width, heights, below, across=1):
    """A figure of parts over and beside one another: it, and pairs of a part and the place below it for a legend.

    heights: of the parts, in inches. below: of what is below each.
    """
    down = len(heights) // across
    heights = heights[:down]
    figure = Figure(figsize=(width, sum(heights) + below * down), layout="constrained")
    ratios = [ratio for height in heights for ratio in (height, below)]
    grid = figure.subfigures(2 * down, across, squeeze=False, height_ratios=ratios)
    return figure, list(zip(grid[::2].ravel(), grid[1::2].ravel()))


def _finish_grid(grid, count, columns):
    """Take away the panels of a grid that are not used, and number the lowest of each column."""
    for i, axes in enumerate(grid):
        if i >= count:
            axes.remove()
        else:
            axes.tick_params(labelbottom=i + columns >= count)


def _labels(groups):
    """What stands in the legends of groups."""
    for group in groups:
        yield from (variant + line.mark for variant, line in group.lines.items())
        yield from (style["label"] for _, style in group.context)


def _by_method(lines, looks):
    """Split variants into panels: those of a method, each beside its twin, and few enough to be told apart."""
    ordered = sorted(lines, key=lambda variant: looks[variant])
    methods = [list(group) for _, group in groupby(ordered, key=lambda variant: variant.partition("+")[0])]
    return [group[i : i + TOGETHER] for group in methods for i in range(0, len(group), TOGETHER)]


def _panel(axes, group, shown, looks, each):
    """Draw the lines of `shown` before the others in gray; returns their handles, and those of what is not theirs."""
    handles, context = [], []
    others = [line for variant, line in group.lines.items() if variant not in shown]
    if others:  # one path with gaps, for many would make a page large
        x, y = (np.concatenate([[*values, np.nan] for values in pair]) for pair in zip(*(line[:2] for line in others)))
        context += axes.plot(x, y, label="other variants", color=LIGHT["others"], linewidth=0.7, alpha=0.6)
    for variant in shown:
        line, style = group.lines[variant], _mark(looks[variant])
        if line.low is not None:
            axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.22, linewidth=0)
        handles += axes.plot(line.x, line.y, label=variant + line.mark, markevery=1 if each else 0.15, **style)
    context += [axes.plot(line.x, line.y, **style)[0] for line, style in group.context]
    if each:
        whole = len(shown) == len(group.lines)
        ticks = next(iter(group.lines.values())).x
        axes.set_xticks(ticks[:: -(-len(ticks) // (20 if whole else 5))])
    else:
        axes.set(xlim=(0, 102), xticks=(0, 25, 50, 75, 100))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if axes.dataLim.height < 1:  # all percentages are the same, such as none
        axes.set_ylim(-4, 104)
    axes.grid(axis="y")
    return handles, context


def reliability(block, looks, width=WIDE):
    """Share of right answers over confidence in the best one, a panel per variant and side; None where not known.

    Of first seeds, as they are and after temperature scaling; the area of a marker is the share of queries in its bin.
    Of a matched temperature the title has the ECE alone. Arguments as for recall_by_level.
    """
    found = {}
    for side in sides_of(block):
        parts = {variant: runs[0].values[side].get("calibration") for variant, runs in block.results.items()}
        found[side] = {variant: part for variant, part in parts.items() if part}
    found = {side: parts for side, parts in found.items() if parts}
    if not found:
        return None
    wide = width >= WIDE
    across = len(found) if wide and max(map(len, found.values())) <= 2 else 1
    columns = min((4 if wide else 2) // across, max(map(len, found.values())))
    with matplotlib.rc_context(_style()):
        heights = [0.6 + -(-len(panels) // columns) * (0.45 + (1.3 if wide else 1.45)) for panels in found.values()]
        in_line = 3 if wide and across == 1 else 2
        figure, parts = _parts(width, heights, 0.25 if in_line == 3 else 0.45, across)
        for (part, legend), (side, panels) in zip(parts, found.items()):
            part.suptitle(SIDES[side], fontsize=9)
            rows = -(-len(panels) // columns)
            grid = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
            for axes, (variant, calibration) in zip(grid, panels.items()):
                handles = _reliability_panel(axes, variant, calibration, looks[variant])
            _finish_grid(grid, len(panels), columns)
            part.supxlabel("Confidence in the best answer (%)", fontsize=9)
            part.supylabel("Right answers (%)", fontsize=9)
            legend.legend(handles=handles, loc="center", ncols=in_line, fontsize=8)
    return figure


def _reliability_panel(axes, variant, calibration, look):
    """Draw the bins of one variant; returns handles for a legend that holds for all."""
    color, handles = _mark(look)["color"], []
    handles += axes.plot([0, 100], [0, 100], color=LIGHT["limit"], linestyle=":", linewidth=1, label="calibrated")
    for name, title in (("model", "as it is"), ("temperature", "after temperature scaling")):
        if name not in calibration:
            continue
        bins = calibration[name]["reliability"]
        count, x, y = (np.array(bins[key], dtype=float) for key in ("count", "confidence", "accuracy"))
        face = color if name == "model" else LIGHT["paper"]
        dash = "-" if name == "model" else (0, (3, 1))
        axes.plot(100 * x, 100 * y, color=color, linestyle=dash, linewidth=1)
        # No marker vanishes, however few queries are in its bin.
        size = 4 + 90 * count / count.sum()
        axes.scatter(100 * x, 100 * y, size, facecolor=face, edgecolor=color, linewidth=0.9, zorder=3)
        ink = {"color": LIGHT["ink"], "linestyle": dash, "linewidth": 1, "marker": "o"}
        handles.append(Line2D([], [], label=title, **ink, markerfacecolor=LIGHT["ink" if face == color else "paper"]))
    errors = [f"{calibration[name]['ece_15']:.3f}" for name in ("model", "temperature") if name in calibration]
    # A third curve would hide the others.
    matched = f"\nmatched {calibration['matched']['ece_15']:.3f}" if "matched" in calibration else ""
    axes.set_title(f"{variant}\nECE {' → '.join(errors)}{matched}", fontsize=8)
    axes.set(xlim=(-4, 104), ylim=(-4, 104), xticks=(0, 50, 100), yticks=(0, 50, 100))
    axes.set_box_aspect(0.85)  # in the middle of its place, however few there are
    axes.grid()
    return handles


def uncertainty_against_ambiguity(block, looks, width=WIDE):
    """Uncertainty over true ambiguity, a panel per variant: queries as points, medians and 10-90 % bands per bin.

    Ambiguity: of captions the log of how many images match; of classified images the entropy of what people answered.
    Of first seeds; None where it is not known. Arguments as for recall_by_level.
    """
    samples = {variant: sample for variant, runs in block.results.items() if (sample := _sample(runs[0]))}
    if not samples:
        return None
    human = block.task == "classification"
    columns = min(3, len(samples)) if width >= WIDE else min(2, len(samples))
    rows = -(-len(samples) // columns)
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(width, 0.9 + 1.75 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for i, (variant, (ambiguity, uncertainty, spearman)) in enumerate(samples.items()):
            axes = panels[i]
            _ambiguity_panel(axes, ambiguity, uncertainty, looks[variant])
            said = f"{spearman:.3f}".replace("-", MINUS)
            axes.set_title(f"{variant}\nSpearman {said}", fontsize=8)
            if i < columns and not human:  # the same captions in every panel: their counts are said once
                counts = 10.0 ** np.arange(0, np.log10(np.exp(ambiguity.max())) + 1e-9)
                top = axes.secondary_xaxis("top")
                top.xaxis.set_major_locator(FixedLocator(np.log(counts)))
                top.set_xticks(np.log(counts), labels=[f"{count:,.0f}" for count in counts], fontsize=8)
                top.set_xlabel("Matching images", fontsize=8)
        for axes in panels[len(samples) :]:
            axes.remove()
        figure.supxlabel("Entropy of human labels (nats)" if human else "True ambiguity (nats)", fontsize=9)
        figure.supylabel("Uncertainty (own scale)", fontsize=9)
    return figure


def _sample(result):
    """A result's ambiguity (Q,), uncertainty (Q,), and their Spearman correlation; None where it lacks one."""
    side, names = (
        ("image_to_class", ("human_entropy", "image_to_class_uncertainty"))
        if "image_to_class" in result.values
        else ("text_to_image", ("ambiguity", "text_uncertainty"))
    )
    part = result.values.get(side)
    record = part and part["uncertainty"].get(part["levels_by"] if side == "image_to_class" else "query")
    return (*(result.arrays[name] for name in names), record["spearman"]) if record and "spearman" in record else None


def _ambiguity_panel(axes, ambiguity, uncertainty, look):
    style = _mark(look) | {"markersize": 3.5}
    some = slice(None, None, -(-len(ambiguity) // POINTS))
    # Pixels, for a thousand vector dots make a page slow and a file large.
    axes.plot(ambiguity[some], uncertainty[some], ".", rasterized=True, color=DOTS, markersize=2.5, alpha=0.5)
    at, (low, middle, high) = binned(ambiguity, uncertainty)
    axes.fill_between(at, low, high, color=style["color"], alpha=0.3, linewidth=0)
    axes.plot(at, middle, **style)
    if _spans_decades(uncertainty):
        axes.set_yscale("log")
        _few_ticks(axes.yaxis)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def binned(ambiguity, uncertainty):
    """Percentiles of uncertainty in bins of equal width in ambiguity: mean ambiguity (B,), percentiles (3, B)."""
    edges = np.linspace(0, ambiguity.max(), BINS + 1)
    bins = np.digitize(ambiguity, edges[1:-1])
    full = [bins == i for i in range(BINS) if (bins == i).sum() >= FEWEST]
    at = np.array([ambiguity[rows].mean() for rows in full])
    return at, np.array([np.percentile(uncertainty[rows], PERCENTILES) for rows in full]).reshape(-1, 3).T


def uncertainty_distributions(block, looks, width=WIDE):
    """Histograms of captions' and images' uncertainties, a panel per variant on its own scale; None without any.

    Of first seeds. Arguments as for recall_by_level.
    """
    samples = {variant: found for variant, runs in block.results.items() if (found := _doubts(runs[0]))}
    if not samples:
        return None
    columns = min(3, len(samples)) if width >= WIDE else min(2, len(samples))
    rows = -(-len(samples) // columns)
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(width, 0.8 + 1.35 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (variant, found) in zip(panels, samples.items()):
            _histograms(axes, found, _mark(looks[variant])["color"], 4 if width >= WIDE else 2)
            axes.set_title(variant, fontsize=8)
        for axes in panels[len(samples) :]:
            axes.remove()
        figure.supxlabel("Uncertainty (own scale)", fontsize=9)
        figure.supylabel("Share per bin (%)", fontsize=9)
        handles = {
            "captions": Patch(facecolor=LIGHT["others"], edgecolor=LIGHT["ink"], label="captions"),
            "images": Patch(fill=False, edgecolor=LIGHT["ink"], linestyle=(0, (3, 1)), label="images"),
        }
        drawn = {name for found in samples.values() for name in found}
        shown = [handle for name, handle in handles.items() if name in drawn]
        figure.legend(handles=shown, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _doubts(result):
    """The uncertainties of a result: dict of "captions", "images" to arrays."""
    part = result.values.get("image_to_class")
    if part:  # its arrays hold what stands for the method, which need not be the image's
        return {"images": result.arrays["image_to_class_uncertainty"]} if part["levels_by"] == "query" else {}
    if "text_to_image" not in result.values:
        return {}
    names = {"captions": "text_uncertainty", "images": "image_uncertainty"}
    return {title: result.arrays[name] for title, name in names.items() if name in result.arrays}


def _histograms(axes, found, color, ticks):
    every = np.concatenate(list(found.values()))
    low, high = every.min(), every.max()
    if low == high:
        axes.axvline(low, color=color)
        axes.set_xlim(low - 1, low + 1)
        axes.text(0.97, 0.9, "all the same", transform=axes.transAxes, ha="right", va="top", fontsize=8)
        axes.set_xticks([low], labels=[f"{low:.3g}".replace("-", MINUS)])
        axes.set_yticks([])
        return
    log = _spans_decades(every)
    edges = np.geomspace(low, high, BARS + 1) if log else np.linspace(low, high, BARS + 1)
    edges[[0, -1]] = low, high  # rounding would leave out the last
    for name, values in found.items():
        share = 100 * np.histogram(values, edges)[0] / len(values)
        if name == "captions":
            axes.stairs(share, edges, fill=True, color=color, alpha=0.35)
        axes.stairs(share, edges, color=color, linestyle="-" if name == "captions" else (0, (3, 1)), linewidth=1.2)
    if log:
        axes.set_xscale("log")
        _few_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylim(bottom=0)


def _spans_decades(values):
    return 0 < 10 * values.min() < values.max()


def _few_ticks(axis):
    """Label a logarithmic axis in plain numbers, between powers of ten only where there are few of those."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high < 300 * low else (1,), numticks=5))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def learning_curves(study, width=WIDE):
    """Accuracy, NLL and ECE over the number of labels, a panel each, a line per strategy: mean and s.d. over seeds.

    study: active_results.Study. width: inches.
    """
    below = 0.1 + 0.18 * -(-(len(study.seeds) + 1) // (4 if width >= WIDE else 2))
    with matplotlib.rc_context(_style()):
        styles = _styles(study)
        rows, columns = (1, len(TITLES)) if width >= WIDE else (len(TITLES), 1)
        figure, [(part, legend)] = _parts(width, [0.4 + 2.6 * rows], below)
        panels = part.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, TITLES):
            for strategy, by_seed in curves(study.results, name).items():
                values = np.array(list(by_seed.values()))[:, :-1]
                _with_spread(axes, study.budgets, values, styles[strategy] | {"label": strategy})
            before = SCALE[name] * study.any["before"][name]
            axes.axhline(before, color=LIGHT["limit"], linestyle="--", linewidth=1, label="no label")
            axes.set_title(TITLES[name])
            _log_ticks(axes, study.budgets)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
        part.supxlabel("Labels", fontsize=9)
        part.supylabel("On the target", fontsize=9)
        legend.legend(*panels[0].get_legend_handles_labels(), loc="center", ncols=4 if width >= WIDE else 2, fontsize=8)
    return figure


def error_by_entropy(study, width=WIDE):
    """Share of wrong predictions over their entropy, in levels of equal count, with no label and with the most labels.

    A panel per strategy, mean and s.d. over seeds; above it the AUROC by which entropy tells wrong from right
    predictions. study: active_results.Study. width: inches.
    """
    columns = min(4 if width >= WIDE else 2, len(study.seeds))
    rows = -(-len(study.seeds) // columns)
    with matplotlib.rc_context(_style()):
        styles = _styles(study)
        figure, [(part, legend)] = _parts(width, [0.4 + 1.75 * rows], 0.25)
        grid = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        before = study.any["before"]
        for axes, (strategy, seeds) in zip(grid, study.seeds.items()):
            after = [study.results[seed, strategy]["curve"][-1] for seed in seeds]
            levels = before["by_entropy"]
            first = {"color": LIGHT["limit"], "linestyle": (0, (3, 1)), "linewidth": 1.2}
            axes.plot(levels["entropy"], 100 * np.array(levels["error"]), **first)
            entropy, error = (np.array([point["by_entropy"][key] for point in after]) for key in ("entropy", "error"))
            _with_spread(axes, entropy.mean(axis=0), 100 * error, styles[strategy])
            aurocs = [before["entropy_auroc"], _mean_of([point["entropy_auroc"] for point in after])]
            said = " → ".join(NONE if value is None else f"{value:.3f}" for value in aurocs)
            axes.set_title(f"{strategy}\nAUROC {said}", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
        _finish_grid(grid, len(study.seeds), columns)
        part.supxlabel("Entropy of the prediction (nats)", fontsize=9)
        part.supylabel("Wrong predictions (%)", fontsize=9)
        ink = {"color": LIGHT["ink"], "marker": "o"}
        last = Line2D([], [], label=f"{study.budgets[-1]:,} labels", **ink)
        legend.legend(handles=[Line2D([], [], label="no label", **first), last], loc="center", ncols=2, fontsize=8)
    return figure


def _mean_of(values):
    return None if None in values else float(np.mean(values))


def factor_trace(trace, width=WIDE):
    """Relative trace of the B factor over the size of the candidate set, a panel per tower, a line per batches.

    Mean and s.d. over trials, those of the same size beside one another. trace: factor_traces.Trace. width: inches.
    """
    sizes = np.array(sorted({size for lines in trace.lines.values() for found in lines.values() for size in found}))
    beside = min(sizes[1:] / sizes[:-1], default=2) ** (0.3 / max(map(len, trace.lines.values())))
    with matplotlib.rc_context(_style()):
        rows, columns = (1, len(trace.lines)) if width >= WIDE else (len(trace.lines), 1)
        figure, [(part, legend)] = _parts(width, [0.4 + 2.1 * rows], 0.45)
        panels = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (side, lines) in zip(panels, trace.lines.items()):
            for i, (count, found) in enumerate(lines.items()):
                middle, spread = np.array([(mean, sd or 0) for mean, sd in found.values()]).T
                at = np.array([*found]) * beside ** (i - (len(lines) - 1) / 2)
                style = _mark(Look(i, False)) | {"linewidth": 0.8, "elinewidth": 1.5, "capsize": 2}
                axes.errorbar(at, middle, spread, label=factor_traces.batches(count), **style)
            axes.axhline(1, color=LIGHT["limit"], linestyle=":", linewidth=1)
            axes.set_title(f"{side} tower")
            _log_ticks(axes, sizes)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
        _finish_grid(panels, len(panels), columns)
        part.supxlabel("Candidates K", fontsize=9)
        part.supylabel("Relative trace", fontsize=9)
        handles = [
            Line2D([], [], label=factor_traces.batches(count), **_mark(Look(i, False))) for i, count in enumerate(lines)
        ]
        legend.legend(handles=handles, loc="center", ncols=5 if width >= WIDE else 3, fontsize=8)
    return figure


def _with_spread(axes, x, values, style):
    """Draw the mean of values (S, X) over x (X,), and their standard deviation as a band where there are several."""
    middle = values.mean(axis=0)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(x, middle - spread, middle + spread, color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(x, middle, **style)


def _log_ticks(axes, values):
    """A logarithmic axis for a few whole numbers, some of which are named."""
    axes.set_xscale("log")
    shown = values[:: -(-len(values) // 6)]
    axes.set_xticks(shown, labels=[f"{value:,}" for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())


# Each draws a results.Block, or gives None where that has nothing for it.
FIGURES = {
    draw.__name__: draw
    for draw in (
        recall_by_level, risk_coverage, reliability, uncertainty_against_ambiguity, uncertainty_distributions, hierarchy
    )
}  # fmt: skip
# The same of what else a report has, by its task.
OTHERS = {
    "active": {draw.__name__: draw for draw in (learning_curves, error_by_entropy)},
    "factor-trace": {factor_trace.__name__: factor_trace},
}
EVERY = (*FIGURES, *(name for drawn in OTHERS.values() for name in drawn))


def drawings(part, looks):
    """What may be drawn of a part of the report: dict of a figure's name to a function of its width in inches.

    looks: dict of variant to Look.
    """
    if part.task in TASKS:
        return {name: partial(draw, part, looks) for name, draw in FIGURES.items()}
    return {name: partial(draw, part) for name, draw in OTHERS.get(part.task, {}).items()}


def save(figure, stem):
    """Write a figure as `<stem>.png` and `<stem>.pdf`, with the same bytes each time."""
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"dpi": 300, "metadata": {"CreationDate": None}})):
        with atomic(stem.with_name(stem.name + suffix)) as partial, matplotlib.rc_context({"pdf.fonttype": 42}):
            figure.savefig(partial, format=suffix[1:], facecolor="white", **options)


def svg(figure, name):
    """A figure as an SVG element to stand inside a page, the same text each time.

    Its colors are the page's variables (`variables`), and it is as wide as its place. name: another for each figure of
    the page, so that no two share an id.
    """
    file = io.StringIO()
    # Letters as text, in a font of the reader's: drawn as curves they are most of a page's size. The fonts are named
    # again at every one, so let them be few.
    text = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}
    with matplotlib.rc_context({"svg.hashsalt": "report"} | text):
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    found = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', found).group()
    # Rules for every element would hold for the page as well: the two that there are stand at the root instead.
    body = re.sub(r"^.*?</metadata>|<style.*?</style>|</svg>\s*$", "", found, flags=re.DOTALL)
    hues = {hue: f"var(--{variable})" for variable, hue in variables("light").items()}
    body = re.sub("|".join(hues), lambda match: hues[match.group()], body)
    # Names are numbers, for some of matplotlib's are others each time; what nobody refers to has none.
    used = {old: f"{name}-{i}" for i, old in enumerate(dict.fromkeys(re.findall(r"#([\w-]+)[\")]", body)))}
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{used[match[1]]}"' if match[1] in used else "", body)
    body = re.sub(r"#([\w-]+)([\")])", lambda match: f"#{used[match[1]]}{match[2]}", body)
    # Hundredths of a point are not seen; what stands outside tags is text.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg {box} aria-hidden="true" stroke-linejoin="round" stroke-linecap="butt">{body}</svg>'


def variables(theme):
    """The colors that an SVG takes from its page: dict of a variable's name to a color."""
    single = {f"figure-{name}": hue for name, hue in THEMES[theme].items() if name != "colors"}
    return single | {f"figure-{i}": hue for i, hue in enumerate(THEMES[theme]["colors"])}


def _mark(look):
    colors = LIGHT["colors"] if look.number is not None else [LIGHT["limit"]]
    markers = MARKERS if look.number is not None else "x"
    number = look.number or 0
    mark = {"color": colors[number % len(colors)], "marker": markers[number % len(markers)]}
    return mark | ({"linestyle": (0, (3, 1)), "markerfacecolor": LIGHT["paper"]} if look.unified else {})


def _styles(study):
    """The looks of strategies, the same in every report for those that are known: dict of name to plot()'s options."""
    return {name: _mark(Look(i, False)) for i, name in enumerate(dict.fromkeys([*ORDER, *study.seeds]))}


def _style():
    colors = {f"{name}.color": LIGHT["ink"] for name in ("text", "xtick", "ytick")}
    return colors | {
        "axes.labelcolor": LIGHT["ink"], "axes.edgecolor": LIGHT["ink"], "axes.titlecolor": LIGHT["ink"],
        "grid.color": LIGHT["grid"], "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.linewidth": 0.8, "font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "legend.frameon": False, "lines.markersize": 4.5, "lines.linewidth": 1.5,
        "text.parse_math": False,  # a name is no formula, whatever it holds
    }  # fmt: skip
