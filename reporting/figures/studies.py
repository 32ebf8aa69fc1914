"""Figures of active learning, and of the traces of BayesVLM's factors."""

import math

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from reporting.curves import ORDER, SCALE, TITLES, WEIGHTED, curves
from reporting.figures import style
from reporting.studies import Study
from reporting.traces import Trace, batches
from reporting.words import NONE


@style.figure(
    [Study.task],
    "Learning curves",
    "Performance on the target by number of labels and by the strategy that chose them. Line: mean over seeds; band: ±"
    " their standard deviation, which shows how much seeds differ and not whether strategies do (the tables show that)."
    " Dashed: the model without labels.",
)
def learning_curves(study, looks, width=style.WIDE):
    """Accuracy, NLL and ECE over the number of labels, a panel each, a line per strategy: mean and s.d. over seeds.

    study: a Study. looks: not used, as strategies have their own. width: inches.
    """
    in_line = 4 if width >= style.WIDE else 2
    below = 0.1 + 0.18 * math.ceil((len(study.seeds) + 1) / in_line)
    with matplotlib.rc_context(style.rc()):
        styles = _styles(study)
        rows, columns = (1, len(TITLES)) if width >= style.WIDE else (len(TITLES), 1)
        figure, [(part, legend)] = style.parts(width, [0.4 + 2.6 * rows], below)
        panels = part.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, TITLES):
            for strategy, by_seed in curves(study.results, name).items():
                values = np.array(list(by_seed.values()))[:, :-1]
                _with_spread(axes, study.budgets, values, styles[strategy] | {"label": strategy})
            before = SCALE[name] * study.first["before"][name]
            axes.axhline(before, color=style.LIGHT["limit"], linestyle="--", linewidth=1, label="no label")
            axes.set_title(TITLES[name])
            style.log_ticks(axes, study.budgets)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
        style.unlabelled(*panels)
        part.supxlabel("Labels", fontsize=9)
        part.supylabel("On the target", fontsize=9)
        legend.legend(*panels[0].get_legend_handles_labels(), loc="center", ncols=in_line, fontsize=8)
    return figure


@style.figure(
    [Study.task],
    "Error by entropy",
    "Share of wrong predictions on the target, in levels of equal size by the entropy of the prediction: before any"
    " label, and after fine-tuning with the largest budget. Line: mean over seeds; band: ± their standard deviation."
    " AUROC: the chance that a wrong prediction has more entropy than a right one, before and after (mean over seeds).",
)
def error_by_entropy(study, looks, width=style.WIDE):
    """Share of wrong predictions over their entropy, in levels of equal count, without labels and with the most labels.

    A panel per strategy: mean and s.d. over seeds; its title gives the AUROC of entropy. Arguments as for
    learning_curves.
    """
    columns = min(4 if width >= style.WIDE else 2, len(study.seeds))
    rows = math.ceil(len(study.seeds) / columns)
    with matplotlib.rc_context(style.rc()):
        styles = _styles(study)
        figure, [(part, legend)] = style.parts(width, [0.4 + 1.75 * rows], 0.25)
        grid = part.subplots(rows, columns, squeeze=False).ravel()
        before = study.first["before"]
        for axes, (strategy, seeds) in zip(grid, study.seeds.items()):
            after = [study.results[seed, strategy]["curve"][-1] for seed in seeds]
            levels = before["by_entropy"]
            first = {"color": style.LIGHT["limit"], "linestyle": (0, (3, 1)), "linewidth": 1.2}
            axes.plot(levels["entropy"], 100 * np.array(levels["error"]), **first)
            entropy, error = (np.array([point["by_entropy"][key] for point in after]) for key in ("entropy", "error"))
            _with_spread(axes, entropy.mean(axis=0), 100 * error, styles[strategy])
            aurocs = [before["entropy_auroc"], _mean_of([point["entropy_auroc"] for point in after])]
            change = " → ".join(NONE if value is None else f"{value:.3f}" for value in aurocs)
            axes.set_title(f"{strategy}\nAUROC {change}", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
        style.finish_grid(grid, len(study.seeds), columns)
        part.supxlabel("Entropy of the prediction (nats)", fontsize=9)
        part.supylabel("Wrong predictions (%)", fontsize=9)
        ink = {"color": style.LIGHT["ink"], "marker": "o"}
        last = Line2D([], [], label=f"{study.budgets[-1]:,} labels", **ink)
        legend.legend(handles=[Line2D([], [], label="no label", **first), last], loc="center", ncols=2, fontsize=8)
    return figure


def _mean_of(values):
    return None if None in values else float(np.mean(values))


@style.figure(
    [Trace.task],
    "Trace of the B factor by candidates and batches",
    "Whether fewer candidates K, or fewer random batches of them, suffice for BayesVLM's factors: they do where the"
    " curve is level (it is 1 by definition at the largest K with all batches). Marker: mean over trials, each with"
    " other random batches; bar: their standard deviation. Markers of the same K are shifted apart.",
)
def factor_trace(trace, looks, width=style.WIDE):
    """Relative trace of the B factor over the size of the candidate set, a panel per tower, a line per batches.

    Mean and s.d. over trials. trace: a Trace. looks: not used. width: inches.
    """
    sizes = np.array(sorted({size for lines in trace.lines.values() for line in lines.values() for size in line}))
    beside = min(sizes[1:] / sizes[:-1], default=2) ** (0.3 / max(map(len, trace.lines.values())))
    with matplotlib.rc_context(style.rc()):
        rows, columns = (1, len(trace.lines)) if width >= style.WIDE else (len(trace.lines), 1)
        figure, [(part, legend)] = style.parts(width, [0.4 + 2.1 * rows], 0.45)
        panels = part.subplots(rows, columns, squeeze=False).ravel()
        for axes, (tower, lines) in zip(panels, trace.lines.items()):
            for i, (count, line) in enumerate(lines.items()):
                middle, spread = np.array([(mean, sd or 0) for mean, sd in line.values()]).T
                x = np.array([*line]) * beside ** (i - (len(lines) - 1) / 2)
                options = style.mark(style.Look(i, False)) | {"linewidth": 0.8, "elinewidth": 1.5, "capsize": 2}
                axes.errorbar(x, middle, spread, label=batches(count), **options)
            axes.axhline(1, color=style.LIGHT["limit"], linestyle=":", linewidth=1)
            axes.set_title(f"{tower} tower")
            style.log_ticks(axes, sizes)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
        style.finish_grid(panels, len(panels), columns)
        part.supxlabel("Candidates K", fontsize=9)
        part.supylabel("Relative trace", fontsize=9)
        handles = [
            Line2D([], [], label=batches(count), **style.mark(style.Look(i, False))) for i, count in enumerate(lines)
        ]
        legend.legend(handles=handles, loc="center", ncols=5 if width >= style.WIDE else 3, fontsize=8)
    return figure


def _with_spread(axes, x, values, options):
    """Draw the mean of values (S, X) over x (X,), and their standard deviation as a band where there are several."""
    middle = values.mean(axis=0)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(x, middle - spread, middle + spread, color=options["color"], alpha=0.12, linewidth=0)
    axes.plot(x, middle, **options)


def _styles(study):
    """Options of plot() by strategy; the known ones look the same in every report, those by density as their rivals."""
    names = list(dict.fromkeys([*ORDER, *study.seeds]))
    number = {name: i for i, name in enumerate(dict.fromkeys(name.removesuffix(WEIGHTED) for name in names))}
    return {
        name: style.mark(style.Look(number[name.removesuffix(WEIGHTED)], name.endswith(WEIGHTED))) for name in names
    }
