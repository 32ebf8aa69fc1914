"""The figure that a page opens with: whether uncertainty follows the truth, and whether recall follows uncertainty."""

import math

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from reporting.figures import style
from reporting.figures.lines import curve, levels_of, limit
from reporting.figures.panels import bins_of, percentile_ranks

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
        ambiguous = all({"ambiguity", "text_uncertainty"} <= run.arrays.keys() for run in runs.values())
        draw_left = _ambiguity if ambiguous else _risk
        for variant, run in runs.items():
            options = style.mark(looks[variant]) | {"label": variant, "linewidth": 1.2, "markersize": 3.5}
            draw_left(left, run.arrays, options)
            levels, _ = levels_of(run.values[DIRECTION])
            recalls = 100 * np.array(levels["recall"]["1"])
            right.plot(np.arange(1, len(recalls) + 1), recalls, **options)
        for line, options in limit(block):
            right.plot(line.x, line.y, **options)
        right.set(xlabel="Uncertainty level (1 = least uncertain)", ylabel="R@1 (%)")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (left, right):
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(axis="y")
        legend.legend(*right.get_legend_handles_labels(), loc="center", ncols=in_line, fontsize=8)
    return figure


def _ambiguity(axes, arrays, options):
    """Mean rank of captions' uncertainty in bins of true ambiguity."""
    ambiguity, ranks = arrays["ambiguity"], percentile_ranks(arrays["text_uncertainty"])
    bins = bins_of(ambiguity)
    axes.plot([ambiguity[rows].mean() for rows in bins], [ranks[rows].mean() for rows in bins], **options)
    axes.set(xlabel="True ambiguity of the caption (nats)", ylabel="Rank of its uncertainty (%)")


def _risk(axes, arrays, options):
    """Share of wrong answers over the share of queries answered, least uncertain first."""
    line = curve(arrays[f"{DIRECTION}_uncertainty"], arrays[f"{DIRECTION}_hit"])
    axes.plot(line.x, line.y, **options | {"markevery": 0.15})
    axes.set(xlabel="Coverage: queries answered (%)", ylabel="Wrong among them (%)")
