"""Tables of retrieval in the form that papers use: recall, the known truth, COCO's extended sets, calibration."""

from functools import partial

from reporting.runs import find
from reporting.tables import Cell, Column, make, published
from reporting.tables.columns import (
    ERRORS,
    bayes_optimal,
    bounds,
    column,
    one_row,
    percent,
    plain,
    record,
    rows_of,
    with_stand_ins,
)
from reporting.words import COCO, GALLERY_AWARE, OF_CANDIDATES, RETRIEVAL, SCORES

TRUTH = {"spearman": "Spearman", "kendall": "Kendall"}


def recall(block):
    """R@K both ways and their sum."""
    columns, by_score, limits = [], [], {}
    for direction, title in RETRIEVAL.items():
        group, shown = f"{title}, %", direction == "text_to_image"
        for k in (1, 5, 10):
            columns.append(percent(f"{direction}_r{k}", group, f"R@{k}", direction, "recall", str(k)))
            path, key = (direction, "interval", "recall", str(k)), f"{direction}_r{k}_interval"
            note = f"95 % bootstrap interval of R@{k} over images" if k == 1 else ""
            columns.append(bounds(key, group, f"R@{k}, interval", 1, *path, scale=100, note=note, shown=k == 1))
        read, note = partial(_share_of_limit, direction), "R@1 in percent of the Bayes-optimal R@1"
        columns.append(Column(f"{direction}_share_of_limit", group, "of limit", 1, read, note=note, shown=shown))
        key = f"{direction}_median_rank"
        columns.append(column(key, group, "median rank", 1, direction, "median_rank", best=min, shown=False))
        both = []
        for score, name in SCORES.items():
            read = partial(_recall_by, score, direction)
            both.append(Column(f"{direction}_r1_by_{name}", f"R@1, {group}", f"by {name}", 1, read, shown=shown))
        by_score += both
        limit = find(block.first, direction, "bayes_recall")
        if limit is not None:
            limits |= {key: Cell(100 * limit) for key in (f"{direction}_r1", *(each.key for each in both))}
    columns += [column("rsum", "", "RSUM", 1, "rsum", note="sum of the six recalls"), *by_score]
    columns += published.columns(block, "recall", columns)
    note = ""
    if limits:
        note = (
            "A caption can be true of many images, but only its own counts: Bayes-optimal is the best R@1 that a method"
            " can expect, for queries asked one by one; a sample may exceed it."
        )
    return make("recall", "Recall", columns, rows_of(block, columns), note, bayes_optimal(limits))


def truth(block):
    """How close a method comes to the truth, where the ambiguity of captions is known."""
    first, group = "text_to_image", "ambiguity of captions"
    columns = []
    for name in ("query", *GALLERY_AWARE, "retrieved", "sum", *OF_CANDIDATES):
        for key, title in TRUTH.items():
            read, shown = partial(_of_truth, first, key, name), name == "query"
            note = "rank correlation of uncertainty and true ambiguity; 1 is ideal"
            columns.append(Column(f"{name}_{key}", group if shown else name, title, 3, read, note=note, shown=shown))
    for direction, title in RETRIEVAL.items():
        note = "Bayes-optimal R@1 less that of the method"
        columns.append(
            percent(f"{direction}_regret", f"{title}, %", "regret", direction, "regret", best=min, note=note)
        )
        for key, heading, note in (
            ("map_at_r", "mAP@R", "mean average precision among the R best answers, where R answers are true"),
            ("r_precision", "R-P", "R-precision: the share of true answers among the R best"),
        ):
            columns.append(percent(f"{direction}_{key}", f"{title}, %", heading, direction, key, note=note))
            path = direction, "interval", key
            key, heading = f"{direction}_{key}_interval", f"{heading}, interval"
            columns.append(bounds(key, f"{title}, %", heading, 1, *path, scale=100, shown=False))
    if not block.first.get("bayes_optimal"):
        return None
    columns = [each if each.key.endswith(tuple(TRUTH)) else plain(each) for each in columns]
    note = "Uncertainties that need no training have rows of their own; those of the posterior need the search."
    return make("truth", "Against the truth", columns, rows_of(block, columns, with_stand_ins(one_row)), note)


def _of_truth(direction, key, name, values, selector):
    """A rank correlation with the truth: of the row's uncertainty, else of `name`."""
    if selector.uncertainty:
        name = selector.uncertainty if name == "query" else "none"
    return record(direction, (key,), values, selector, name)


def eccv(block):
    """COCO, CxC and ECCV Caption in the form of PCME++ (arXiv 2305.18171), table 1."""
    columns = [Column(key, "", title, 1, partial(_coco, key)) for key, title in COCO.items()]
    columns += published.columns(block, "eccv", columns)
    note = "In %, averaged over both directions; RSUM is the sum of six recalls. 5K and 1K are those of COCO."
    return make("eccv", "COCO, CxC and ECCV Caption", columns, rows_of(block, columns), note)


def calibration(block):
    """How well calibrated the posterior over the gallery is, before and after temperature scaling."""
    columns = []
    for direction in RETRIEVAL:
        for entry, group in (("model", "as the method gives it"), ("temperature", "temperature-scaled")):
            for key in ("ece_15", "ece_20", "adaptive_ece", "nll", "brier"):
                title, note = ERRORS[key]
                name = f"{direction}_{key}_scaled" if entry == "temperature" else f"{direction}_{key}"
                path, shown = (direction, "calibration", entry, key), direction == "text_to_image"
                columns.append(column(name, group, title, 3, *path, best=min, note=note, shown=shown))
                if key == "ece_15":
                    start = direction, "calibration", entry
                    for suffix, more, note in (
                        ("expected", "ECE, expected", "ECE of a calibrated method with the same confidences"),
                        ("limit", "ECE, 95 % limit", "below it, a figure cannot be told from perfect calibration"),
                    ):
                        path = *start, f"{key}_{suffix}"
                        shown_too = shown and suffix == "expected"
                        columns.append(
                            column(f"{name}_{suffix}", group, more, 3, *path, best=None, note=note, shown=shown_too)
                        )
                if key in ("ece_15", "nll", "brier"):
                    path = direction, "calibration", entry, "interval", key
                    columns.append(bounds(f"{name}_interval", group, f"{title}, interval", 3, *path, shown=False))
    note = "Of the posterior over the gallery; the temperature of each half of the queries is fitted on the other half."
    return make("calibration", "Calibration, text→image", columns, rows_of(block, columns), note)


def _share_of_limit(direction, values, selector):
    limit = find(values, direction, "bayes_recall")
    return 100 * values[direction]["recall"]["1"] / limit if limit else None


def _recall_by(score, direction, values, selector):
    """R@1 in percent by one score, where the run was evaluated by both."""
    if "other_score" not in values:
        return None
    other = values["other_score"]
    return 100 * (other if other["score"] == score else values)[direction]["recall"]["1"]


def _coco(key, values, selector):
    """A figure of metrics/eccv.py: in percent the mean over both directions, or a sum over them unchanged."""
    figure = find(values, "coco", key)
    if isinstance(figure, dict):
        return 100 * sum(figure.values()) / len(figure)
    return figure
