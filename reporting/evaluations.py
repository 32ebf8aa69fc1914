"""Result files of eval.py: read, checked, and grouped into blocks that share tables."""

from collections import defaultdict
from functools import cached_property

from reporting.parts import NUMBER, Part, must_hold
from reporting.runs import DECISIONS, OF_EVAL, TASKS, Block, Result, data_sets, has_uncertainty, level_counts
from reporting.tables import by_task, formats
from reporting.words import DIRECTIONS, OWN, QUERY, followed, over, plain
from utils.errors import UserError
from utils.files import UNREADABLE, is_name, read_json

METADATA = {
    "evaluated_on": str, "split": str, "variant": str, "images": int, "captions": int, "classes": int,
    "uncer_levels": int, "drop_remainder": bool, "levels_by": (str, type(None)),
    "seen_in_training": int, "fingerprint": str, "checkpoint": str,
    "config": {
        "backbone": str, "method": str, "objective": str, "seed": int, "model": dict, "optim": dict,
        "train": {"batch_size": int, "epochs": int},
    },
}  # fmt: skip
CALIBRATION = dict.fromkeys(("ece_15", "ece_20", "adaptive_ece", "nll", "brier"), NUMBER) | {
    "reliability": {"count": [NUMBER], "confidence": [(*NUMBER, type(None))], "accuracy": [(*NUMBER, type(None))]}
}  # of the model's probabilities, and of temperature-scaled ones
RECORD = {  # of an uncertainty that is not constant
    "selective_recall": dict.fromkeys(("80", "90", "95"), NUMBER),
    "levels": {"count": [int], "recall": {"1": [NUMBER]}}, "interval": {"level_recall": [[NUMBER]]},
}  # fmt: skip
DIRECTION = {
    "queries": int, "recall": dict.fromkeys(("1", "5", "10"), NUMBER), "median_rank": NUMBER,
    "levels_by": (str, type(None)), "uncertainty": {"entropy": dict},
    "calibration": {"model": CALIBRATION},
}  # fmt: skip
EXAMPLE = {"query": str, "own": str, "uncertainty": NUMBER, "best": [{"answer": str, "score": NUMBER, "right": bool}]}
EXAMPLES = {"examples": {"most_certain": [EXAMPLE], "least_certain": [EXAMPLE]}}
HIERARCHY = {"hierarchy": {"chains": int, "prompts": int, "uncertainty": dict}}
SHAPES = {  # what a result of each task must hold
    "retrieval": {
        "score": str, "text_to_image": DIRECTION | EXAMPLES, "image_to_text": DIRECTION | EXAMPLES, "rsum": NUMBER
    },
    "classification": {"score": str, "image_to_class": DIRECTION | EXAMPLES},
    "hierarchy": HIERARCHY,
    **{task: {"score": str} for task in DECISIONS},
}  # fmt: skip


class Evaluation(Block, Part):
    """A Block as a part of a report."""

    @cached_property
    def tables(self):
        """Its reporting.tables.Tables."""
        return by_task.every(self)

    @property
    def facts(self):
        """Split, sizes and levels."""
        result = self.first
        facts = {"split": result["split"], "images": f"{result['images']:,}"}
        if result["classes"]:
            facts["classes"] = f"{result['classes']:,}"
        facts["prompts" if result["classes"] else "captions"] = f"{result['captions']:,}"
        if result.get("repeated_captions"):
            facts["captions that also stand with another image"] = f"{result['repeated_captions']:,}"
        if result["skipped"]:
            facts["skipped as unreadable"] = f"{result['skipped']:,}"
        if result.get("hierarchy"):
            facts["chains of prompts"] = f"{result['hierarchy']['chains']:,}"
        for direction in self.directions:
            counts = level_counts(result[direction])
            if counts:
                sizes = " or ".join(f"{size:,}" for size in sorted(set(counts)))
                facts[f"{QUERY[direction]}s as queries"] = f"{len(counts)} levels of {sizes}"
        return facts | super().facts

    @property
    def warnings(self):
        """Leakage, and uncertainties that are the same for all queries."""
        results = {variant: runs[0].values for variant, runs in self.results.items()}
        leakage = [
            f"Leakage: {variant} was trained on {result['seen_in_training']:,} of these {self.first['images']:,}"
            " images, so its numbers are too good."
            for variant, result in results.items()
            if result["seen_in_training"]
        ]
        constant = [
            f"To {variant} all {QUERY[direction]}s are equally uncertain"
            f" (by the {followed(direction, result[direction]['levels_by'])}): it has no levels for them."
            for variant, result in results.items()
            for direction in self.directions
            if result[direction]["uncertainty"].get(result[direction]["levels_by"], {}).get("constant")
        ]
        untrained = [
            f"{variant}: held-out pairs chose the start, so its uncertainty is of random weights and left out."
            for variant, runs in self.results.items()
            if any(run.values.get("untrained") for run in runs)
        ]
        start = [
            f"{variant}: held-out pairs chose the start, so its answers are those before training."
            for variant, runs in self.results.items()
            if any(run.values.get("start_kept") and not run.values.get("untrained") for run in runs)
        ]
        return leakage + constant + untrained + start

    @property
    def files(self):
        """The result files by variant."""
        return {
            variant: [(f"seed {run.values['config']['seed']}", run.path) for run in runs]
            for variant, runs in self.results.items()
        }

    @property
    def gallery(self):
        """By variant the directions of its first seed's result that have examples."""
        gallery = {}
        for variant, runs in self.results.items():
            with_examples = {
                direction: runs[0].values[direction]
                for direction in self.directions
                if "examples" in runs[0].values[direction]
            }
            if with_examples:
                gallery[variant] = with_examples
        return gallery


class Comparison(Block, Part):
    """Results of classification by one backbone on several data sets, side by side."""

    @cached_property
    def tables(self):
        """Its reporting.tables.Tables."""
        return by_task.every(self)


class Folds(Block, Part):
    """Results on the test parts of a K-fold cross-validation, which stand in for seeds: means over all of them.

    of: the task, and how many folds.
    """

    def __init__(self, of, evaluated_on, backbone, results):
        super().__init__("folds", evaluated_on, backbone, results)
        self._task, self._folds = of
        self.title = f"{evaluated_on}, {backbone}: {self._task}, {self._folds} folds"

    @cached_property
    def tables(self):
        """Its reporting.tables.Tables."""
        return [table._replace(heads=("method", "test parts")) for table in by_task.every(self, f"{self._task} folds")]

    @property
    def summary(self):
        """What the numbers are."""
        return (
            f"{over([len(runs) for runs in self.results.values()], 'test part')}; parts are disjoint, but what is"
            " trained on overlaps, so the s.d. understates that over new data"
        )

    @property
    def warnings(self):
        """Variants that lack folds, which do not compare."""
        short = {variant: len({run.values["fold"][0] for run in runs}) for variant, runs in self.results.items()}
        return [
            f"{variant} has {count} of {self._folds} folds: its means are of other images."
            for variant, count in short.items()
            if count < self._folds
        ]

    @property
    def files(self):
        """The result files by variant."""
        return {
            variant: [(f"fold {run.values['fold'][0]}, seed {run.values['config']['seed']}", run.path) for run in runs]
            for variant, runs in self.results.items()
        }


def paths(folder):
    """The result files of eval.py under the folder of a data set."""
    return [path for task in OF_EVAL for path in sorted(folder.glob(f"**/[!.]*-{task}.json"))]


def read(folder, backbone=None):
    """Read the results in `folder` into Evaluations, and Comparisons behind those of classification.

    Raises UserError where a file is damaged or results do not fit together.
    """
    groups, folds = (defaultdict(lambda: defaultdict(list)) for _ in range(2))
    for path in paths(folder):
        values = _read_one(path)
        if backbone in (None, values["config"]["backbone"]):
            chosen, name, variant = groups, values["evaluated_on"], values["variant"]
            key = name, values["config"]["backbone"], values["task"]
            if values.get("fold"):
                number, count = values["fold"]
                chosen, variant = folds, variant.removesuffix(f"fold{number}of{count}").rstrip("+-")
                key = name.replace(f"test{number}of{count}", "").rstrip("+-"), key[1], (key[2], count)
            chosen[key][variant].append(Result(path.relative_to(folder), values, folder))
    # The data set that was trained on comes first.
    order = sorted(groups, key=lambda key: (key[0] != folder.name, key[0], key[1], OF_EVAL.index(key[2])))
    for key in order:
        _must_fit(folder, groups[key], key[2])
    evaluations = [Evaluation(task, data, name, _in_order(groups[data, name, task])) for data, name, task in order]
    start = next((i for i, part in enumerate(evaluations) if part.task == "classification"), len(evaluations))
    return [*evaluations[:start], *compare(evaluations), *evaluations[start:], *_folds(folder, folds)]


def _folds(folder, groups):
    """Make Folds of results, {(data set, backbone, (task, folds)): {variant: list of Results}}."""
    for variants in groups.values():
        runs = [run for variant in variants.values() for run in variant]
        _must_agree(folder, runs, {"uncer_levels": "numbers of uncertainty levels"})
    return [Folds(of, data, name, _in_order(variants)) for (data, name, of), variants in sorted(groups.items())]


def compare(evaluations):
    """Put the classification results of each backbone side by side, over all data sets: list of Comparisons.

    A Comparison of a single data set adds the differences from a baseline; one without tables is left out. Raises
    UserError where one seed of a variant is not the same trained adaptor on all data sets.
    """
    by_backbone = defaultdict(lambda: defaultdict(list))
    for part in evaluations:
        if part.task == "classification":
            for variant, runs in part.results.items():
                by_backbone[part.backbone][variant] += runs
    comparisons = []
    for backbone, variants in by_backbone.items():
        _must_be_one(variants)
        data = list(data_sets(Block("comparison", "", backbone, variants)))
        name = data[0] if len(data) == 1 else f"{len(data)} data sets"
        comparisons.append(Comparison("comparison", name, backbone, _in_order(variants)))
    return [comparison for comparison in comparisons if comparison.tables]


def _read_one(path):
    """The values of a result file; raises UserError where eval.py did not write it."""
    task = path.stem.rpartition("-")[2]
    try:
        values = read_json(path)
        if "task" not in values and {"variant", "config"} <= set(values):
            raise UserError(
                f"{path} was written by an earlier eval.py, which measured less: delete it and evaluate again."
            )
        if values["task"] != task:
            raise ValueError(f"{path} is named after another task")
        must_hold(values, METADATA | SHAPES[task])
        if not all(map(is_name, (values["evaluated_on"], values["variant"], values["config"]["backbone"]))):
            raise ValueError(f"{path} has a path for a name, and figures are called by it")
        if values.get("fold"):
            number, count = values["fold"]
            must_hold({"number": number, "count": count}, {"number": int, "count": int})
        if "hierarchy" in values:
            must_hold(values, HIERARCHY)
        for direction in DIRECTIONS.keys() & values.keys():
            for record in values[direction]["uncertainty"].values():
                must_hold(record, {"family": str} | ({} if record.get("constant") else RECORD))
            for probabilities in values[direction].get("calibration", {}).values():
                must_hold(probabilities, CALIBRATION)
        if values.get("untrained"):
            _leave_out_own(values)
        _must_print(Evaluation(task, "", "", {values["variant"]: [Result(path, values)]}))
    except UNREADABLE:
        raise UserError(f"{path} is damaged or not a result of eval.py: delete it and evaluate again.") from None
    return values


def _leave_out_own(values):
    """Remove a method's own uncertainties, of random weights, from a result whose start was kept."""
    for direction in DIRECTIONS.keys() & values.keys():
        values[direction]["levels_by"] = None
        for name in OWN:
            values[direction]["uncertainty"].pop(name, None)
    values.get("hierarchy", {"uncertainty": {}})["uncertainty"].pop("query", None)


def _must_print(part):
    """Raise whatever printing the tables of a part raises: the test of every figure that the shapes above leave out."""
    formats.to_text([part])
    _ = part.facts, part.warnings, part.gallery  # what the page shows beside them


def as_text(path, values):
    """The tables of a single result as text for the terminal."""
    part = Evaluation(
        values["task"],
        values["evaluated_on"],
        values["config"]["backbone"],
        {values["variant"]: [Result(path, values)]},
    )
    return plain(formats.to_text([part]))


def _must_fit(folder, variants, task):
    """Raise a UserError naming two files that must not stand in one table, or whose mean would mean nothing."""
    runs = [run for variant in variants.values() for run in variant]
    alike = {"fingerprint": "embeddings"}
    if task in TASKS and task != "hierarchy":
        alike |= {"uncer_levels": "numbers of uncertainty levels", "drop_remainder": "choices of --drop-remainder"}
    _must_agree(folder, runs, alike)
    # Without an uncertainty there is nothing to choose.
    _must_agree(folder, [run for run in runs if has_uncertainty(run)], {"levels_by": "choices of --levels-by"})
    for seeds in variants.values():
        scaled = [run for run in seeds if run.values.get("val")]
        _must_agree(folder, scaled, {"val": "choices of --val", "val_fingerprint": "embeddings of --val"})
        for i, run in enumerate(seeds):
            for other in seeds[:i]:
                clash = _clash(other.values["config"], run.values["config"])
                if clash:
                    raise UserError(
                        f"{folder / other.path} and {folder / run.path} are not two seeds of one variant, as they have"
                        f" {clash}: name one with --tag in train.py and eval.py, or delete it."
                    )


def _must_be_one(variants):
    """Raise a UserError naming two files of one variant and seed, on two data sets, with different weights."""
    for runs in variants.values():
        first = {}
        for run in runs:
            one = first.setdefault(run.values["config"]["seed"], run)
            if one.values["checkpoint"] != run.values["checkpoint"]:
                raise UserError(
                    f"{one.folder / one.path} and {run.folder / run.path} are of different weights: evaluate again the"
                    " one that was trained anew since."
                )


def _must_agree(folder, runs, alike):
    """Raise a UserError naming two files that differ in an entry of `alike`, {entry: what it is called}."""
    for run in runs[1:]:
        for entry, name in alike.items():
            if run.values[entry] != runs[0].values[entry]:
                raise UserError(
                    f"{folder / runs[0].path} and {folder / run.path} have different {name},"
                    f" {runs[0].values[entry]} and {run.values[entry]}: evaluate one again, or delete it."
                )


def _clash(one, other):
    """Say what keeps the runs of two configurations from being seeds of one variant; None where nothing does."""
    if one["seed"] == other["seed"]:
        return "the same seed"
    flat = [config | {f"train.{name}": value for name, value in config["train"].items()} for config in (one, other)]
    flat = [{"train.precision": "float32"} | config for config in flat]  # of results from before there was a choice
    decisive = ("score", "model", "optim", "train.batch_size", "train.epochs", "train.precision")
    return next((f"different {name}" for name in decisive if flat[0].get(name) != flat[1].get(name)), None)


def _in_order(variants):
    """Put methods without an uncertainty first, as they are the baseline, then sort by name; and seeds by number."""
    names = sorted(variants, key=lambda name: (has_uncertainty(variants[name][0]), name))

    def place(run):
        return run.values["config"]["seed"], run.values.get("fold") or []

    return {name: sorted(variants[name], key=place) for name in names}
