"""Columns and rows that the tables of several tasks share."""

from reporting.runs import find, has_uncertainty, is_unified, seeds_of
from reporting.tables import Column, Row, Selector, cells_of
from reporting.words import DIRECTIONS, FREE, GALLERY_AWARE, MINUS, TREND, followed

UNIFIED = "unified objective"  # heads the rows trained by it
DETERMINISTIC = ("entropy", "probability", "top", "margin", *FREE)  # stand in where a method has no uncertainty
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
    ("augrc", "AUGRC", min, "share of queries that are answered and wrong, averaged over all coverages; 0 is ideal"),
    ("fpr95_right", "FPR95", min, "share of wrong answers let through where 95 % of the right ones are; 0 is ideal"),
    ("fpr95_wrong", "FPR95, errors positive", min, "share of right answers held back where 95 % of the wrong ones are"),
    ("log_score", "log score", min, "of the chance that the answer is right, as a falling function of the uncertainty"),
    ("brier_score", "Brier score", min, "of the same chance, fitted by isotonic regression on the other half"),
)
HIDDEN = ("aupr", "e_aurc", "fpr95_wrong", "brier_score")  # of SELECTIVE: in the CSV alone
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
        if any(run.values.get("untrained" if has_uncertainty(run) else "start_kept") for run in runs):
            name += " (untrained start)"
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


def bounds(key, group, title, digits, *path, scale=1, **options):
    """A Column of the 95 % interval at `path`, (low, high); over several seeds, means of both bounds."""

    def read(values, selector):
        interval = find(values, *path)
        return None if interval is None else tuple(scale * bound for bound in interval)

    return Column(key, group, title, digits, read, None, **options)


def bayes_optimal(cells):
    """The reference row of Bayes-optimal limits: list of one Row, empty where no limit is known."""
    return [Row("Bayes-optimal", None, None, cells)] if cells else []


def own_or_deterministic(runs):
    """One row for a method with an uncertainty; for another a row for each stand-in that costs nothing."""
    return one_row(runs) if _has_own(runs) else [_stand_in(name) for name in DETERMINISTIC if _is_known(runs, name)]


def with_stand_ins(rows):
    """A function from a variant's Results to `rows` of them, and for one without an uncertainty those of stand-ins."""

    def every(runs):
        return [*rows(runs), *(row for row in own_or_deterministic(runs) if row[0])]

    return every


def plain(column):
    """The column without cells in the rows of stand-ins."""

    def read(values, selector):
        return None if selector.uncertainty else column.read(values, selector)

    return column._replace(read=read)


def own_or_free(runs):
    """One row, and for a method without an uncertainty one more for each that is known before the search."""
    free = [] if _has_own(runs) else [_stand_in(name) for name in FREE if _is_known(runs, name)]
    return one_row(runs) + free


def _has_own(runs):
    return any(runs[0].values[name]["levels_by"] for name in DIRECTIONS if name in runs[0].values)


def _stand_in(name):
    return named(Selector(name)), Selector(name)


def _is_known(runs, name):
    """Whether the results hold an uncertainty in any direction; those of an earlier eval.py lack FREE."""
    sides = [runs[0].values[direction] for direction in DIRECTIONS if direction in runs[0].values]
    return any(name in side["uncertainty"] for side in sides)


def named(selector):
    """What follows a variant's name in the row of an uncertainty that costs nothing."""
    return f", {(GALLERY_AWARE | FREE)[selector.uncertainty]}" if selector.uncertainty else ""


def levels_by(direction, values, selector):
    """Name the uncertainty that the levels follow."""
    name = selector.uncertainty or values[direction]["levels_by"]
    return name and followed(direction, name)


def record(direction, path, values, selector, name=None, scale=1):
    """What stands at `path` of an uncertainty's record: of `name`, else the selector's, else the one levels follow.

    None where all queries are equally uncertain.
    """
    name = name or selector.uncertainty or values[direction]["levels_by"]
    value = find(values, direction, "uncertainty", name)
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
