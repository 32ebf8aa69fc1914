"""Figures of evaluations with a line per method: over levels, coverage and depth."""

import math
import textwrap
from collections import Counter
from itertools import groupby
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from metrics.uncertainty import risk_coverage as selective_risk
from reporting.figures import style
from reporting.figures.panels import PERCENTILES, percentile_ranks
from reporting.runs import TASKS
from reporting.words import DIRECTIONS, followed

TOGETHER = 4  # most lines in one panel
COVERAGES, FIRST = 50, 0.05  # points of a risk-coverage curve, and its first coverage: risk is noise below it


class Line(NamedTuple):
    """One variant's line in a comparison, and its band if it has one."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    mark: str = ""  # after its name in the legend


class Group(NamedTuple):
    """The lines under one title, and the context that every panel repeats: list of (Line, options of plot())."""

    title: str
    lines: dict
    context: list


def levels_of(part):
    """The levels of one direction of a result and the intervals of their recall; None where it has none."""
    record = part["uncertainty"].get(part["levels_by"], {})
    return (record["levels"], record["interval"]["level_recall"]) if "levels" in record else None


@style.figure(
    TASKS,
    "R@1 by uncertainty level",
    "Levels of equal size, from the most to the least certain queries. A line that falls throughout belongs to an"
    " uncertainty that tells which answers to trust. Band: 95 % bootstrap interval over queries (over several seeds,"
    " means of recall and of both bounds).",
    line_per_method=True,
)
def recall_by_level(block, looks, width=style.WIDE):
    """R@1 (%) over uncertainty levels with 95 % intervals, a group of lines per direction; None without levels.

    Over several seeds: means of recall and of both bounds. block: runs.Block. looks: {variant: Look}. width: inches.
    """
    groups = []
    for direction in block.directions:
        lines, names = {}, {}
        for variant, runs in block.results.items():
            pairs = [levels_of(run.values[direction]) for run in runs]
            if None not in pairs:
                recalls = 100 * np.mean([levels["recall"]["1"] for levels, _ in pairs], axis=0)
                low, high = 100 * np.mean([interval for _, interval in pairs], axis=0).T
                lines[variant] = Line(np.arange(1, len(recalls) + 1), recalls, low, high)
                names[variant] = followed(direction, runs[0].values[direction]["levels_by"])
        if lines:
            title, lines = _whose(f"{DIRECTIONS[direction]}: levels by uncertainty of the {{}}", lines, names)
            groups.append(Group(title, lines, limit(block) if direction == "text_to_image" else []))
    up = "Accuracy (%)" if block.task == "classification" else "R@1 (%)"
    return _comparison(groups, looks, width, "Uncertainty level (1 = least uncertain)", up, True)


def limit(block):
    """The Bayes-optimal R@1 by level as a Group's context; empty where it is unknown."""
    if "bayes_optimal" not in block.first:
        return []
    limits = 100 * np.array(block.first["bayes_optimal"]["levels"])
    options = {"color": style.LIGHT["limit"], "linestyle": ":", "label": "Bayes-optimal"}
    return [(Line(np.arange(1, len(limits) + 1), limits), options)]


@style.figure(
    TASKS,
    "Risk and coverage",
    "Share of wrong answers if only the least uncertain queries are answered: a good uncertainty starts low and rises"
    " late. At full coverage all queries are answered. Dashed without markers: a method without an uncertainty, ordered"
    " by the entropy of its scores over the gallery. Dotted: the best possible order, right answers first, of the"
    " method with the fewest wrong answers. First seed.",
    line_per_method=True,
)
def risk_coverage(block, looks, width=style.WIDE):
    """Share of wrong answers (%) among the least uncertain queries over the share of queries answered; first seeds.

    Methods without an uncertainty are ordered by their entropy over the gallery. The best order is that of the method
    with the fewest wrong answers. Arguments as for recall_by_level.
    """
    groups = []
    for direction in block.directions:
        lines, names, context = {}, {}, []
        answers = {variant: runs[0].arrays[f"{direction}_hit"] for variant, runs in block.results.items()}
        for variant, runs in block.results.items():
            by = runs[0].values[direction]["levels_by"]
            line = curve(runs[0].arrays[f"{direction}_uncertainty"], answers[variant])
            if by is None:
                dashes = (5, 1, 1, 1) if looks[variant].unified else (4, 2)
                options = {"color": style.LIGHT["ink"], "linestyle": (0, dashes), "linewidth": 1}
                context.append((line, options | {"label": f"{variant}, entropy"}))
            else:
                lines[variant], names[variant] = line, followed(direction, by)
        best = max(answers, key=lambda variant: answers[variant].mean())
        options = {"color": style.LIGHT["limit"], "linestyle": ":", "label": f"best order, {best}"}
        context.append((curve(-answers[best], answers[best]), options))
        order = "uncertainty of the {}" if lines else "entropy over the gallery"
        title, lines = _whose(f"{DIRECTIONS[direction]}: ordered by {order}", lines, names)
        groups.append(Group(title, lines, context))
    return _comparison(groups, looks, width, "Coverage: queries answered (%)", "Wrong among them (%)", False)


def curve(uncertainty, hit):
    """The Line of risk over coverage, in percent, least uncertain first."""
    last = np.unique(np.linspace(len(hit) * FIRST, len(hit) - 1, COVERAGES).astype(int))
    return Line(100 * (last + 1) / len(hit), 100 * selective_risk(uncertainty, hit)[last])


@style.figure(
    TASKS,
    "Uncertainty from general to specific prompts",
    "Prompts become more specific along a chain, so a faithful uncertainty falls. Line: median; band: the middle 80 %"
    " of prompts. First seed.",
    line_per_method=True,
)
def hierarchy(block, looks, width=style.WIDE):
    """Uncertainty of prompts by their depth in their chain: rank among all prompts (%), median and middle 80 %.

    Of first seeds; None where there are no chains or no uncertainties. Arguments as for recall_by_level.
    """
    lines = {}
    for variant, runs in block.results.items():
        if "query" not in runs[0].values.get("hierarchy", {}).get("uncertainty", {}):
            continue
        depth, uncertainty = (runs[0].arrays[name] for name in ("depth", "chain_uncertainty"))
        ranks = percentile_ranks(uncertainty)
        depths = np.unique(depth)
        low, middle, high = np.array([np.percentile(ranks[depth == d], PERCENTILES) for d in depths]).T
        lines[variant] = Line(depths, middle, low, high)
    groups = [Group("", lines, [])] if lines else []
    over, up = "Depth in the chain (0 = most general prompt)", "Rank of uncertainty\namong all prompts (%)"
    return _comparison(groups, looks, width, over, up, True)


def _whose(title, lines, names):
    """Name in a title the uncertainty that most lines follow, and mark the lines that follow another: title, lines."""
    ordered = [name for name, _ in Counter(names.values()).most_common()]
    marks = dict(zip(ordered, ("", *"*†‡"), strict=False))
    title = "; ".join([title.format(*ordered[:1]), *(f"{marks[name]} of the {name}" for name in ordered[1:])])
    return title, {variant: line._replace(mark=marks[names[variant]]) for variant, line in lines.items()}


def _comparison(groups, looks, width, over, up, each):
    """Draw groups of lines; None without groups.

    A few lines share one panel; more get a panel per method, with the other lines in gray. over, up: labels of both
    axes. each: whether x takes a few whole numbers, with a marker at each.
    """
    if not groups:
        return None
    together = all(_few(group.lines, looks) for group in groups)
    split = [[list(group.lines)] if together else _by_method(group.lines, looks) for group in groups]
    across = len(groups) if together and width >= style.WIDE else 1
    columns = min(3 if width >= style.WIDE else 2, max(map(len, split)))
    in_line = style.legend_columns(_labels(groups), width / across)
    most = max(len(group.context) + (len(group.lines) if together else 1) for group in groups)
    heights = [2.3] * len(groups)
    if not together:
        heights = [0.6 + math.ceil(len(panels) / columns) * (1.2 + 0.16 * max(map(len, panels))) for panels in split]
    with matplotlib.rc_context(style.rc()):
        below = 0.05 + 0.18 * math.ceil(most / in_line)
        figure, parts = style.parts(width, heights, below, across)
        for (part, legend), group, panels in zip(parts, groups, split):
            part.suptitle("\n".join(textwrap.wrap(group.title, int(13.5 * width / across))), fontsize=9)
            rows = math.ceil(len(panels) / columns)
            grid = part.subplots(rows, columns, squeeze=False).ravel()
            for axes, shown in zip(grid, panels):
                handles, context = _panel(axes, group, shown, looks, each)
                if not together:  # above the panel, as a legend inside would hide lines
                    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.06, 1), fontsize=8, borderpad=0)
            style.finish_grid(grid, len(panels), columns)
            part.supxlabel(over, fontsize=9)
            part.supylabel(up, fontsize=9)
            entries = [*handles, *context] if together else context
            legend.legend(handles=entries, loc="center", ncols=in_line, fontsize=8)
    return figure


def _few(lines, looks):
    """Whether lines are few enough to be told apart in one panel, and no two look alike."""
    styles = {(style.mark(looks[variant])["color"], looks[variant].unified) for variant in lines}
    return len(styles) == len(lines) <= TOGETHER


def _labels(groups):
    """The entries of the groups' legends."""
    for group in groups:
        yield from (variant + line.mark for variant, line in group.lines.items())
        yield from (options["label"] for _, options in group.context)


def _by_method(lines, looks):
    """Split variants into panels: those of one method, each beside its twin, at most TOGETHER in one."""
    ordered = sorted(lines, key=lambda variant: looks[variant])
    methods = [list(group) for _, group in groupby(ordered, key=lambda variant: variant.partition("+")[0])]
    return [group[i : i + TOGETHER] for group in methods for i in range(0, len(group), TOGETHER)]


def _panel(axes, group, shown, looks, each):
    """Draw the lines of `shown` over the others in gray; returns the handles of both, theirs first."""
    handles, context = [], []
    others = [line for variant, line in group.lines.items() if variant not in shown]
    if others:  # one path with gaps, as many paths make a page large
        x, y = (np.concatenate([[*values, np.nan] for values in pair]) for pair in zip(*(line[:2] for line in others)))
        context += axes.plot(x, y, label="other variants", color=style.LIGHT["others"], linewidth=0.7, alpha=0.6)
    for variant in shown:
        line, options = group.lines[variant], style.mark(looks[variant])
        if line.low is not None:
            axes.fill_between(line.x, line.low, line.high, color=options["color"], alpha=0.22, linewidth=0)
        handles += axes.plot(line.x, line.y, label=variant + line.mark, markevery=1 if each else 0.15, **options)
    context += [axes.plot(line.x, line.y, **options)[0] for line, options in group.context]
    if each:
        whole = len(shown) == len(group.lines)
        ticks = next(iter(group.lines.values())).x
        axes.set_xticks(ticks[:: math.ceil(len(ticks) / (20 if whole else 5))])
    else:
        axes.set(xlim=(0, 102), xticks=(0, 25, 50, 75, 100))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if axes.dataLim.height < 1:  # all percentages are alike
        axes.set_ylim(-4, 104)
    axes.grid(axis="y")
    return handles, context
