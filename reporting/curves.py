"""Learning curves of active_learning.py: by strategy, compared with random choice, and as text for the terminal."""

import statistics
import textwrap
from typing import NamedTuple

import numpy as np

from metrics.comparison import Difference, holm, paired, resampled
from reporting.words import LEVEL, REAL, SIGNIFICANT

TITLES = {"accuracy": "accuracy, %", "nll": "NLL, nats", "ece": "ECE, %"}
SCALE = {"accuracy": 100, "nll": 1, "ece": 100}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}
WEIGHTED = "-density"  # ends the name of a strategy that is weighted by density, after that of its plain rival
ORDER = (  # others come after
    "random", "random-targeted", "entropy", "entropy-targeted", "bald", "epig", "k-center",
    "entropy-density", "entropy-targeted-density", "bald-density",
)  # fmt: skip
BASE = "random"  # the strategy that others are compared with
MARKS = (  # what they mean
    f"{REAL}: it leaves 0 out (no mark where all seeds are alike). {SIGNIFICANT}: p < {LEVEL} also after Holm's"
    " adjustment over all strategies and budgets (means: over all strategies)"
)
DRAWS = 200  # of images, for the sampling error of an ECE
WIDTH = 19  # of a column


class Gap(NamedTuple):
    """A strategy's difference from random choice, and its p-value adjusted for all comparisons."""

    difference: Difference
    adjusted: float

    @property
    def mark(self):
        """REAL where the 95 % interval leaves 0 out, SIGNIFICANT where p stays below LEVEL after adjustment."""
        return SIGNIFICANT if self.adjusted < LEVEL else REAL if self.difference.p < LEVEL else ""

    def text(self, digits):
        """The mean difference, half of its interval and its mark."""
        half = (self.difference.high - self.difference.low) / 2
        return f"{self.difference.mean:+.{digits}f} ± {half:.{digits}f}{self.mark}"


def curves(results, figure):
    """The curves of a figure: {strategy: {seed: its values by budget and, last, their mean}}.

    results: {(seed, strategy): values of a file of active_learning.py}. figure: one of TITLES.
    """
    by_strategy = {}
    for (seed, strategy), result in results.items():
        values = [SCALE[figure] * point[figure] for point in result["curve"]]
        by_strategy.setdefault(strategy, {})[seed] = [*values, statistics.fmean(values)]
    return by_strategy


def interval_note(errors):
    """What follows ± of a difference; errors: as `image_errors` gives them, or None."""
    covers = "the seeds and of the target's images" if errors else "the seeds alone"
    return f"half of the 95 % interval (Student's t, paired by seed; sampling error of {covers}). {MARKS}"


def image_errors(arrays, figure):
    """Standard errors of each strategy's mean difference from random choice, by the choice of the target's images.

    arrays: {(seed, strategy): the arrays of a file of active_learning.py}. figure: one of TITLES. Returns {strategy:
    [by budget, ..., of their mean]} in the unit of TITLES.
    """
    seeds, errors = {seed for seed, strategy in arrays if strategy == BASE}, {}
    for strategy in dict.fromkeys(name for _, name in arrays if name != BASE):
        shared = sorted(seed for seed, name in arrays if name == strategy and seed in seeds)
        if not shared:
            continue
        if figure == "ece":
            error = _calibration_errors(arrays, strategy, shared)
        else:
            field = {"accuracy": "hit", "nll": "nll"}[figure]
            gap = np.mean([arrays[seed, strategy][field] - arrays[seed, BASE][field] for seed in shared], axis=0)
            gap = np.vstack([gap, gap.mean(axis=0)])  # (budgets + 1, Q)
            error = gap.std(axis=1, ddof=1) / np.sqrt(gap.shape[1])
        errors[strategy] = (SCALE[figure] * error).tolist()
    return errors


def _calibration_errors(arrays, strategy, seeds):
    """Standard errors of the mean difference in ECE, (budgets + 1,), over bootstrap draws of the images."""
    gaps = 0
    for name, sign in ((strategy, 1), (BASE, -1)):
        fields = (
            np.concatenate([arrays[seed, name][field] for seed in seeds]) for field in ("nll", "confidence", "hit")
        )
        drawn = resampled(*fields, draws=DRAWS)["ece"][1:]
        gaps = gaps + sign * drawn.reshape(DRAWS, len(seeds), -1).mean(axis=1)
    return np.column_stack([gaps, gaps.mean(axis=1)]).std(axis=0, ddof=1)


def gaps(curves, errors=None):
    """The Gaps of every strategy that shares two or more seeds with random choice: {strategy: [by budget, ..., mean]}.

    curves: as `curves` gives them. errors: as `image_errors` gives them. Holm's adjustment covers all strategies and
    budgets; for the means, which add no information, all strategies.
    """
    base, differences = curves.get(BASE, {}), {}
    for strategy, by_seed in curves.items():
        shared = [seed for seed in by_seed if seed in base]
        if strategy != BASE and len(shared) > 1:
            columns = (zip(*(curve[seed] for seed in shared), strict=True) for curve in (by_seed, base))
            by_images = (errors or {}).get(strategy) or [0.0] * len(by_seed[shared[0]])
            pairs = zip(*columns, by_images, strict=True)
            differences[strategy] = [paired(*pair) for pair in pairs]
    single = iter(holm([each.p for row in differences.values() for each in row[:-1]]))
    means = iter(holm([row[-1].p for row in differences.values()]))
    return {
        strategy: [*(Gap(each, next(single)) for each in row[:-1]), Gap(row[-1], next(means))]
        for strategy, row in differences.items()
    }


def curves_text(results, arrays):
    """Lay out results by (seed, strategy): every figure by budget and on average, and gaps to random choice.

    arrays: as in `image_errors`.
    """
    first = next(iter(results.values()))
    seeds = dict.fromkeys(seed for seed, _ in results)
    budgets = [point["budget"] for point in first["curve"]]
    wide = max(16, *(len(name) for _, name in results))
    lines = [
        f"{first['dataset']}, {first['backbone']}, target {first['settings']['target']} ({first['images']:,} images),"
        f" seeds: {', '.join(map(str, seeds))}; free labels of --val: {_free_labels(first)}"
    ]
    for figure in TITLES:
        digits, by_strategy = DIGITS[figure], curves(results, figure)
        before = SCALE[figure] * first["before"][figure]
        heads = [*(f"{budget:,}" for budget in budgets), "mean"]
        lines.append(f"\n{TITLES[figure]:{wide + 2}}" + "".join(f"{head:>{WIDTH}}" for head in heads))
        lines.append(f"  {'no label':{wide}}{before:>{WIDTH}.{digits}f}")
        for name, by_seed in by_strategy.items():
            columns = zip(*by_seed.values(), strict=True)
            lines.append(f"  {name:{wide}}" + "".join(f"{_mean(column, digits):>{WIDTH}}" for column in columns))
        compared = gaps(by_strategy, image_errors(arrays, figure))
        if compared:
            lines.append(f"  less {BASE}, 95 % interval")
        for name, row in compared.items():
            texts = [gap.text(digits) if gap.mark else f"{gap.text(digits)} " for gap in row]
            lines.append(f"  {name:{wide}}" + "".join(f"{text:>{WIDTH}}" for text in texts))
    if len(seeds) > 1:
        note = f"± is the standard deviation over seeds; of differences it is {interval_note(arrays)}."
        lines += ["", *textwrap.wrap(note, 7 * WIDTH - 5)]
    return "\n".join(lines)


def _free_labels(result):
    return 0 if result["settings"]["val_counts"] is not None else f"{result['curve'][0]['val_labels']:,}"


def _mean(values, digits):
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
