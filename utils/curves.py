"""Learning curves of active_learning.py: by strategy, less those of random choice, and as text for the terminal."""

import statistics
import textwrap
from typing import NamedTuple

from metrics.comparison import Difference, holm, paired

TITLES = {"accuracy": "accuracy, %", "nll": "NLL, nats", "ece": "ECE, %"}
SCALE = {"accuracy": 100, "nll": 1, "ece": 100}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}
ORDER = ("random", "random-targeted", "entropy", "entropy-targeted", "bald", "epig", "k-center")  # others come after
BASE = "random"  # what strategies are compared with
LEVEL = 0.05
INTERVAL = (  # what stands behind the differences, and what their marks say
    "half of the 95 % interval (Student's t, paired by seed). †: it leaves 0 out (unmarked where all seeds are alike)."
    " ‡: p < 0.05 also after Holm's adjustment, for all strategies and budgets at once (the means: for all strategies)"
)
WIDTH = 19  # of a column


class Gap(NamedTuple):
    """What a strategy differs by from random choice, and the p-value of that for all comparisons at once."""

    difference: Difference
    adjusted: float

    @property
    def mark(self):
        """† where the 95 % interval leaves 0 out, ‡ where the difference holds for all comparisons at once."""
        return "‡" if self.adjusted < LEVEL else "†" if self.difference.p < LEVEL else ""

    def text(self, digits):
        """The mean difference and half of its interval, marked."""
        half = (self.difference.high - self.difference.low) / 2
        return f"{self.difference.mean:+.{digits}f} ± {half:.{digits}f}{self.mark}"


def curves(results, figure):
    """The curves of a figure: dict of strategy to dict of seed to values by budget and, last, their mean.

    results: dict of (seed, strategy) to what active_learning.py wrote. figure: one of TITLES.
    """
    found = {}
    for (seed, name), result in results.items():
        values = [SCALE[figure] * point[figure] for point in result["curve"]]
        found.setdefault(name, {})[seed] = [*values, statistics.fmean(values)]
    return found


def gaps(curves):
    """The Gaps, by budget and last in the mean, of all strategies that share two or more seeds with random choice.

    Of what `curves` gives: dict of strategy to list. Holm's adjustment is for all strategies and budgets at once, and
    for all strategies in the mean, which says nothing new.
    """
    base, found = curves.get(BASE, {}), {}
    for name, own in curves.items():
        both = [seed for seed in own if seed in base]
        if name != BASE and len(both) > 1:
            columns = (zip(*(curve[seed] for seed in both), strict=True) for curve in (own, base))
            found[name] = [paired(*pair) for pair in zip(*columns, strict=True)]
    single = iter(holm([gap.p for gaps in found.values() for gap in gaps[:-1]]))
    means = iter(holm([gaps[-1].p for gaps in found.values()]))
    return {
        name: [*(Gap(gap, next(single)) for gap in gaps[:-1]), Gap(gaps[-1], next(means))]
        for name, gaps in found.items()
    }


def curves_text(results):
    """Lay out results by (seed, strategy): every figure by budget, and what strategies differ by from random choice.

    The last column is the mean over budgets.
    """
    one = next(iter(results.values()))
    seeds = dict.fromkeys(seed for seed, _ in results)
    budgets = [point["budget"] for point in one["curve"]]
    lines = [f"{one['dataset']}, {one['backbone']}, target {one['settings']['target']} ({one['images']:,} images)"]
    lines[0] += f", seeds: {', '.join(map(str, seeds))}; free labels of --val: {_free(one)}"
    for figure in TITLES:
        digits, found = DIGITS[figure], curves(results, figure)
        before = SCALE[figure] * one["before"][figure]
        heads = [*(f"{budget:,}" for budget in budgets), "mean"]
        lines.append(f"\n{TITLES[figure]:18}" + "".join(f"{head:>{WIDTH}}" for head in heads))
        lines.append(f"  {'no label':16}{before:>{WIDTH}.{digits}f}")
        for name, by_seed in found.items():
            columns = zip(*by_seed.values(), strict=True)
            lines.append(f"  {name:16}" + "".join(f"{_mean(column, digits):>{WIDTH}}" for column in columns))
        compared = gaps(found)
        lines += ["  less random, 95 % interval"] * bool(compared)
        for name, row in compared.items():
            marked = [gap.text(digits) + " " * (not gap.mark) for gap in row]
            lines.append(f"  {name:16}" + "".join(f"{text:>{WIDTH}}" for text in marked))
    if len(seeds) > 1:
        said = f"± is the standard deviation over seeds; of differences it is {INTERVAL}."
        lines += ["", *textwrap.wrap(said, 7 * WIDTH - 5)]
    return "\n".join(lines)


def _free(result):
    return 0 if result["settings"]["val_counts"] is not None else f"{result['curve'][0]['val_labels']:,}"


def _mean(values, digits):
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
