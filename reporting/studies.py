"""Result files of active_learning.py: read, checked, and grouped into studies that share tables."""

from collections import defaultdict
from functools import cached_property

from reporting.curves import BASE, DIGITS, ORDER, SCALE, TITLES, curves, gaps, image_errors, interval_note
from reporting.parts import NUMBER, Part, must_hold
from reporting.runs import Result
from reporting.tables import Cell, Column, Row, Selector, cells_of, make, mean_sd
from reporting.tables.columns import AUROC, column
from reporting.words import GALLERY_AWARE, MINUS, over
from utils import result_file
from utils.config import difference
from utils.errors import UserError
from utils.files import UNREADABLE, read_json

JUDGED = dict.fromkeys(TITLES, NUMBER) | {
    "entropy_auroc": (*NUMBER, type(None)),
    "by_entropy": {"count": [int], "entropy": [NUMBER], "error": [NUMBER]},
}
SETTINGS = {
    "pool": [str], "target": str, "val": (str, type(None)), "val_counts": (*NUMBER, type(None)), "budgets": [int],
    "preset": str, "factors": str,
}  # fmt: skip
SHARED = {
    "dataset": str,
    "backbone": str,
    "settings": SETTINGS,
    "fingerprint": dict,
}  # entries in which the results of a folder agree
SHAPE = SHARED | {
    "seed": int, "strategy": str, "classes": int, "images": int, "offered": int, "before": JUDGED,
    "curve": [JUDGED | {"budget": int, "labels": int, "val_labels": int, "epoch": int}],
}  # fmt: skip
HEADINGS = {"accuracy": "Accuracy", "nll": "NLL", "ece": "ECE"}
BEST = {"accuracy": max, "nll": min, "ece": min}


class Study(Part):
    """The results of one folder of active_learning.py: on one target, with the same settings.

    results: {(seed, strategy): a file's values}, in the order of strategies and seeds. folder: where they lie, relative
    to the report's, root. arrays: the files' arrays likewise, {} where any file lacks them.
    """

    task = "active"

    def __init__(self, folder, results, root):
        self.folder, self.results, self._root = folder, results, root
        self.first = next(iter(results.values()))  # for what all results agree in
        self.evaluated_on, self.backbone = folder.name, self.first["backbone"]
        self.title = f"{self.first['dataset']}, {self.backbone}: active learning, target {folder.name}"

    @cached_property
    def seeds(self):
        """The seeds of each strategy: dict of its name to list."""
        return {name: [seed for seed, other in self.results if other == name] for _, name in self.results}

    @property
    def budgets(self):
        """The numbers of labels that were paid for."""
        return [point["budget"] for point in self.first["curve"]]

    @property
    def summary(self):
        """What the numbers are: of one seed, or means over several."""
        return over([len(seeds) for seeds in self.seeds.values()], "seed")

    @property
    def facts(self):
        """Target, pool and settings."""
        result, settings = self.first, self.first["settings"]
        validation = "none: training ends with its last epoch"
        if settings["val_counts"] is not None:
            validation = f"{100 * settings['val_counts']:g} % of every budget, of {settings['val']}"
        elif settings["val"]:
            validation = f"{result['curve'][0]['val_labels']:,} of {settings['val']}, free"
        return {
            "target": f"{settings['target']}: {result['images']:,} images of {result['classes']:,} classes",
            "pool of each seed": f"{result['offered']:,} images of {' and '.join(settings['pool'])}",
            "labels that pick the epoch": validation,
            "posterior": f"factors of {settings['factors']}",
            "preset": settings["preset"],
            "other settings": ", ".join(
                f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name not in SETTINGS
            ),
            "numbers": self.summary,
        }

    @cached_property
    def arrays(self):
        files = {
            (seed, name): Result(self.folder / f"{name}-seed{seed}.json", {}, self._root) for seed, name in self.results
        }
        if not all(result_file.has_arrays(file.folder / file.path) for file in files.values()):
            return {}
        return {cell: file.arrays for cell, file in files.items()}

    def gaps(self, figure):
        """The `curves.Gap`s of a figure, with the sampling error of the images where the arrays are at hand."""
        return gaps(curves(self.results, figure), image_errors(self.arrays, figure))

    @property
    def files(self):
        """The result files by strategy."""
        return {
            name: [(f"seed {seed}", self.folder / f"{name}-seed{seed}.json") for seed in seeds]
            for name, seeds in self.seeds.items()
        }

    @cached_property
    def tables(self):
        """Its reporting.tables.Tables: one per figure, and which answers to trust where an answer is wrong."""
        tables = [self._table(figure) for figure in TITLES]
        return [table for table in (*tables, self._trust()) if table]

    def _trust(self):
        """AUROCs of what tells wrong answers from right ones at no cost, with the most labels and without any."""
        columns = [
            column(f"{name}_auroc", "AUROC", GALLERY_AWARE[name], 3, f"{name}_auroc", note=AUROC)
            for name in ("entropy", "probability")
        ]
        rows = []
        for name, seeds in self.seeds.items():
            last = [self.results[seed, name]["curve"][-1] for seed in seeds]
            rows.append(Row(name, self.folder, len(seeds), cells_of(columns, last, Selector()), name))
        before = Row("no label", None, None, cells_of(columns, [self.first["before"]], Selector()))
        title = f"Which answers to trust, with {self.budgets[-1]:,} labels"
        note = "Without a label: plain CLIP. Where answers differ, AUROCs are of different errors."
        return make("trust", title, columns, [("", rows)], note, [before], ("strategy", "seeds"))

    def _table(self, figure):
        """One figure by budget and on average, and its difference from random choice."""
        digits, by_strategy = DIGITS[figure], curves(self.results, figure)
        compared = self.gaps(figure)
        heads = [*(f"{budget:,}" for budget in self.budgets), "mean"]
        keys = [f"{figure}_{name}" for name in (*self.budgets, "mean")]
        # Means over different numbers of seeds do not compare.
        best = BEST[figure] if len(set(map(len, by_strategy.values()))) == 1 else None
        columns = [Column(key, TITLES[figure], head, digits, None, best) for key, head in zip(keys, heads, strict=True)]
        less = f"less {BASE}, 95 % interval"
        for key, head in zip(keys, heads, strict=True):
            columns.append(Column(f"{key}_gap", less, head, digits, None, None))
            ends = (f"{key}_gap_{end}" for end in ("low", "high", "adjusted_p"))
            columns += [Column(end, less, head, digits, None, None, shown=False) for end in ends]
        rows = []
        for name, by_seed in by_strategy.items():
            values = zip(*by_seed.values(), strict=True)
            cells = {key: Cell(*mean_sd(column)) for key, column in zip(keys, values, strict=True)}
            for key, gap in zip(keys, compared.get(name, ()), strict=False):
                text = gap.text(digits).replace("-", MINUS)
                cells[f"{key}_gap"] = Cell(gap.difference.mean, text=text)
                ends = {"low": gap.difference.low, "high": gap.difference.high, "adjusted_p": gap.adjusted}
                cells |= {f"{key}_gap_{end}": Cell(value) for end, value in ends.items()}
            rows.append(Row(name, self.folder, len(by_seed), cells, name))
        before = Cell(SCALE[figure] * self.first["before"][figure])
        epochs = [point["epoch"] for result in self.results.values() for point in result["curve"]]
        note = "Columns: labels paid for; mean: over those budgets."
        if 0 in epochs:
            kept = sum(epoch == 0 for epoch in epochs)
            note += (
                f" {kept} of {len(epochs)} trainings kept their start, as no epoch improved on it on validation images."
            )
        if compared:
            note += (
                f" Less {BASE}: mean difference ± {interval_note(self.arrays)}. Seeds draw the part of the pool on"
                " offer, and these parts overlap, so seeds are not quite independent; all share one target."
            )
        return make(
            figure, f"{HEADINGS[figure]} by number of labels", columns, [("", rows)], note,
            [Row("no label", None, None, dict.fromkeys(keys, before))], ("strategy", "seeds"),
        )  # fmt: skip


def paths(folder):
    """The result files of active_learning.py under the folder of a data set."""
    return sorted(folder.glob("*/active/*/[!.]*-seed*.json"))


def read(folder, backbone=None):
    """Read the results of active_learning.py in `folder` into Studies.

    Raises UserError where a file is damaged or does not belong where it lies.
    """
    by_folder = defaultdict(dict)
    for path in paths(folder):
        if backbone in (None, path.parents[2].name):
            values = _read_one(folder, path)
            by_folder[path.parent][values["seed"], values["strategy"]] = values

    def place(item):
        (seed, strategy), _ = item
        return ORDER.index(strategy) if strategy in ORDER else len(ORDER), strategy, seed

    studies = []
    for study_folder, results in by_folder.items():
        _must_agree(study_folder, results)
        studies.append(Study(study_folder.relative_to(folder), dict(sorted(results.items(), key=place)), folder))
    return studies


def _read_one(folder, path):
    """The values of a file; raises UserError where active_learning.py did not write it, or wrote it elsewhere."""
    try:
        values = read_json(path)
        must_hold(values, SHAPE)
        budgets = [point["budget"] for point in values["curve"]]
        if not budgets or budgets != values["settings"]["budgets"]:
            raise ValueError("no curve, or of other budgets")
        levels = values["before"]["by_entropy"]["count"]
        for judged in (values["before"], *values["curve"]):
            if set(map(len, judged["by_entropy"].values())) != {len(levels)} or sum(levels) != values["images"]:
                raise ValueError("too few or too many levels of entropy")
        alone = Study(path.parent.relative_to(folder), {(values["seed"], values["strategy"]): values}, folder)
        _ = alone.tables, alone.facts  # the test of what the shape leaves out
    except UNREADABLE:
        raise UserError(
            f"{path} is damaged or not a result of active_learning.py: delete it and run active_learning.py again."
        ) from None
    target, name = values["settings"]["target"], f"{values['strategy']}-seed{values['seed']}"
    in_place = (
        (folder.name, path.parents[2].name, path.stem) == (values["dataset"], values["backbone"], name)
        and f"{path.parent.name}+".startswith(f"{target}+")  # preset and tag follow the target
    )
    if not in_place:
        raise UserError(
            f"{path} holds {name} of {values['dataset']}, {values['backbone']}, target {target}, which does not belong"
            " there: move it to its own folder, or delete it."
        )
    return values


def _must_agree(folder, results):
    """Raise a UserError naming two files that were not made with the same settings on the same data."""
    (first, one), *others = results.items()
    for cell, other in others:
        changed = difference({name: one[name] for name in SHARED}, {name: other[name] for name in SHARED})
        if changed:
            names = [folder / f"{strategy}-seed{seed}.json" for seed, strategy in (first, cell)]
            raise UserError(
                f"{names[0]} and {names[1]} were made with another {', '.join(changed)} each: delete one, or move it to"
                " a folder of its own."
            )
