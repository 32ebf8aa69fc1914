"""What benchmarks/factor_trace.py measured of BayesVLM's B factors: read, checked, and as a table."""

from functools import cached_property

from utils import tables
from utils.errors import UserError
from utils.files import read_json
from utils.results import NUMBER, must_hold
from utils.tables import Cell, Column, Row

NAME = "factor-trace.json"
HOLDS = {
    "dataset": str, "backbone": str, "fingerprint": str, "trials": int, "items": int,
    "sides": {
        side: [{"candidates": int, "batches": int, "relative_trace": [NUMBER]}] for side in ("image", "text")
    },
}  # fmt: skip


class Trace:
    """One file of relative traces. folder: where it lies, relative to that of the report."""

    task = "factor-trace"

    def __init__(self, folder, values):
        self.folder, self.values = folder, values
        self.evaluated_on, self.backbone = values["dataset"], values["backbone"]
        self.title = f"{self.evaluated_on}, {self.backbone}: trace of BayesVLM's B factors"
        self.summary = tables.over([values["trials"]], "trial")
        self.facts = {"items": f"{values['items']:,}", "numbers": self.summary}
        self.files = {"both towers": [(NAME, folder / NAME)]}

    @cached_property
    def lines(self):
        """Means and deviations: dict of side to dict of the number of batches to dict of candidates to (mean, s.d.)."""
        found = {}
        for side, points in self.values["sides"].items():
            by_batches = found.setdefault(side, {})
            for point in sorted(points, key=lambda point: (point["batches"], point["candidates"])):
                column = by_batches.setdefault(point["batches"], {})
                column[point["candidates"]] = tables.mean_sd(point["relative_trace"])
        return found

    @property
    def largest(self):
        """The candidate-set size and the number of batches to which traces are relative."""
        return tuple(
            max(point[name] for points in self.values["sides"].values() for point in points)
            for name in ("candidates", "batches")
        )

    @cached_property
    def tables(self):
        """Its one tables.Table: a row per number of batches, a column per candidate-set size."""
        sizes = sorted({size for rows in self.lines.values() for row in rows.values() for size in row})
        columns = [
            Column(f"{side}_{size}", f"{side} tower, K candidates", f"{size:,}", 3, None, None)
            for side in self.lines
            for size in sizes
        ]
        counts = sorted({count for rows in self.lines.values() for count in rows})
        rows = []
        for count in counts:
            found = {
                f"{side}_{size}": Cell(*pair)
                for side, by_batches in self.lines.items()
                for size, pair in by_batches.get(count, {}).items()
            }
            rows.append(Row(batches(count), self.folder, self.values["trials"], found))
        most, largest = self.largest
        note = f"Trace of B per item, over that of K = {most:,} with {batches(largest)} in the mean over trials."
        table = tables.make(
            "factor_trace", "Relative trace of the B factor", columns, [("", rows)], note, heads=("batches", "trials")
        )
        return [table]


def batches(count):
    """A number of batches in words."""
    return f"{count} batch" + "es" * (count != 1)


def paths(folder):
    """The files of traces under the folder of a data set."""
    return sorted(folder.glob(f"*/{NAME}"))


def read(folder, backbone=None):
    """Read the traces in `folder`: list of Traces; raises UserError where a file is damaged or of something else."""
    found = [path for path in paths(folder) if backbone in (None, path.parent.name)]
    return [Trace(path.parent.relative_to(folder), _read_one(folder, path)) for path in found]


def _read_one(folder, path):
    again = "delete it and run benchmarks.factor_trace again"
    try:
        values = read_json(path)
        must_hold(values, HOLDS)
        for points in values["sides"].values():
            whole = all(
                point["candidates"] > 0 and len(point["relative_trace"]) == values["trials"] for point in points
            )
            if not points or not whole or not values["trials"]:
                raise ValueError("no traces, or not of all trials")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged or not a result of benchmarks.factor_trace: {again}.") from None
    if (values["dataset"], values["backbone"]) != (folder.name, path.parent.name):
        said = f"{values['dataset']}, {values['backbone']}"
        raise UserError(f"{path} is of {said}, and so does not belong there: move it to where it does, or delete it.")
    return values
