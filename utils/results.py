"""Result files of eval.py: read, checked, and put together as they may stand in one table."""

import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils import paper_tables, tables
from utils.errors import UserError
from utils.files import read_json
from utils.paper_tables import has_uncertainty, is_unified
from utils.terminal import SIDES

TASKS = ("retrieval", "classification", "hierarchy")
NUMBER = (int, float)
ABOUT = {
    "evaluated_on": str, "split": str, "variant": str, "images": int, "captions": int, "classes": int,
    "uncer_levels": int, "drop_remainder": bool, "levels_by": (str, type(None)),
    "seen_in_training": int, "fingerprint": str, "checkpoint": str,
    "config": {
        "backbone": str, "method": str, "objective": str, "seed": int, "model": dict, "optim": dict,
        "train": {"batch_size": int, "epochs": int},
    },
}  # fmt: skip
BELIEF = dict.fromkeys(("ece_15", "ece_20", "adaptive_ece", "nll", "brier"), NUMBER) | {
    "reliability": {"count": [NUMBER], "confidence": [(*NUMBER, type(None))], "accuracy": [(*NUMBER, type(None))]}
}  # of the model's probabilities, and of temperature-scaled ones
RECORD = {  # of an uncertainty that is not constant
    "selective_recall": dict.fromkeys(("80", "90", "95"), NUMBER),
    "levels": {"count": [int], "recall": {"1": [NUMBER]}}, "interval": {"level_recall": [[NUMBER]]},
}  # fmt: skip
SIDE = {
    "queries": int, "recall": dict.fromkeys(("1", "5", "10"), NUMBER), "median_rank": NUMBER,
    "levels_by": (str, type(None)), "uncertainty": {"entropy": dict},
    "calibration": {"model": BELIEF},
}  # fmt: skip
CARD = {"query": str, "own": str, "uncertainty": NUMBER, "best": [{"answer": str, "score": NUMBER, "right": bool}]}
EXAMPLES = {"examples": {"most_certain": [CARD], "least_certain": [CARD]}}
HOLDS = {  # what a result of each task must hold
    "retrieval": {"score": str, "text_to_image": SIDE | EXAMPLES, "image_to_text": SIDE | EXAMPLES, "rsum": NUMBER},
    "classification": {"score": str, "image_to_class": SIDE | EXAMPLES},
    "hierarchy": {"hierarchy": {"chains": int, "prompts": int, "uncertainty": dict}},
}


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
            with np.load(beside) as arrays:
                return Arrays(beside, arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{beside} is missing or damaged: delete {path} and evaluate again.") from None


class Block:
    """The results that may stand in one table: of one task, on the same data and backbone, with levels alike.

    results: dict of variant to its Results, one per seed, in the order in which the rows shall stand; those trained by
    the unified objective are put last.
    """

    def __init__(self, task, evaluated_on, backbone, results):
        self.task, self.evaluated_on, self.backbone = task, evaluated_on, backbone
        self.results = dict(sorted(results.items(), key=lambda item: is_unified(item[1])))
        self.title = f"{evaluated_on}, {backbone}: {task}"
        self.any = next(iter(results.values()))[0].values  # of what all results agree in

    @cached_property
    def tables(self):
        """Its tables.Tables."""
        return paper_tables.every(self)

    @property
    def summary(self):
        """Say what the numbers are: of one seed, or means over 3, or over 1 to 3 where rows differ."""
        return tables.over([paper_tables.seeds_of(runs) for runs in self.results.values()], "seed")


def paths(folder):
    """The result files of eval.py under the folder of a data set."""
    return [path for task in TASKS for path in sorted(folder.glob(f"**/*-{task}.json"))]


def read(folder, backbone=None):
    """Read the results in `folder` into Blocks; raises UserError where one is damaged or they do not fit."""
    found = defaultdict(lambda: defaultdict(list))
    for path in paths(folder):
        values = _read_one(path)
        key = values["evaluated_on"], values["config"]["backbone"], values["task"]
        found[key][values["variant"]].append(Result(path.relative_to(folder), values, folder))
    found = {key: variants for key, variants in found.items() if backbone in (None, key[1])}
    # What was trained on is looked at first.
    order = sorted(found, key=lambda key: (key[0] != folder.name, key[0], key[1], TASKS.index(key[2])))
    for key in order:
        _must_fit(folder, found[key], key[2])
    return [Block(task, data, name, _in_order(found[data, name, task])) for data, name, task in order]


def across(blocks):
    """What the Blocks of classification of each backbone say side by side: a list of Blocks over several data sets.

    One of a single data set has what the Block itself has not, the differences from a baseline; none has no table.
    Raises UserError where one seed of a variant is not the same trained adaptor on all of them.
    """
    merged = defaultdict(lambda: defaultdict(list))
    for block in blocks:
        for variant, runs in block.results.items() if block.task == "classification" else ():
            merged[block.backbone][variant] += runs
    found = []
    for backbone, variants in merged.items():
        _must_be_one(variants)
        data = list(paper_tables.data_sets(Block("comparison", "", backbone, variants)))
        name = data[0] if len(data) == 1 else f"{len(data)} data sets"
        found.append(Block("comparison", name, backbone, _in_order(variants)))
    return [block for block in found if block.tables]


def _read_one(path):
    """The values of a result file; raises UserError where they are none that eval.py writes."""
    task = path.stem.rpartition("-")[2]
    again = "delete it and evaluate again"
    try:
        values = read_json(path)
        if "task" not in values and {"variant", "config"} <= set(values):
            raise UserError(f"{path} was written by an earlier eval.py, which measured less: {again}.")
        if values["task"] != task:
            raise ValueError(f"{path} is named after another task")
        must_hold(values, ABOUT | HOLDS[task])
        if "hierarchy" in values:
            must_hold(values, HOLDS["hierarchy"])
        for side in SIDES.keys() & values.keys():
            for record in values[side]["uncertainty"].values():
                must_hold(record, {"family": str} | ({} if record.get("constant") else RECORD))
            for belief in values[side]["calibration"].values():
                must_hold(belief, BELIEF)
        block = Block(task, "", "", {values["variant"]: [Result(path, values)]})
        tables.to_text([block])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise UserError(f"{path} is damaged or not a result of eval.py: {again}.") from None
    return values


def must_hold(values, shape):
    """Raise TypeError or KeyError unless values are of the types that `shape` has in their place."""
    if not isinstance(values, type(shape) if isinstance(shape, (dict, list)) else shape):
        raise TypeError(f"{values} is no {shape}")
    if isinstance(shape, dict):
        for name, part in shape.items():
            must_hold(values[name], part)
    elif isinstance(shape, list):
        for value in values:
            must_hold(value, shape[0])


def _must_fit(folder, variants, task):
    """Raise a UserError naming two files that must not stand in one table, or whose mean would mean nothing."""
    runs = [run for variant in variants.values() for run in variant]
    alike = {"fingerprint": "embeddings"}
    if task != "hierarchy":
        alike |= {"uncer_levels": "numbers of uncertainty levels", "drop_remainder": "choices of --drop-remainder"}
    _must_agree(folder, runs, alike)
    # Without an uncertainty there is nothing to choose.
    _must_agree(folder, [run for run in runs if has_uncertainty(run)], {"levels_by": "choices of --levels-by"})
    for seeds in variants.values():
        scaled = [run for run in seeds if run.values.get("val")]
        _must_agree(folder, scaled, {"val": "choices of --val", "val_fingerprint": "embeddings of --val"})
        for i, run in enumerate(seeds):
            for other in seeds[:i]:
                what = _clash(other.values["config"], run.values["config"])
                if what:
                    raise UserError(
                        f"{folder / other.path} and {folder / run.path} are not two seeds of one variant, for they have"
                        f" {what}: name one with --tag in train.py and eval.py, or delete it."
                    )


def _must_be_one(variants):
    """Raise a UserError naming two files of one variant and seed, on two data sets, that are of different weights."""
    for runs in variants.values():
        first = {}
        for run in runs:
            one = first.setdefault(run.values["config"]["seed"], run)
            if one.values["checkpoint"] != run.values["checkpoint"]:
                both = f"{one.folder / one.path} and {run.folder / run.path}"
                raise UserError(f"{both} are of different weights: evaluate again the one that was trained anew since.")


def _must_agree(folder, runs, alike):
    for run in runs[1:]:
        for name, what in alike.items():
            if run.values[name] != runs[0].values[name]:
                both = f"{folder / runs[0].path} and {folder / run.path}"
                values = f"{runs[0].values[name]} and {run.values[name]}"
                raise UserError(f"{both} have different {what}, {values}: evaluate one again, or delete it.")


def _clash(one, other):
    """Say what keeps the runs of two configurations from being seeds of one variant; None where nothing does."""
    if one["seed"] == other["seed"]:
        return "the same seed"
    flat = [config | {f"train.{name}": value for name, value in config["train"].items()} for config in (one, other)]
    decisive = ("score", "model", "optim", "train.batch_size", "train.epochs")
    return next((f"different {name}" for name in decisive if flat[0].get(name) != flat[1].get(name)), None)


def _in_order(variants):
    """Put methods without an uncertainty first, as the baseline they are, then names; and seeds by number."""
    names = sorted(variants, key=lambda name: (has_uncertainty(variants[name][0]), name))
    return {name: sorted(variants[name], key=lambda run: run.values["config"]["seed"]) for name in names}
