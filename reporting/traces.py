"""Traces of BayesVLM's B factors by benchmarks/factor_trace.py: read, checked, and as a table."""

from functools import cached_property

from reporting.parts import NUMBER, Part, must_hold
from reporting.tables import Cell, Column, Row, make, mean_sd
from reporting.words import over
from utils.errors import UserError
from utils.files import UNREADABLE, read_json

NAME = "factor-trace.json"
SHAPE = {
    "dataset": str, "backbone": str, "fingerprint": str, "trials": int, "items": int,
    "sides": {
        side: [{"candidates": int, "batches": int, "relative_trace": [NUMBER]}] for side in ("image", "text")
    },
}  # fmt: skip


class Trace(Part):
    """One file of relative traces. folder: where it lies, relative to the report's."""

    task = "factor-trace"

    def __init__(self, folder, values):
        self.folder, self.values = folder, values
        self.evaluated_on, self.backbone = values["dataset"], values["backbone"]
        self.title = f"{self.evaluated_on}, {self.backbone}: trace of BayesVLM's B factors"
        self.summary = over([values["trials"]], "trial")
        self.files = {"both towers": [(NAME, folder / NAME)]}

    @property
    def facts(self):
        """How many items the traces are of."""
        return {"items": f"{self.values['items']:,}"} | super().facts

    @cached_property
    def lines(self):
        """Means and deviations: {tower: {number of batches: {candidates: (mean, s.d.)}}}."""
        lines = {}
        for tower, points in self.values["sides"].items():
            by_batches = lines.setdefault(tower, {})
            for point in sorted(points, key=lambda point: (point["batches"], point["candidates"])):
                line = by_batches.setdefault(point["batches"], {})
                line[point["candidates"]] = mean_sd(point["relative_trace"])
        return lines

    @property
    def largest(self):
        """The candidate-set size and the number of batches that traces are relative to."""
        return tuple(
            max(point[name] for points in self.values["sides"].values() for point in points)
            for name in ("candidates", "batches")
        )

    @cached_property
    def tables(self):
        """Its one reporting.tables.Table: a row per number of batches, a column per candidate-set size."""
        sizes = sorted({size for rows in self.lines.values() for row in rows.values() for size in row})
        columns = [
            Column(f"{side}_{size}", f"{side} tower, K candidates", f"{size:,}", 3, None, None)
            for side in self.lines
            for size in sizes
        ]
        counts = sorted({count for rows in self.lines.values() for count in rows})
        rows = []
        for count in counts:
            cells = {
                f"{tower}_{size}": Cell(*pair)
                for tower, by_batches in self.lines.items()
                for size, pair in by_batches.get(count, {}).items()
            }
            rows.append(Row(batches(count), self.folder, self.values["trials"], cells))
        most, largest = self.largest
        title, heads = "Relative trace of the B factor", ("batches", "trials")
        note = f"Trace of B per item, relative to the mean over trials at K = {most:,} with {batches(largest)}."
        return [make("factor_trace", title, columns, [("", rows)], note, heads=heads)]


def batches(count):
    """A number of batches in words."""
    return f"{count} batch" if count == 1 else f"{count} batches"


def paths(folder):
    """The files of traces under the folder of a data set."""
    return sorted(folder.glob(f"*/{NAME}"))


def read(folder, backbone=None):
    """Read the traces in `folder`: list of Traces; raises UserError where a file is damaged or of something else."""
    chosen = [path for path in paths(folder) if backbone in (None, path.parent.name)]
    return [Trace(path.parent.relative_to(folder), _read_one(folder, path)) for path in chosen]


def _read_one(folder, path):
    try:
        values = read_json(path)
        must_hold(values, SHAPE)
        for points in values["sides"].values():
            whole = all(
                point["candidates"] > 0 and len(point["relative_trace"]) == values["trials"] for point in points
            )
            if not points or not whole or not values["trials"]:
                raise ValueError("no traces, or not of all trials")
    except UNREADABLE:
        raise UserError(
            f"{path} is damaged or not a result of benchmarks.factor_trace: delete it and run"
            " benchmarks.factor_trace again."
        ) from None
    if (values["dataset"], values["backbone"]) != (folder.name, path.parent.name):
        raise UserError(
            f"{path} is of {values['dataset']}, {values['backbone']}, which does not belong there: move it to its own"
            " folder, or delete it."
        )
    return values
