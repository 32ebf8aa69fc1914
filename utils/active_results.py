"""Result files of active_learning.py: read, checked, and put together as they may stand in one table."""

from collections import defaultdict
from functools import cached_property

from utils import tables
from utils.config import difference
from utils.curves import BASE, DIGITS, INTERVAL, ORDER, SCALE, TITLES, curves, gaps
from utils.errors import UserError
from utils.files import read_json
from utils.results import NUMBER, must_hold
from utils.tables import MINUS, Cell, Column, Row

JUDGED = dict.fromkeys(TITLES, NUMBER) | {
    "entropy_auroc": (*NUMBER, type(None)),
    "by_entropy": {"count": [int], "entropy": [NUMBER], "error": [NUMBER]},
}
SETTINGS = {
    "pool": [str], "target": str, "val": (str, type(None)), "val_counts": (*NUMBER, type(None)), "budgets": [int],
    "preset": str, "factors": str,
}  # fmt: skip
ABOUT = {"dataset": str, "backbone": str, "settings": SETTINGS, "fingerprint": dict}  # what all of a folder agree in
HOLDS = ABOUT | {
    "seed": int, "strategy": str, "classes": int, "images": int, "offered": int, "before": JUDGED,
    "curve": [JUDGED | {"budget": int, "labels": int, "val_labels": int, "epoch": int}],
}  # fmt: skip
HEADINGS = {"accuracy": "Accuracy", "nll": "NLL", "ece": "ECE"}
BEST = {"accuracy": max, "nll": min, "ece": min}
AGAIN = "delete it and run active_learning.py again"


class Study:
    """The results of one folder of active_learning.py: on one target, with the same settings.

    results: dict of (seed, strategy) to what a file holds, in the order in which strategies and seeds shall stand.
    folder: where they lie, relative to that of the report.
    """

    task = "active"

    def __init__(self, folder, results):
        self.folder, self.results = folder, results
        self.any = next(iter(results.values()))  # of what all results agree in
        self.evaluated_on, self.backbone = folder.name, self.any["backbone"]
        self.title = f"{self.any['dataset']}, {self.backbone}: active learning, target {folder.name}"

    @cached_property
    def seeds(self):
        """The seeds of each strategy: dict of its name to list."""
        return {name: [seed for seed, other in self.results if other == name] for _, name in self.results}

    @property
    def budgets(self):
        """The numbers of labels that were paid for."""
        return [point["budget"] for point in self.any["curve"]]

    @property
    def summary(self):
        """Say what the numbers are means over."""
        return tables.over([len(seeds) for seeds in self.seeds.values()], "seed")

    @property
    def facts(self):
        """What a reader has to know: dict of a short name to text."""
        one, settings = self.any, self.any["settings"]
        validation = "none: training ends with its last epoch"
        if settings["val_counts"] is not None:
            validation = f"{100 * settings['val_counts']:g} % of every budget, of {settings['val']}"
        elif settings["val"]:
            validation = f"{one['curve'][0]['val_labels']:,} of {settings['val']}, free"
        return {
            "target": f"{settings['target']}: {one['images']:,} images of {one['classes']:,} classes",
            "pool of each seed": f"{one['offered']:,} images of {' and '.join(settings['pool'])}",
            "labels that pick the epoch": validation,
            "posterior": f"factors of {settings['factors']}",
            "preset": settings["preset"],
            "other settings": ", ".join(
                f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name not in SETTINGS
            ),
            "numbers": self.summary,
        }

    @property
    def files(self):
        """The result files: dict of a strategy to list of (what a link says, path)."""
        return {
            name: [(f"seed {seed}", self.folder / f"{name}-seed{seed}.json") for seed in seeds]
            for name, seeds in self.seeds.items()
        }

    @cached_property
    def tables(self):
        """Its tables.Tables, one per figure."""
        return [self._table(figure) for figure in TITLES]

    def _table(self, figure):
        """One figure by budget and in the mean over budgets, and what it differs by from that of random choice."""
        digits, found = DIGITS[figure], curves(self.results, figure)
        compared = gaps(found)
        heads = [*(f"{budget:,}" for budget in self.budgets), "mean"]
        keys = [f"{figure}_{name}" for name in (*self.budgets, "mean")]
        # Means over other seeds are of other draws, and the fewer the luckier.
        best = BEST[figure] if len(set(map(len, found.values()))) == 1 else None
        columns = [Column(key, TITLES[figure], head, digits, None, best) for key, head in zip(keys, heads, strict=True)]
        less = f"less {BASE}, 95 % interval"
        for key, head in zip(keys, heads, strict=True):
            columns.append(Column(f"{key}_gap", less, head, digits, None, None))
            ends = (f"{key}_gap_{end}" for end in ("low", "high", "adjusted_p"))
            columns += [Column(end, less, head, digits, None, None, shown=False) for end in ends]
        rows = []
        for name, by_seed in found.items():
            values = zip(*by_seed.values(), strict=True)
            cells = {key: Cell(*tables.mean_sd(column)) for key, column in zip(keys, values, strict=True)}
            for key, gap in zip(keys, compared.get(name, ()), strict=False):
                text = gap.text(digits).replace("-", MINUS)
                cells[f"{key}_gap"] = Cell(gap.difference.mean, text=text)
                ends = {"low": gap.difference.low, "high": gap.difference.high, "adjusted_p": gap.adjusted}
                cells |= {f"{key}_gap_{end}": Cell(value) for end, value in ends.items()}
            rows.append(Row(name, self.folder, len(by_seed), cells, name))
        before = Cell(SCALE[figure] * self.any["before"][figure])
        epochs = [point["epoch"] for result in self.results.values() for point in result["curve"]]
        note = "Columns: labels paid for; mean: over those budgets."
        if 0 in epochs:
            kept = sum(epoch == 0 for epoch in epochs)
            note += (
                f" {kept} of {len(epochs)} trainings kept their start, which no epoch improved on validation images."
            )
        if compared:
            note += (
                f" Less {BASE}: mean difference ± {INTERVAL}. Seeds draw what the pool offers; the target is the same"
                " for all, so that intervals say nothing of another."
            )
        return tables.make(
            figure, f"{HEADINGS[figure]} by number of labels", columns, [("", rows)], note,
            [Row("no label", None, None, dict.fromkeys(keys, before))], ("strategy", "seeds"),
        )  # fmt: skip


def paths(folder):
    """The result files of active_learning.py under the folder of a data set."""
    return sorted(folder.glob("*/active/*/*-seed*.json"))


def read(folder, backbone=None):
    """Read what active_learning.py left in `folder` into Studies; raises UserError where one is damaged or astray."""
    found = defaultdict(dict)
    for path in paths(folder):
        if backbone in (None, path.parents[2].name):
            values = _read_one(folder, path)
            found[path.parent][values["seed"], values["strategy"]] = values
    for place, results in found.items():
        _must_agree(place, results)
    order = {name: number for number, name in enumerate(ORDER)}
    return [
        Study(
            place.relative_to(folder),
            dict(sorted(results.items(), key=lambda item: (order.get(item[0][1], len(order)), item[0][1], item[0][0]))),
        )
        for place, results in found.items()
    ]


def _read_one(folder, path):
    """What a file holds; raises UserError where active_learning.py has not written it, or elsewhere."""
    try:
        values = read_json(path)
        must_hold(values, HOLDS)
        budgets = [point["budget"] for point in values["curve"]]
        if not budgets or budgets != values["settings"]["budgets"]:
            raise ValueError("no curve, or of other budgets")
        levels = values["before"]["by_entropy"]["count"]
        for judged in (values["before"], *values["curve"]):
            if set(map(len, judged["by_entropy"].values())) != {len(levels)} or sum(levels) != values["images"]:
                raise ValueError("too few or too many levels of entropy")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged or not a result of active_learning.py: {AGAIN}.") from None
    target = path.parent.name
    own = (
        values["dataset"],
        values["backbone"],
        values["settings"]["target"],
        f"{values['strategy']}-seed{values['seed']}",
    )
    there = folder.name, path.parents[2].name, own[2] if f"{target}+".startswith(f"{own[2]}+") else target, path.stem
    if own != there:
        said = f"{own[3]} of {own[0]}, {own[1]}, target {own[2]}"
        raise UserError(f"{path} holds {said}, and so does not belong there: move it to where it does, or delete it.")
    return values


def _must_agree(folder, results):
    """Raise a UserError naming two files that were not made with the same settings on the same data."""
    (first, one), *others = results.items()
    for cell, other in others:
        changed = difference({name: one[name] for name in ABOUT}, {name: other[name] for name in ABOUT})
        if changed:
            names = [folder / f"{strategy}-seed{seed}.json" for seed, strategy in (first, cell)]
            raise UserError(
                f"{names[0]} and {names[1]} were made with another {', '.join(changed)} each: delete one, or move it to"
                " a folder of its own."
            )
