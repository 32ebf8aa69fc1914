"""Tables of zero-shot classification: one data set, several side by side, and differences from a baseline."""

import statistics
from functools import lru_cache, partial
from typing import NamedTuple

from metrics import comparison
from reporting.runs import baseline_of, data_sets, find, seeds_of
from reporting.tables import Cell, Column, Row, Selector, cells_of, make
from reporting.tables.columns import (
    AURC,
    AUROC,
    ERRORS,
    constant,
    one_row,
    own_or_deterministic,
    plain,
    record,
    rows_of,
    with_stand_ins,
)
from reporting.words import CLASSIFICATION, MINUS, PROBABILITIES, REAL

DIRECTION = "image_to_class"
BESIDE = " What no column names is the image's own uncertainty; those that need no training have rows of their own."


class Figure(NamedTuple):
    """A figure of classification that is compared over data sets."""

    key: str
    title: str
    digits: int
    scale: float
    best: object  # min or max
    note: str


ACROSS = (
    Figure("accuracy", "Accuracy (ACC), %", 1, 100, max, ""),
    Figure("nll", "NLPD", 3, 1, min, ERRORS["nll"][1]),
    Figure("ece_15", "ECE", 3, 1, min, ERRORS["ece_15"][1]),
    Figure("auroc", "AUROC of failure by entropy", 3, 1, max, AUROC),
    Figure("query", "AUROC of failure by the query's own uncertainty", 3, 1, max, AUROC),
    Figure("aurc", "AURC by entropy", 3, 1, min, AURC),
)


def classification(block):
    """Accuracy and calibration in the form of BayesVLM (arXiv 2412.06014)."""
    note = "95 % bootstrap interval of ACC over images"
    columns = [
        Column("acc", "", "ACC, %", 1, partial(_accuracy, "1")),
        Column("acc_interval", "", "ACC, interval", 1, _accuracy_interval, None, note=note),
    ]
    if block.first["classes"] > 5:
        columns.append(Column("top5", "", "top-5, %", 1, partial(_accuracy, "5")))
    for key, (title, note) in ERRORS.items():
        title = "NLPD" if title == "NLL" else title
        columns.append(Column(key, "", title, 3, partial(_of_probabilities, key, 1), min, note=note))
    columns = [plain(column) for column in columns]
    human = "rank correlation of uncertainty and the entropy of people's labels; 1 is ideal"
    of_entropy = {"auroc": _auroc_of_entropy, "spearman": partial(_of_method, "spearman", "entropy")}
    for key, group, title, meaning in (
        ("auroc", "failure", "AUROC", AUROC),
        ("spearman", "human labels", "Spearman", human),
    ):
        columns.append(Column(f"query_{key}", group, title, 3, partial(_own, key), note=meaning))
        columns.append(plain(Column(f"entropy_{key}", group, f"{title}, entropy", 3, of_entropy[key], note=meaning)))
    for name in ("query", "entropy"):
        read, title = partial(_auroc_interval, name), f"AUROC, {name}, interval"
        columns.append(plain(Column(f"{name}_auroc_interval", "failure", title, 3, read, None, shown=False)))
    rows = _filled(rows_of(block, columns, with_stand_ins(by_probabilities)))
    note = _on_temperatures(block) + BESIDE + constant(block, CLASSIFICATION, ("query",))
    return make("classification", "Classification", columns, rows, note)


def across(figure, block):
    """One Figure on every data set and on average, in the form of BayesVLM's table 1."""
    names = data_sets(block)
    if len(names) < 2:  # the table of the data set itself has it
        return None
    special = {"query": partial(_own, "auroc"), "auroc": _auroc_of_entropy}
    read = special.get(figure.key, partial(_of_probabilities, figure.key, figure.scale))
    columns = {
        data: [Column(f"{data}_{figure.key}", *head, figure.digits, read, figure.best)] for data, head in names.items()
    }
    if figure.key == "ece_15":
        more = partial(_of_probabilities, "ece_20", 1)
        for data, head in names.items():
            columns[data].append(Column(f"{data}_ece_20", *head, figure.digits, more, figure.best, shown=False))

    def mean(results, selector):
        figures = [read(values, _fallback(values, selector)) for values in results]
        return None if None in figures else statistics.fmean(figures)

    average = Column(f"average_{figure.key}", "", "average", figure.digits, mean, figure.best)

    def cells(runs, selector):
        by_data = {data: [run.values for run in runs if run.values["evaluated_on"] == data] for data in names}
        row = {}
        for data, values in by_data.items():
            if values:
                row |= cells_of(columns[data], values, selector)
        by_seed = [{values["config"]["seed"]: values for values in results} for results in by_data.values()]
        shared = [
            [results[seed] for results in by_seed] for seed in by_seed[0] if all(seed in results for results in by_seed)
        ]
        if shared:
            row |= cells_of([average], shared, selector)
        return row

    rows_of_variant = own_or_deterministic if figure.key == "query" else by_probabilities
    groups = _filled(rows_of(block, [], rows_of_variant, cells))
    note = f"{figure.note[0].upper()}{figure.note[1:]}." if figure.note else _on_temperatures(block)
    note += BESIDE if figure.key == "query" else ""
    averaged = any(average.key in row.cells for _, rows in groups for row in rows)
    selectors = {selector for runs in block.results.values() for _, selector in rows_of_variant(runs)}
    if averaged and any(_fallback(run.values, each) != each for run in block.runs for each in selectors):
        note += " Where no temperature can be fitted, the average takes the probabilities unscaled."
    every_column = [column for data in names for column in columns[data]]
    return make(f"across_{figure.key}", figure.title, [*every_column, average], groups, note)


def differences(figure, block):
    """One figure of probabilities less that of a baseline on the same images, with an interval: a row per comparison.

    figure: nll or ece. Seeds are averaged over, draw by draw.
    """
    names, base, rows, columns = data_sets(block), baseline_of(block), [], []
    for data, head in names.items():
        columns.append(Column(f"{data}_{figure}_gap", *head, 3, None, None))
        columns += [Column(f"{data}_{figure}_gap_{end}", *head, 3, None, None, shown=False) for end in ("low", "high")]
    drawn = _drawn(block)
    for name, ours, theirs in comparisons(block):
        cells = {}
        for data in names:
            if ours in drawn[data] and theirs in drawn[data]:
                gap = comparison.paired_difference(drawn[data][ours][figure], drawn[data][theirs][figure])
                # With its sign: what rounds to zero may be real.
                mean, low, high = (f"{value:+.3f}".replace("-", MINUS) for value in gap[:3])
                key, mark = f"{data}_{figure}_gap", REAL if gap.real else ""
                cells[key] = Cell(gap.mean, text=f"{mean} [{low}, {high}]{mark}")
                cells |= {f"{key}_low": Cell(gap.low), f"{key}_high": Cell(gap.high)}
        if cells:
            runs = block.results[ours[0]]
            rows.append(Row(name, runs[0].path.parent.parent, seeds_of(runs), cells, ours[0]))
    title = f"{'NLPD' if figure == 'nll' else 'ECE'} less that of a baseline"
    note = (
        "Below 0 is better. In brackets: the 95 % interval over resampled images, the same for both;"
        f" {REAL} marks one that leaves 0 out, each comparison by itself. {base} has the plain probabilities (MAP)."
        " What improves on a matched temperature comes from telling items apart rather than from cooling."
    )
    if figure == "ece":
        note += (
            " Resampling adds noise, which raises a small ECE more than a large one, most where many bins hold few"
            " images: trust a small difference less where forecasts differ much in confidence."
        )
    return make(f"differences_{figure}", title, columns, [("", rows)], note, heads=("comparison", "seeds"))


def comparisons(block):
    """The comparisons to print: list of (name, (variant, entry), (variant, entry)).

    Every method, and the plain probabilities under a temperature, against the plain ones; every method against those
    under a temperature, and against the temperature matched to it.
    """
    rows = [
        (variant, label, selector.probabilities)
        for variant, runs in block.results.items()
        for label, selector in by_probabilities(runs)
    ]
    pairs, base = [], baseline_of(block)
    if base:
        for variant, label, entry in rows:
            if (variant == base) != (entry == "model"):
                name = f"({variant}{label})" if label else variant
                pairs.append((f"{name} less {base}", (variant, entry), (base, "model")))
    for variant, label, entry in rows:
        if variant == base and entry != "model":
            others = [other for other in block.results if other != base]
            pairs += [(f"{other} less ({base}{label})", (other, "model"), (base, entry)) for other in others]
    for variant, _, entry in rows:
        if entry == "matched":
            pairs.append((f"{variant} less its matched temperature", (variant, "model"), (variant, entry)))
    return pairs


def by_probabilities(runs):
    """The rows of a classifier: its own probabilities, then those of every temperature that a data set has."""
    by_data = {}
    for run in runs:
        by_data.setdefault(run.values["evaluated_on"], []).append(run.values[DIRECTION]["calibration"])
    rows = one_row(runs)
    for entry, title in PROBABILITIES.items():
        calibrations = [
            calibration
            for of_data in by_data.values()
            if all(entry in calibration for calibration in of_data)
            for calibration in of_data
        ]
        if calibrations and entry != "model":
            splits = dict.fromkeys(calibration[entry].get("split", "") for calibration in calibrations)
            rows.append((f" + {title.format(split=' or '.join(splits))}", Selector(probabilities=entry)))
    return rows


@lru_cache(maxsize=1)  # of the tables of one block
def _drawn(block):
    """NLL and ECE of what is compared, averaged over seeds: {data set: {(variant, entry): {figure: (1 + draws,)}}}."""
    wanted = {pair for _, *both in comparisons(block) for pair in both}
    by_data = {data: {} for data in data_sets(block)}
    for data, drawn in by_data.items():
        runs = [
            (pair, run)
            for pair in sorted(wanted)
            for run in block.results[pair[0]]
            if run.values["evaluated_on"] == data and pair[1] in run.values[DIRECTION]["calibration"]
        ]
        if not runs:
            continue
        fields = "nll", "confidence", "hit"
        arrays = [[run.arrays[f"{DIRECTION}_{pair[1]}_{field}"] for pair, run in runs] for field in fields]
        figures = comparison.resampled(*arrays)
        for pair in wanted:
            seeds = [i for i, (other, _) in enumerate(runs) if other == pair]
            if seeds:
                drawn[pair] = {name: values[:, seeds].mean(axis=1) for name, values in figures.items()}
    return by_data


def _accuracy(k, values, selector):
    """Top-k accuracy in percent of what ranks, or top-1 of the plain cosines under a matched temperature."""
    if selector.probabilities == "matched":
        return 100 * values[DIRECTION]["calibration"]["matched"]["accuracy"] if k == "1" else None
    return 100 * values[DIRECTION]["recall"][k]


def _accuracy_interval(values, selector):
    """95 % interval of the top-1 accuracy in percent of what ranks."""
    ends = find(values, DIRECTION, "interval", "recall", "1")
    return None if ends is None or selector.probabilities == "matched" else tuple(100 * end for end in ends)


def _auroc_interval(name, values, selector):
    """95 % interval of the AUROC of one of the method's uncertainties."""
    ends = record(DIRECTION, ("interval", "auroc"), values, selector, name)
    return tuple(ends) if ends and selector.probabilities == "model" else None


def _of_probabilities(key, scale, values, selector):
    """A figure of the row's probabilities."""
    figure = find(values, DIRECTION, "calibration", selector.probabilities, key)
    return None if figure is None else scale * figure


def _filled(groups):
    """The groups of rows without those that have no figure, as of a stand-in where every answer is right."""
    return [(heading, [row for row in rows if row.cells]) for heading, rows in groups]


def _own(key, values, selector):
    """A figure of the image's own uncertainty, or of the stand-in that a row names."""
    return _of_method(key, selector.uncertainty or "query", values, selector)


def _of_method(key, name, values, selector):
    """A figure of one of the method's uncertainties; None in the row of a temperature, which changes none of them."""
    return record(DIRECTION, (key,), values, selector, name) if selector.probabilities == "model" else None


def _auroc_of_entropy(values, selector):
    """AUROC of failure by the entropy of a row's probabilities."""
    if selector.probabilities == "model":
        return _of_method("auroc", "entropy", values, selector)
    return _of_probabilities("auroc", 1, values, selector)


def _fallback(values, selector):
    """What an average reads on a data set: the plain probabilities where no temperature could be fitted."""
    entry = selector.probabilities
    asked = entry == "temperature" or (entry == "validation" and values.get("val"))
    if asked and entry not in values[DIRECTION]["calibration"]:
        return selector._replace(probabilities="model")
    return selector


def _on_temperatures(block):
    """Sentences on the temperatures of a block's classifiers."""
    entries = {selector.probabilities for runs in block.results.values() for _, selector in by_probabilities(runs)}
    note = "The temperature of each half of the images is fitted on the other half; it changes no answer."
    if any("temperature" not in run.values[DIRECTION]["calibration"] for run in block.runs):
        note += " Where too few answers are wrong to bound one, there is none."
    if "validation" in entries:
        note += " That of another split is fitted on all of its labeled images, however unlike they are."
    if "matched" in entries:
        note += (
            " Matched temperature: plain cosines of the frozen embeddings at the one temperature that cools as much as"
            " the method does on average, so what improves on it comes from telling items apart."
        )
    return note
