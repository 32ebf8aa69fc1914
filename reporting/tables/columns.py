"""Columns and rows that the tables of several tasks share."""

from reporting.runs import find, is_unified, seeds_of
from reporting.tables import Column, Row, Selector, cells_of
from reporting.words import GALLERY_AWARE, MINUS, TREND, followed

UNIFIED = "unified objective"  # heads the rows trained by it
DETERMINISTIC = ("entropy", "top", "margin")  # stand in for the uncertainty of a method that has none
TRENDS = (  # key, title, which is best, what it is
    ("s", TREND["s"], min, f"rank correlation of uncertainty level and R@1; {MINUS}1 is ideal"),
    ("r2", TREND["r2"], None, "of the linear fit of R@1 on uncertainty level; 1 is ideal, if S is negative"),
    ("minus_s_r2", TREND["minus_s_r2"], max, "both in one number; 1 is ideal"),
)
SELECTIVE = (
    ("auroc", "AUROC", max, "chance that a wrong answer is more uncertain than a right one; 0.5 is chance, 1 is ideal"),
    ("aupr", "AUPR", max, "area under precision and recall of right answers, ordered by certainty; 1 is ideal"),
    ("aurc", "AURC", min, "area under risk and coverage: the share of wrong answers, averaged over all coverages"),
    ("e_aurc", "E-AURC", min, "AURC less that of the ideal order of the same answers; 0 is ideal"),
)
AUROC, AURC = SELECTIVE[0][3], SELECTIVE[2][3]
ERRORS = {
    "nll": ("NLL", "negative log-likelihood of the right answer"),
    "ece_15": ("ECE", "expected calibration error, 15 bins of equal width"),
    "ece_20": ("ECE, 20 bins", "expected calibration error, 20 bins of equal width"),
    "adaptive_ece": ("adaptive ECE", "expected calibration error, 15 bins of equally many answers"),
    "brier": ("Brier", "squared error of the probabilities"),
}


def one_row(runs):
    """The rows of a variant, where it has one: list of (what follows the variant's name, Selector)."""
    return [("", Selector())]


def rows_of(block, columns, rows=one_row, cells=None):
    """The rows of a block by objective: list of (heading, Rows); no heading where all are trained by the same.

    rows: function from a variant's Results to its rows, each (what follows the variant's name, Selector). cells:
    function from Results and Selector to the cells of a row; by default those of `columns`.
    """
    if cells is None:

        def cells(runs, selector):
            return cells_of(columns, [run.values for run in runs], selector)

    groups = {}
    for variant, runs in block.results.items():
        seen = max(run.values["seen_in_training"] for run in runs)
        name = f"{variant} (trained on {seen:,} of the images)" if seen else variant
        for label, selector in rows(runs):
            row = Row(name + label, runs[0].path.parent.parent, seeds_of(runs), cells(runs, selector), variant)
            groups.setdefault(UNIFIED if is_unified(runs) else "", []).append(row)
    return list(groups.items()) if len(groups) > 1 else [("", rows) for rows in groups.values()]


def column(key, group, title, digits, *path, scale=1, **options):
    """A Column of what stands at `path` of a result, times `scale`."""

    def read(values, selector):
        value = find(values, *path)
        return None if value is None else scale * value

    return Column(key, group, title, digits, read, **options)


def percent(key, group, title, *path, **options):
    """A Column of what stands at `path`, in percent."""
    return column(key, group, title, 1, *path, scale=100, **options)


def bayes_optimal(cells):
    """The reference row of Bayes-optimal limits: list of one Row, empty where no limit is known."""
    return [Row("Bayes-optimal", None, None, cells)] if cells else []


def own_or_deterministic(runs):
    """One row for a method with an uncertainty; for another a row for each score-based stand-in."""
    if runs[0].values["text_to_image"]["levels_by"]:
        return one_row(runs)
    return [(named(Selector(name)), Selector(name)) for name in DETERMINISTIC]


def named(selector):
    """What follows a variant's name in the row of a score-based uncertainty."""
    return f", {GALLERY_AWARE[selector.uncertainty]}" if selector.uncertainty else ""


def levels_by(direction, values, selector):
    """Name the uncertainty that the levels follow."""
    name = selector.uncertainty or values[direction]["levels_by"]
    return name and followed(direction, name)


def record(direction, path, values, selector, name=None, scale=1):
    """What stands at `path` of an uncertainty's record: of `name`, else the selector's, else the one levels follow.

    None where all queries are equally uncertain.
    """
    value = find(values, direction, "uncertainty", name or selector.uncertainty or values[direction]["levels_by"])
    if value is None or value.get("constant"):
        return None
    for key in path:
        value = value[key] if isinstance(key, int) else value.get(key)
        if value is None:
            return None
    return scale * value


def constant(block, directions, names=None):
    """A sentence on rows without figures because all queries are equally uncertain; "" where there are none."""
    rows = []
    for variant, runs in block.results.items():
        for direction, title in directions.items():
            by = runs[0].values[direction]["levels_by"]
            for name in names or ([by] if by else DETERMINISTIC):
                records = [find(run.values, direction, "uncertainty", name) for run in runs]
                if any(each and each.get("constant") for each in records):
                    rows.append(f"{variant}{'' if by else named(Selector(name))} ({title})")
    return f" All queries are equally uncertain, so there are no figures: {', '.join(rows)}." if rows else ""
