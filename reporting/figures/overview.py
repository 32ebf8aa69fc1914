"""The figure that a page opens with: whether uncertainty follows the truth, and whether recall follows uncertainty."""

import math

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy import stats

from metrics.uncertainty import risk_coverage as selective_risk
from reporting.figures import style
from reporting.figures.lines import COVERAGES, levels_of
from reporting.figures.panels import BINS, FEWEST

DIRECTION = "text_to_image"


@style.figure(
    ["retrieval"],
    "Uncertainty, truth and recall",
    "Text→image, first seeds. Left: rank of a caption's uncertainty among all captions over its true ambiguity (a"
    " faithful uncertainty rises), or where that is unknown the share of wrong answers among the least uncertain"
    " queries. Right: R@1 by uncertainty level (a useful uncertainty makes it fall).",
    line_per_method=True,
)
def overview(block, looks, width=style.WIDE):
    """Two panels with a line per variant that has an uncertainty, text→image; None where no variant has one.

    Left: the mean rank of uncertainty (%) over true ambiguity, where that is known, else risk over coverage. Right: R@1
    (%) by uncertainty level. First seeds. Arguments as for lines.recall_by_level.
    """
    runs = {variant: runs[0] for variant, runs in block.results.items()}
    runs = {variant: run for variant, run in runs.items() if levels_of(run.values[DIRECTION])}
    if not runs:
        return None
    wide = width >= style.WIDE
    in_line = style.legend_columns([*runs, "Bayes-optimal"], width)
    below = 0.15 + 0.18 * math.ceil((len(runs) + 1) / in_line)
    with matplotlib.rc_context(style.rc()):
        figure, [(part, legend)] = style.parts(width, [2.9 if wide else 5.2], below)
        left, right = part.subplots(1, 2) if wide else part.subplots(2, 1)
        draw_left = _ambiguity if "ambiguity" in next(iter(runs.values())).arrays else _risk
        for variant, run in runs.items():
            options = style.mark(looks[variant]) | {"label": variant, "linewidth": 1.2, "markersize": 3.5}
            draw_left(left, run.arrays, options)
            levels, _ = levels_of(run.values[DIRECTION])
            recalls = 100 * np.array(levels["recall"]["1"])
            right.plot(np.arange(1, len(recalls) + 1), recalls, **options)
        if "bayes_optimal" in block.first:
            limits = 100 * np.array(block.first["bayes_optimal"]["levels"])
            limit = {"color": style.LIGHT["limit"], "linestyle": ":", "label": "Bayes-optimal"}
            right.plot(np.arange(1, len(limits) + 1), limits, **limit)
        right.set(xlabel="Uncertainty level (1 = least uncertain)", ylabel="R@1 (%)")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (left, right):
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
        legend.legend(*right.get_legend_handles_labels(), loc="center", ncols=in_line, fontsize=8)
    return figure


def _ambiguity(axes, arrays, options):
    """Mean rank of captions' uncertainty in bins of true ambiguity."""
    ambiguity, uncertainty = arrays["ambiguity"], arrays["text_uncertainty"]
    ranks = 100 * (stats.rankdata(uncertainty) - 0.5) / len(uncertainty)  # units differ by method, ranks do not
    bins = np.digitize(ambiguity, np.linspace(0, ambiguity.max(), BINS + 1)[1:-1])
    full = [bins == i for i in range(BINS) if (bins == i).sum() >= FEWEST]
    axes.plot([ambiguity[rows].mean() for rows in full], [ranks[rows].mean() for rows in full], **options)
    axes.set(xlabel="True ambiguity of the caption (nats)", ylabel="Rank of its uncertainty (%)")


def _risk(axes, arrays, options):
    """Share of wrong answers over the share of queries answered, least uncertain first."""
    risk = selective_risk(arrays[f"{DIRECTION}_uncertainty"], arrays[f"{DIRECTION}_hit"])
    last = np.unique(np.linspace(len(risk) * 0.05, len(risk) - 1, COVERAGES).astype(int))
    axes.plot(100 * (last + 1) / len(risk), 100 * risk[last], **options | {"markevery": 0.15})
    axes.set(xlabel="Coverage: queries answered (%)", ylabel="Wrong among them (%)")
