"""Learning curves of active_learning.py as text for the terminal."""

import statistics

from metrics.learning_curve import FIGURES, holm, paired

TITLES = {"accuracy": "accuracy, %", "nll": "NLL, nats", "ece": "ECE, %"}
SCALE = {"accuracy": 100, "nll": 1, "ece": 100}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}
BASE = "random"  # what strategies are compared with
LEVEL = 0.05
WIDTH = 19  # of a column


def curves_text(results):
    """Lay out results by (seed, strategy): every figure by budget, and what strategies differ by from random choice.

    The last column is the mean over budgets. Means over seeds are with standard deviations; differences, paired by
    seed, with half of their 95 % interval. One star: the interval leaves 0 out; two: p < 0.05 holds for all comparisons
    of their part of the table at once (Holm), of which the last column is one.
    """
    one = next(iter(results.values()))
    seeds, strategies = (list(dict.fromkeys(cell[i] for cell in results)) for i in (0, 1))
    budgets = [point["budget"] for point in one["curve"]]
    lines = [f"{one['dataset']}, {one['backbone']}, target {one['settings']['target']} ({one['images']:,} images)"]
    lines[0] += f", seeds: {', '.join(map(str, seeds))}; free labels of --val: {_free(one)}"
    for figure in FIGURES:
        values = {
            name: list(zip(*(_curve(results[seed, name], figure) for seed in seeds), strict=True))
            for name in strategies
        }
        before = SCALE[figure] * one["before"][figure]
        heads = [*(f"{budget:,}" for budget in budgets), "mean"]
        lines.append(f"\n{TITLES[figure]:18}" + "".join(f"{head:>{WIDTH}}" for head in heads))
        lines.append(f"  {'no label':16}{before:>{WIDTH}.{DIGITS[figure]}f}")
        for name in strategies:
            lines.append(f"  {name:16}" + "".join(f"{_mean(column, figure):>{WIDTH}}" for column in values[name]))
        others = [name for name in strategies if name != BASE]
        if BASE not in strategies or len(seeds) < 2 or not others:
            continue
        gaps = {name: [paired(*pair) for pair in zip(values[name], values[BASE], strict=True)] for name in others}
        single = iter(holm([gap.p for name in others for gap in gaps[name][:-1]]))
        means = iter(holm([gaps[name][-1].p for name in others]))
        lines.append("  less random, 95 % interval")
        for name in others:
            p = [*(next(single) for _ in budgets), next(means)]
            marked = [_gap(gap, value, figure) for gap, value in zip(gaps[name], p, strict=True)]
            lines.append(f"  {name:16}" + "".join(f"{text:>{WIDTH}}" for text in marked))
    return "\n".join(lines)


def _free(result):
    return 0 if result["settings"]["val_counts"] is not None else f"{result['curve'][0]['val_labels']:,}"


def _curve(result, figure):
    found = [SCALE[figure] * point[figure] for point in result["curve"]]
    return [*found, statistics.fmean(found)]


def _mean(values, figure):
    digits = DIGITS[figure]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _gap(gap, adjusted, figure):
    digits = DIGITS[figure]
    stars = "**" if adjusted < LEVEL else "* " if gap.low > 0 or gap.high < 0 else "  "
    return f"{gap.mean:+.{digits}f} ± {(gap.high - gap.low) / 2:.{digits}f}{stars}"
