"""Figures of decisions: reliability of match probabilities, coverage and sizes of sets by level, both rejections."""

import math

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from metrics.uncertainty import risk_coverage
from reporting.figures import style
from reporting.runs import find
from reporting.tables.decisions import correctness_settings
from reporting.words import DIRECTIONS

DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))
KIND = "lac"  # of the sets that are drawn
FIRST = 0.02  # least coverage at which a rate is drawn
POINTS = 60
REJECTIONS = {"top": "top score", "energy": "energy", "probability": "top probability", "right": "learned, right"}


def _panels(block, width, draw, labels, height=1.9):
    """A figure with a panel per variant and direction; draw: from axes, a Result and a direction to handles."""
    items = [(variant, runs[0], side) for variant, runs in block.results.items() for side in block.directions]
    across = min(2 if width < style.WIDE else 3, len(items))
    rows = math.ceil(len(items) / across)
    with matplotlib.rc_context(style.rc()):
        figure, [(part, legend)] = style.parts(width, [0.5 + height * rows], 0.3)
        grid = part.subplots(rows, across, squeeze=False).ravel()
        for axes, (variant, run, direction) in zip(grid, items):
            handles = draw(axes, run, direction)
            axes.set_title(f"{variant}\n{DIRECTIONS[direction]}", fontsize=8)
            axes.grid(axis="y")
        for axes in grid[len(items) :]:
            axes.remove()
        part.supxlabel(labels[0], fontsize=9)
        part.supylabel(labels[1], fontsize=9)
        columns = style.legend_columns([handle.get_label() for handle in handles], width)
        legend.legend(handles=handles, loc="center", ncols=columns, fontsize=8)
    return figure


@style.figure(
    ("matching",),
    "Reliability of the probability that a best answer matches",
    "Each query's best answer: the share that matches over the stated probability, in ten bins of equally many queries;"
    " on the dotted line it is as stated. By the score alone a best answer is better than it looks: the probability is"
    " that of any pair with this score. First seed.",
)
def match_reliability(block, looks, width=style.WIDE):
    """Share of best answers that match over their probability, by score and by posterior; a panel per variant."""
    colors = style.LIGHT["colors"]

    def draw(axes, run, direction):
        handles = axes.plot(
            [0, 1], [0, 1], color=style.LIGHT["limit"], linestyle=DOTTED, linewidth=1, label="as stated"
        )
        for number, basis in enumerate(("score", "posterior")):
            stated = run.arrays[f"{direction}_{basis}_isotonic_confidence"]
            right = run.arrays[f"{direction}_{basis}_hit"]
            bins = np.array_split(np.argsort(stated, kind="stable"), min(10, len(stated)))
            x, y = ([values[rows].mean() for rows in bins] for values in (stated, right))
            handles += axes.plot(x, y, color=colors[number], marker="os"[number], markersize=3.5, label=f"by {basis}")
        return handles

    return _panels(block, width, draw, ("Stated probability", "Share that matches"))


@style.figure(
    ("conformal",),
    "Coverage by level of uncertainty",
    "LAC sets: the share that holds a right answer, by level. Dashed: one threshold for all queries, which promises"
    " nothing for a level. Solid: a threshold for each level (Mondrian). Dotted: what was asked for. Colors: the share"
    " asked for. First seed.",
)
def coverage_by_level(block, looks, width=style.WIDE):
    """Coverage over levels of uncertainty with one threshold and with one each, at every alpha; a panel per variant."""
    return _by_level(block, width, "coverage", ("Uncertainty level (1 = least uncertain)", "Coverage (%)"))


@style.figure(
    ("conformal",),
    "Sizes of sets by level of uncertainty",
    "LAC sets with a threshold for each level: the median number of answers that it takes, by level; band: the middle"
    " half of the queries. Colors: the share of queries whose set is to hold a right answer. First seed.",
)
def set_sizes(block, looks, width=style.WIDE):
    """Median size of sets over levels of uncertainty, at every alpha, with quartiles; a panel per variant."""
    return _by_level(block, width, "median_size", ("Uncertainty level (1 = least uncertain)", "Answers"))


def _by_level(block, width, key, labels):
    def draw(axes, run, direction):
        handles = []
        for number, (alpha, record) in enumerate(run.values[direction]["conformal"][KIND].items()):
            color, label = style.LIGHT["colors"][number % 7], f"{100 * (1 - float(alpha)):g} %"
            for levels, dash in ((record["levels"], "-"), (record["within"], DASHED)):
                known = [(i, level) for i, level in enumerate(levels, 1) if level["coverage"] is not None]
                if not known or (key != "coverage" and dash != "-"):
                    continue
                place = [i for i, _ in known]
                values = np.array([level[key] for _, level in known], dtype=float)
                values = values if key == "coverage" else values.clip(min=0.7)  # an empty set
                line = axes.plot(place, 100 * values if key == "coverage" else values, color=color, linestyle=dash,
                                 marker="o", markersize=3, linewidth=1.2, label=label)  # fmt: skip
                handles += line if dash == "-" else []
                if key != "coverage":
                    low, high = np.transpose([level["quartiles"] for _, level in known]).clip(min=0.7)
                    axes.fill_between(place, low, high, color=color, alpha=0.15, linewidth=0)
            if key == "coverage":
                axes.axhline(100 * (1 - float(alpha)), color=color, linestyle=DOTTED, linewidth=0.9)
        if key != "coverage":
            axes.set_yscale("log")
            style.few_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return handles

    return _panels(block, width, draw, labels)


@style.figure(
    ("unanswerable",),
    "Both rejections",
    "Half of the queries have no answer in the gallery. The least uncertain are answered: the share of wrong answers"
    " among them, solid, and of answers to queries that have none, dashed. The space between is of wrong answers to"
    " queries that have one. First seed.",
)
def rejection(block, looks, width=style.WIDE):
    """Share of wrong answers over coverage, half of the queries without an answer, by four uncertainties."""

    def draw(axes, run, direction):
        handles, hit = [], run.arrays[f"{direction}_hit"]
        wrong = np.concatenate([hit, np.zeros(len(hit))])
        absent = np.repeat([1.0, 0.0], len(hit))
        for number, (name, label) in enumerate(REJECTIONS.items()):
            values = np.concatenate([run.arrays[f"{direction}_{name}_{which}"] for which in ("with", "without")])
            rows = np.unique(np.linspace(FIRST * len(values), len(values), POINTS).astype(int)) - 1
            color = style.LIGHT["colors"][number]
            for right, dash in ((wrong, "-"), (absent, DASHED)):
                risk = risk_coverage(values, right)[rows]
                line = axes.plot(100 * (rows + 1) / len(values), 100 * risk, color=color, linestyle=dash, linewidth=1.1,
                                 label=label)  # fmt: skip
                handles += line if dash == "-" else []
        axes.set_xlim(0, 100)
        return handles

    return _panels(block, width, draw, ("Coverage: queries answered (%)", "Wrong among them (%)"), 2.1)


@style.figure(
    ("correctness",),
    "Is the answer right: what labels add to the probability",
    "AUROC of right answers less that of the probability, which needs no label, with 95 % intervals of the paired"
    " bootstrap over images. Circles: predictors were taught with the same candidates, classes or items of the"
    " gallery. Squares: with other candidates, so that nothing of these was seen. Right of the dotted line labels help;"
    " colors: what was seen of them. First seed.",
)
def labels_worth(block, looks, width=style.WIDE):
    """Differences of AUROC from the probability's by predictor, seen and held-out candidates; a panel per direction."""
    colors = dict(zip(("none", "right or wrong", "classes"), style.LIGHT["colors"]))
    settings = {direction: [] for direction in block.directions}
    for direction, setting, _ in correctness_settings(block):
        settings[direction].append(setting)

    def draw(axes, run, direction):
        side = run.values[direction]
        names = [name for name in side["correctness"] if name != "probability"]
        handles, alone = {}, side.get("candidates") == "held out"
        axes.axvline(0, color=style.LIGHT["limit"], linestyle=DOTTED, linewidth=1)
        for number, setting in enumerate(settings[direction]):
            records = (side[setting[0]] if setting else side)["correctness"]
            for place, name in enumerate(names):
                less, labels = find(records, name, "less", "probability"), find(records, name, "labels")
                if less is None:
                    continue
                y, is_square = place + 0.3 * (number - (len(settings[direction]) - 1) / 2), bool(setting) or alone
                axes.plot([less["low"], less["high"]], [y, y], color=colors[labels], linewidth=1.2)
                [handle] = axes.plot(less["mean"], y, "os"[is_square], color=colors[labels], markersize=4,
                                     markerfacecolor=style.LIGHT["paper"] if is_square else colors[labels],
                                     linestyle="none", label=f"labels: {labels}")  # fmt: skip
                handles.setdefault(labels, handle)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        return list(handles.values())

    return _panels(block, width, draw, ("AUROC less that of the probability", ""), 2.6)
