"""Tables of decisions: whether a pair matches, and from which score on; conformal sets; whether there is an answer."""

from functools import partial

from reporting.runs import find
from reporting.tables import Column, Selector, make
from reporting.tables.columns import rows_of
from reporting.words import DIRECTIONS, FREE, GALLERY_AWARE

KINDS = {"score": "threshold", "lac": "LAC", "aps": "APS", "raps": "RAPS"}
REJECTING = GALLERY_AWARE | FREE | {
    "energy": "energy", "learned": "learned", "right": "learned, right", "retrieved": "retrieved", "query": "query",
}  # fmt: skip


def _split(selector):
    """A row's own name is of two parts, as it stands in `Selector.probabilities`."""
    return selector.probabilities.split("/")


def matching(block):
    """How well the probability of a match is calibrated, over all pairs and over best answers, and ranks pairs."""
    columns = []
    for direction in block.directions:
        title = DIRECTIONS[direction]

        def read(values, selector, direction=direction, path=(), scale=1):
            return _scaled(find(values, direction, "matching", *_split(selector), *path), scale)

        figures = (
            ("ece", "ECE", 4, min, ("ece",), "over all pairs at the stated prior, most of which match with nearly 0"),
            ("nll", "NLL", 4, min, ("nll",), "in nats, at the stated prior"),
            ("brier", "Brier", 4, min, ("brier",), "squared error, at the stated prior"),
            ("auroc", "AUROC", 3, max, ("auroc",), "of matches against wrong pairs"),
            ("aupr", "AUPR", 3, max, ("aupr",), "at the stated prior"),
            ("best_ece", "ECE of the best", 3, min, ("best_answer", "ece"), "over each query's best answer alone"),
            ("right", "right, %", 1, None, ("best_answer", "right"), "best answers that match"),
        )
        for key, head, digits, best, path, note in figures:
            reader = partial(read, path=path, scale=100 if key == "right" else 1)
            columns.append(Column(f"{direction}_{key}", title, head, digits, reader, best, note=note))

    def rows(runs):
        parts = runs[0].values[block.directions[0]]["matching"]
        kinds = ("platt", "isotonic", "model", "answer")
        return [(f", {basis} by {kind}", Selector(probabilities=f"{basis}/{kind}"))
                for basis in parts for kind in kinds if kind in parts[basis]]  # fmt: skip

    first = block.first[block.directions[0]]
    note = (
        f"A pair matches with a prior of {first['prior']:.3g}. Each probability was learned from other images. By the"
        " score of the pair alone, or by its posterior over the gallery, which knows the rivals. By answer:"
        " that of best answers alone, whose likelihood on the images that teach chose the fit."
    )
    return make("matching", "Probability of a match", columns, rows_of(block, columns, rows), note)


def _scaled(value, scale):
    return None if value is None else scale * value


def thresholds(block):
    """From which score on so many of the pairs match, and what is found then."""
    columns = []
    for direction in block.directions:

        def read(values, selector, direction=direction, path=(), scale=1):
            basis, number = _split(selector)
            rows = find(values, direction, "matching", basis, "thresholds")
            return None if rows is None else _scaled(find(rows[int(number)], *path), scale)

        shown = direction == block.directions[0]
        figures = (
            ("threshold", "threshold", 3, ("threshold",), 1, "on the score, or on the log odds of the posterior"),
            ("precision", "precision, %", 1, ("measured", "precision"), 100, "as measured on other images"),
            ("recall", "recall, %", 1, ("measured", "recall"), 100, "share of matches beyond the threshold"),
            ("answered", "answered, %", 1, ("measured", "answered"), 100, "queries with a pair beyond the threshold"),
        )  # fmt: skip
        for key, head, digits, path, scale, note in figures:
            reader = partial(read, path=path, scale=scale)
            columns.append(
                Column(f"{direction}_{key}", DIRECTIONS[direction], head, digits, reader, None, note=note, shown=shown)
            )

    def rows(runs):
        parts = runs[0].values[block.directions[0]]["matching"]
        return [
            (f", {basis}, {100 * row['precision']:.0f} %", Selector(probabilities=f"{basis}/{number}"))
            for basis in parts
            for number, row in enumerate(parts[basis]["thresholds"])
        ]

    note = "The lowest threshold from which on the named share of the pairs that teach match; eval.py writes it as CSV."
    return make("thresholds", "Thresholds", columns, rows_of(block, columns, rows), note)


def conformal(block):
    """Coverage and sizes of conformal sets, and whether each level of uncertainty is covered."""
    columns = []
    for direction in block.directions:
        title, shown = DIRECTIONS[direction], direction == block.directions[0]
        for alpha in block.first["alphas"]:

            def read(values, selector, direction=direction, alpha=alpha, path=(), scale=1):
                return _scaled(find(values, direction, "conformal", selector.probabilities, alpha, *path), scale)

            level = partial(_levels_covered, direction, alpha)
            group = f"{title}, {100 * (1 - float(alpha)):g} %"
            figures = (
                ("coverage", "coverage, %", 1, partial(read, path=("coverage",), scale=100), None,
                 "sets that hold a right answer"),
                ("size", "median size", 0, partial(read, path=("median_size",)), min, ""),
                ("mean_size", "mean size", 1, partial(read, path=("mean_size",)), min, ""),
                ("within", "levels, one threshold", 0, partial(level, "within"), None,
                 "lowest coverage of a level of uncertainty, in %, with one threshold for all"),
                ("levels", "a threshold each", 0, partial(level, "levels"), None,
                 "the same with a threshold for each level (Mondrian)"),
                ("levels_size", "sizes by level", 0, partial(_sizes, direction, alpha), None,
                 "median sizes by level then"),
            )  # fmt: skip
            for key, head, digits, reader, best, note in figures:
                name = f"{direction}_{alpha}_{key}"
                columns.append(Column(name, group, head, digits, reader, best, note=note, shown=shown))
            for which in ("interval", "expected"):
                name = f"{direction}_{alpha}_{which}"
                columns.append(_bounds(name, group, which, direction, alpha))

    def rows(runs):
        kinds = runs[0].values[block.directions[0]]["conformal"]
        return [(f", {KINDS[kind]}", Selector(probabilities=kind)) for kind in kinds]

    taught = block.first[block.directions[0]]["taught_by"]
    note = (
        f"Thresholds are set by {taught['images']:,} other images (or scenes). A set holds every item that conforms at"
        " least as well as they ask: by the score (threshold), the posterior (LAC), or its sum (APS, RAPS)."
    )
    return make("conformal", "Conformal sets", columns, rows_of(block, columns, rows), note)


def _bounds(name, group, which, direction, alpha):
    def read(values, selector):
        ends = find(values, direction, "conformal", selector.probabilities, alpha, which)
        return None if ends is None else tuple(100 * end for end in ends)

    return Column(name, group, f"coverage, {which}", 1, read, None, shown=False)


def _levels_covered(direction, alpha, which, values, selector):
    levels = find(values, direction, "conformal", selector.probabilities, alpha, which) or []
    known = [level["coverage"] for level in levels if level["coverage"] is not None]
    return 100 * min(known) if known else None


def _sizes(direction, alpha, values, selector):
    levels = find(values, direction, "conformal", selector.probabilities, alpha, "levels") or []
    known = [level for level in levels if level["coverage"] is not None]
    return " ".join(f"{level['median_size']:,}" for level in known) if known else None


def unanswerable(block):
    """How well each uncertainty tells that nothing in the gallery fits, and both rejections together."""
    columns = []
    for direction in block.directions:
        title = DIRECTIONS[direction]
        figures = (
            ("auroc", "AUROC", max, "that a query without an answer is more uncertain than one with"),
            ("fpr95", "FPR95", min, "queries without an answer that pass where 95 % of those with one do"),
            ("aurc", "AURC of both", min, "wrong answers over coverage, if half of the queries have no answer"),
        )  # fmt: skip
        for key, head, best, note in figures:
            read = partial(_rejection, direction, ("rejection",), key)
            columns.append(Column(f"{direction}_{key}", title, head, 3, read, best, note=note))
        read = partial(_rejection, direction, ("rejection",), "interval")
        columns.append(Column(f"{direction}_interval", title, "AUROC, interval", 3, read, None, shown=False))
        if find(block.first, direction, "absent"):
            for key, head, best in (("auroc", "AUROC", max), ("fpr95", "FPR95", min)):
                read = partial(_rejection, direction, ("absent", "rejection"), key)
                name, group = f"{direction}_absent_{key}", "captions of what no image shows"
                columns.append(Column(name, group, head, 3, read, best))

    def rows(runs):
        side = runs[0].values[block.directions[0]]
        names = dict.fromkeys([*side["rejection"], *(find(side, "absent", "rejection") or ())])
        return [(f", {REJECTING[name]}", Selector(probabilities=name)) for name in names]

    note = (
        "Each query is asked twice: in the whole gallery, and in the one without the items that fit it. Learned: a"
        " logistic regression of five uncertainties of the scores on other images; right: times that of a right answer."
    )
    return make("unanswerable", "Is there an answer?", columns, rows_of(block, columns, rows), note)


def correctness(block):
    """How well predictors of a right answer do, by the labels that they have seen; candidates seen, and others."""
    columns = []
    figures = (
        ("auroc", "AUROC", 3, max, ("auroc",), "that a right answer is more surely right than a wrong one"),
        ("interval", "interval", 3, None, ("interval",), "95 % of the bootstrap over images"),
        ("less", "less probability", 3, None, ("less", "probability"), "AUROC less the probability's, interval"),
        ("less_linear", "less linear", 3, None, ("less", "linear"), "the same of the linear model of ViLU's inputs"),
        ("less_probe", "less probe", 3, None, ("less", "probe"), "the same of the linear probe of the classes"),
        ("fpr95", "FPR95", 3, min, ("fpr95",), "wrong answers that pass where 95 % of the right ones do"),
        ("aurc", "AURC", 3, min, ("aurc",), "area under risk and coverage"),
        ("nll", "log score", 3, min, ("nll",), "of the stated probability that the answer is right"),
        ("ece", "ECE", 3, min, ("ece",), "of the same"),
    )  # fmt: skip
    for direction, setting, title in correctness_settings(block):
        for key, head, digits, best, path, note in figures:
            read = partial(_correctness, direction, setting, path)
            # Of the second setting, what it is for; the rest is in the CSV.
            shown = not setting or key in ("auroc", "interval", "less", "ece")
            name = "_".join((direction, *setting, key))
            columns.append(Column(name, title, head, digits, read, best, note=note, shown=shown))

    def labels(values, selector):
        return find(values, block.directions[0], "correctness", selector.probabilities, "labels")

    columns.insert(
        0, Column("labels", "", "labels", 0, labels, None, note="what it has seen of the queries that teach")
    )

    def rows(runs):
        names = runs[0].values[block.directions[0]]["correctness"]
        return [(f", {name}", Selector(probabilities=name)) for name in names]

    side = block.first[block.directions[0]]
    note = f"{side['taught_by']['images']:,} labeled images (or scenes) teach."
    if "probe_accuracy" in side:
        note += (
            f" CLIP answers {100 * side['accuracy']:.1f} % right, the linear probe of the same labels"
            f" {100 * side['probe_accuracy']:.1f} %: where it is far above, answer with it."
        )
    note += " Held out: no predictor has seen these candidates, classes or items of the gallery, when it was taught."
    return make("correctness", "Is the answer right?", columns, rows_of(block, columns, rows), note)


def correctness_settings(block):
    """Directions and settings of a block's correctness: (direction, path of keys, title) each."""
    settings = []
    for direction in block.directions:
        side = block.first[direction]
        suffix = ", held out" if side.get("candidates") == "held out" else ""
        settings.append((direction, (), DIRECTIONS[direction] + suffix))
        if "held_out" in side:
            settings.append((direction, ("held_out",), f"{DIRECTIONS[direction]}, held out"))
    return settings


def _correctness(direction, setting, path, values, selector):
    value = find(values, direction, *setting, "correctness", selector.probabilities, *path)
    if isinstance(value, dict):
        return (value["low"], value["high"])
    return tuple(value) if isinstance(value, list) else value


def _rejection(direction, path, key, values, selector):
    value = find(values, direction, *path, selector.probabilities, key)
    return tuple(value) if isinstance(value, list) else value
