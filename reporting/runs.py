"""Results of eval.py: one file, and a block of results that share tables."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from reporting.words import DIRECTIONS, over
from utils.errors import UserError
from utils.files import UNREADABLE

OWN_ARRAYS = ("text_uncertainty", "image_uncertainty", "chain_uncertainty")  # a method's own uncertainties
TASKS = ("retrieval", "classification", "hierarchy")
DECISIONS = ("matching", "conformal", "unanswerable", "correctness")  # tasks that judge what uncertainties are for
OF_EVAL = (*TASKS, *DECISIONS)


class Arrays(dict):
    """The arrays of an .npz by name; raises UserError where one is asked for that is not among them."""

    def __init__(self, path, arrays):
        super().__init__(arrays)
        self.path = path

    def __missing__(self, name):
        raise UserError(f"{self.path} holds no '{name}': delete it and evaluate again.")


@dataclass(frozen=True)
class Result:
    """One result file of eval.py."""

    path: Path  # relative to the folder of the report
    values: dict
    folder: Path = Path()

    @cached_property
    def arrays(self):
        """Its Arrays, which lie beside it; raises UserError where they are missing or damaged."""
        path = self.folder / self.path
        beside = path.with_suffix(".npz")
        try:
            with np.load(beside) as file:
                arrays = dict(file)
        except UNREADABLE:
            raise UserError(f"{beside} is missing or damaged: delete {path} and evaluate again.") from None
        if self.values.get("untrained"):  # what follows the method's own uncertainty, of random weights, is left out
            arrays = {name: values for name, values in arrays.items() if name not in OWN_ARRAYS}
            for name in arrays.keys() & {f"{direction}_uncertainty" for direction in DIRECTIONS}:
                arrays[name] = arrays[name.replace("_uncertainty", "_entropy")]
        return Arrays(beside, arrays)


class Block:
    """Results that may stand in one table: of one task, on the same data and backbone, with the same levels.

    results: dict of variant to its Results, one per seed, in the order of the rows; variants trained by the unified
    objective come last.
    """

    def __init__(self, task, evaluated_on, backbone, results):
        self.task, self.evaluated_on, self.backbone = task, evaluated_on, backbone
        self.results = dict(sorted(results.items(), key=lambda item: is_unified(item[1])))
        self.title = f"{evaluated_on}, {backbone}: {task}"
        self.first = next(iter(results.values()))[0].values  # for what all results agree in

    @property
    def runs(self):
        """All Results, row by row."""
        return [run for runs in self.results.values() for run in runs]

    @property
    def summary(self):
        """What the numbers are: of one seed, or means over several."""
        return over([seeds_of(runs) for runs in self.results.values()], "seed")

    @property
    def directions(self):
        """The directions in which queries were answered; none for chains of prompts."""
        return [direction for direction in DIRECTIONS if direction in self.first]


def baseline_of(block):
    """The first variant without an uncertainty, which others are compared with; None where there is none."""
    return next((variant for variant, runs in block.results.items() if not has_uncertainty(runs[0])), None)


def has_uncertainty(run):
    """Whether a Result is of a method with an uncertainty of its own, even if its untrained start's was left out."""
    values = run.values
    if values.get("untrained"):
        return True
    has_levels = any(values[side]["levels_by"] for side in DIRECTIONS if side in values)
    return has_levels or "query" in (values.get("hierarchy") or {}).get("uncertainty", {})


def is_unified(runs):
    """Whether a variant's Results are of runs trained by the unified objective rather than the method's own."""
    return runs[0].values["config"].get("objective") == "infonce"


def seeds_of(runs):
    """How many seeds, of how many folds each, a variant's Results are of, on however many data sets."""
    return len({(run.values["config"]["seed"], *(run.values.get("fold") or ())) for run in runs})


def data_sets(block):
    """What the results of a block were evaluated on: {evaluated_on: (data set, split)}."""
    names = {}
    for run in block.runs:
        data, split = run.values["evaluated_on"], run.values["split"]
        names.setdefault(data, (data.removesuffix(f"+{split}"), split))
    return names


def find(values, *path):
    """The value at a path of keys in nested dicts; None where a key is missing."""
    for key in path:
        values = None if values is None else values.get(key)
    return values


def level_counts(part):
    """How many queries each level of one direction of a result holds, the same for every uncertainty with levels."""
    return next((record["levels"]["count"] for record in part["uncertainty"].values() if "levels" in record), [])
