"""What hub correction does to each method: without and with it, read off one result."""

from functools import partial

from reporting.runs import find
from reporting.tables import Column, make
from reporting.tables.columns import bounds, percent, rows_of
from reporting.words import RETRIEVAL

FIGURES = {  # title, digits, factor, best, and where it stands in either part of a result
    "recall": ("R@1, %", 1, 100, max, ("recall", "1")),
    "aurc": ("AURC", 3, 1, min, ("uncertainty", "probability", "aurc")),
    "auroc": ("AUROC", 3, 1, max, ("uncertainty", "probability", "auroc")),
    "ece": ("ECE", 3, 1, min, ("calibration", "ece_15")),
}


def hubs(block):
    """Recall and the worth of the top probability, without and with hub correction; None where nothing has it."""
    if not any("uncorrected" in run.values for run in block.runs):
        return None
    columns = []
    for direction, title in RETRIEVAL.items():
        shown = direction == "text_to_image"
        read = partial(_kind, direction)
        columns.append(Column(f"{direction}_hubs", title, "correction", 0, read, best=None, shown=shown))
        for name, (heading, digits, factor, best, path) in FIGURES.items():
            for which in ("without", "with"):
                key = f"{direction}_{name}_{which}"
                read = partial(_figure, which, direction, path, factor)
                columns.append(Column(key, title, f"{heading} {which}", digits, read, best, shown=shown))
        gain = "uncorrected", direction, "gain"
        note = "R@1 with less without, paired over images"
        columns.append(percent(f"{direction}_gain", title, "gain", *gain, "recall", "1", note=note, shown=shown))
        path = *gain, "interval", "recall", "1"
        columns.append(bounds(f"{direction}_gain_interval", title, "interval", 1, *path, scale=100, shown=shown))
    note = (
        "A constant of each item is subtracted from its scores: how near it is to the training queries. AURC and AUROC"
        " are of the top probability. The correction is the same for every method, so no gain is the method's."
    )
    return make("hubs", "Hub correction, text→image", columns, rows_of(block, columns), note)


def _figure(which, direction, path, factor, values, selector):
    """A figure without or with correction; a method that is not corrected has one without."""
    part = values.get("uncorrected")
    if which == "with" or part is None:
        part = values if (which == "with") == (part is not None) else {}
        path = ("calibration", "model", "ece_15") if path[0] == "calibration" else path
    value = find(part, direction, *path)
    return None if value is None else factor * value


def _kind(direction, values, selector):
    """What was subtracted, in words."""
    chosen = find(values, "hubs", direction)
    if chosen is None:
        return None
    nearest = f", k {chosen['k']}" if chosen["k"] else ""
    return chosen["kind"] if chosen["kind"] == "none" else f"{chosen['kind']}{nearest}, weight {chosen['weight']}"
