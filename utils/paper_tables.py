"""The tables of a report, in the form in which papers print them: which figures of a result stand where.

Every table is a function of a results.Block, and gives None where the block has nothing for it.
"""

import statistics
from functools import lru_cache, partial

from metrics import comparison
from utils import published, tables
from utils.tables import MINUS, Cell, Column, Row
from utils.terminal import BELIEFS, GALLERY_AWARE, SCORES, followed

UNIFIED = "unified objective"  # heads the rows trained by it
SIDES = {"text_to_image": "text→image", "image_to_text": "image→text"}
CLASSES = {"image_to_class": "image→class"}
DETERMINISTIC = ("entropy", "top", "margin")  # what stands in for the uncertainty of a method that has none
TREND = (
    ("s", "S", min, f"rank correlation of uncertainty level and R@1; {MINUS}1 is ideal"),
    ("r2", "R²", None, "of the linear fit of R@1 on uncertainty level; 1 is ideal, if S is negative"),
    ("minus_s_r2", f"{MINUS}S·R²", max, "both in one number; 1 is ideal"),
)
SELECTIVE = (
    ("auroc", "AUROC", max, "chance that a wrong answer is more uncertain than a right one; 0.5 is chance, 1 is ideal"),
    ("aupr", "AUPR", max, "area under precision and recall, by certainty, of right answers; 1 is ideal"),
    (
        "aurc",
        "AURC",
        min,
        "area under risk and coverage: the share of wrong answers among the surest, averaged over how many that are",
    ),
    ("e_aurc", "E-AURC", min, "AURC less that of the ideal order of the same answers; 0 is ideal"),
)
COVERAGES = ("80", "90", "95")
TRUTH = {"spearman": "Spearman", "kendall": "Kendall"}
ERRORS = {
    "nll": ("NLL", "negative log-likelihood of the right answer"),
    "ece_15": ("ECE", "expected calibration error, 15 bins of equal width"),
    "ece_20": ("ECE, 20 bins", "expected calibration error, 20 bins of equal width"),
    "adaptive_ece": ("adaptive ECE", "expected calibration error, 15 bins of equally many answers"),
    "brier": ("Brier", "squared error of the probabilities"),
}
REAL = "†"  # marks an interval that leaves 0 out
ACROSS = (  # figures of classification on several data sets: key, title, digits, scale, which is best, what it is
    ("accuracy", "Accuracy (ACC), %", 1, 100, max, ""),
    ("nll", "NLPD", 3, 1, min, ERRORS["nll"][1]),
    ("ece_15", "ECE", 3, 1, min, ERRORS["ece_15"][1]),
    ("auroc", "AUROC of failure by entropy", 3, 1, max, SELECTIVE[0][3]),
    ("query", "AUROC of failure by the query's own uncertainty", 3, 1, max, SELECTIVE[0][3]),
    ("aurc", "AURC by entropy", 3, 1, min, SELECTIVE[2][3]),
)
HIERARCHY = (
    ("falling_steps", "steps, %", 100, 1, max, "steps from general to specific at which uncertainty falls"),
    ("falling_chains", "chains, %", 100, 1, max, "chains along which uncertainty falls at every step"),
    ("spearman_depth", "Spearman of depth", 1, 3, min, f"with uncertainty, of all prompts; tied, so above {MINUS}1"),
    ("spearman_depth_within_chains", "within chains", 1, 3, min, f"the same in each chain; {MINUS}1 is ideal"),
)  # fmt: skip
ECCV = (  # averaged over both directions, as papers have them
    ("eccv_map_at_r", "ECCV mAP@R"),
    ("eccv_rprecision", "ECCV R-P"),
    ("eccv_r1", "ECCV R@1"),
    ("cxc_r1", "CxC R@1"),
    ("coco_5k_r1", "5K R@1"),
    ("coco_5k_rsum", "5K RSUM"),
    ("coco_1k_r1", "1K R@1"),
    ("coco_1k_rsum", "1K RSUM"),
)


def every(block):
    """All tables that a block has figures for, in the order in which they are read."""
    return [table for table in (make(block) for make in TABLES[block.task]) if table]


def recall(block):
    """R@K both ways with what they add up to, as papers on retrieval have it."""
    columns, by_score, limits = [], [], {}
    for side, title in SIDES.items():
        group, shown = f"{title}, %", side == "text_to_image"
        columns += [_percent(f"{side}_r{k}", group, f"R@{k}", side, "recall", str(k)) for k in (1, 5, 10)]
        read, note = partial(_share_of_limit, side), "R@1 in percent of the Bayes-optimal R@1"
        columns.append(Column(f"{side}_share_of_limit", group, "of limit", 1, read, max, note=note, shown=shown))
        key = f"{side}_median_rank"
        columns.append(_column(key, group, "median rank", 1, side, "median_rank", best=min, shown=False))
        both = []
        for score, name in SCORES.items():
            key, read = f"{side}_r1_by_{name}", partial(_recall_by, score, side)
            both.append(Column(key, f"R@1, {group}", f"by {name}", 1, read, shown=shown))
        by_score += both
        limit = find(block.any, side, "bayes_recall")
        if limit is not None:
            limits |= {key: Cell(100 * limit) for key in (f"{side}_r1", *(column.key for column in both))}
    columns += [_column("rsum", "", "RSUM", 1, "rsum", note="sum of the six recalls"), *by_score]
    columns += published.columns(block, "recall", columns)
    note = ""
    if limits:
        note = (
            "A caption can be true of many images, yet only its own counts: Bayes-optimal is the best R@1 that any"
            " method can reach on average."
        )
    return tables.make("recall", "Recall", columns, rows_of(block, columns), note, _reference(limits))


def uncertainty(block):
    """How R@1 falls over levels of uncertainty, in the form of ProbVLM (arXiv 2307.00398), table 1."""
    columns = []
    for side in ("image_to_text", "text_to_image"):  # as there
        group = SIDES[side]
        columns.append(Column(f"{side}_levels_by", group, "levels by", 0, partial(_levels_by, side), None))
        family = f"{side}_family"
        columns.append(Column(family, group, "family", 0, partial(_family, side), None, shown=False))
        for key, title, best, note in TREND:
            read = partial(_record, side, (key,))
            columns.append(Column(f"{side}_{key}", group, title, 3, read, best, family, note))
        spread = partial(_record, side, ("spread",), scale=100)
        columns.append(Column(f"{side}_spread", group, "spread, %", 1, spread, shown=False))
        for key in ("s", "r2", "minus_s_r2", "auroc"):
            for i, end in enumerate(("low", "high")):  # of the bootstrap over queries, averaged over seeds
                read = partial(_record, side, ("interval", key, i))
                columns.append(Column(f"{side}_{key}_{end}", group, f"{key}, {end}", 3, read, None, shown=False))
    columns += published.columns(block, "uncertainty", columns, _named)
    best = block.any.get("bayes_optimal") or {}
    limits = {f"text_to_image_{key}": Cell(best[key]) for key, *_ in TREND if best.get(key) is not None}
    note = (
        f"Over {block.any['uncer_levels']} levels of uncertainty, {_sizes(block)}. A query's own uncertainty is known"
    )
    note += " before the search (query-only), the others after it (gallery-aware): the best of either kind is in bold."
    if limits:
        note += (
            " Bayes-optimal: levels by true ambiguity, over which R@1 falls in a curve, so that an imperfect order can"
            f" have a higher R² and {MINUS}S·R²."
        )
    note += _constant(block, SIDES)
    rows = rows_of(block, columns, _own_or_deterministic)
    return tables.make("uncertainty", "R@1 and uncertainty", columns, rows, note, _reference(limits))


def levels(block):
    """R@1 by uncertainty level, as the public AsymVLM code prints it."""
    columns = []
    for side, title in SIDES.items():
        read = partial(_level_by, side)
        columns.append(Column(f"{side}_levels_by", f"{title}, R@1 in % by level", "levels by", 0, read, None))
        for level in range(block.any["uncer_levels"]):
            key, group = f"{side}_level_{level + 1}", f"{title}, R@1 in % by level"
            columns.append(Column(key, group, str(level + 1), 1, partial(_level, side, level), None))

    def parts(runs):
        for label, name in _own_or_deterministic(runs):
            yield label, (name, "recall")
            if any("bayes_recall" in runs[0].values[side] for side in SIDES):
                yield f"{label}, limit", (name, "bayes_recall")

    best = enumerate(find(block.any, "bayes_optimal", "levels") or (), 1)
    limits = {f"text_to_image_level_{level}": Cell(100 * value) for level, value in best}
    note = f"Level 1 is the least uncertain; {_sizes(block)}."
    if limits:
        note += " Limit: Bayes-optimal R@1 of the same queries. Bayes-optimal: of levels by true ambiguity."
    note += _constant(block, SIDES)
    rows = rows_of(block, columns, parts)
    return tables.make("levels", "R@1 by uncertainty level", columns, rows, note, _reference(limits))


def selective(block):
    """What uncertainty tells of single answers: the query's own, and what needs scores over the gallery."""
    sides, right = (CLASSES, "ACC") if block.task == "classification" else (SIDES, "R@1")
    first, columns = next(iter(sides)), []
    for side in sides:
        for name in ("query", *DETERMINISTIC, "probability", "retrieved", "sum"):
            group = "query-only" if name == "query" else f"gallery-aware: {followed(side, name)}"
            full = side == first and name in ("query", "entropy")
            for key, title, best, note in SELECTIVE:
                read, full_key = partial(_record, side, (key,), name=name), f"{side}_{name}_{key}"
                if side == first and key == "auroc" and name in GALLERY_AWARE and not full:
                    heads = "gallery-aware: AUROC", GALLERY_AWARE[name]
                    columns.append(Column(full_key, *heads, 3, read, best, note=f"AUROC of the {heads[1]}"))
                else:
                    columns.append(Column(full_key, group, title, 3, read, best, note=note, shown=full))
            for coverage in COVERAGES:
                read = partial(_record, side, ("selective_recall", coverage), name=name, scale=100)
                key, note = (
                    f"{side}_{name}_of_surest_{coverage}",
                    f"{right} in % if only the surest {coverage} % are answered",
                )
                columns.append(Column(key, group, f"{right} of {coverage} %", 1, read, max, note=note, shown=full))
    note = "Query-only uncertainty is known before any search; gallery-aware needs the scores over the gallery."
    note += _constant(block, sides, ("query",))
    return tables.make("selective", f"Selective answers, {sides[first]}", columns, rows_of(block, columns), note)


def truth(block):
    """How near a method comes to what is true, where the ambiguity of captions is known."""
    first, group = "text_to_image", "ambiguity of captions"
    columns = []
    for name in ("query", *GALLERY_AWARE, "retrieved", "sum"):
        for key, title in TRUTH.items():
            read, own = partial(_record, first, (key,), name=name), name == "query"
            note = "rank correlation of uncertainty and true ambiguity; 1 is ideal"
            columns.append(Column(f"{name}_{key}", group if own else name, title, 3, read, max, note=note, shown=own))
    for side, title in SIDES.items():
        note = "Bayes-optimal R@1 less that of the method"
        columns.append(_percent(f"{side}_regret", f"{title}, %", "regret", side, "regret", best=min, note=note))
        for key, heading, note in (
            ("map_at_r", "mAP@R", "mean average precision among the R best answers, R of which are true in all"),
            ("r_precision", "R-P", "R-precision: the share of true ones among the R best answers"),
        ):
            columns.append(_percent(f"{side}_{key}", f"{title}, %", heading, side, key, note=note))
    if not any(column.read(block.any, None) is not None for column in columns):
        return None
    return tables.make("truth", "Against the truth", columns, rows_of(block, columns))


def eccv(block):
    """COCO, CxC and ECCV Caption in the form of PCME++ (arXiv 2305.18171), table 1."""
    columns = [Column(key, "", title, 1, partial(_coco, key)) for key, title in ECCV]
    columns += published.columns(block, "eccv", columns)
    note = "In %, both directions averaged; RSUM is the sum of six recalls. 5K and 1K are those of COCO."
    return tables.make("eccv", "COCO, CxC and ECCV Caption", columns, rows_of(block, columns), note)


def calibration(block):
    """How far the posterior over the gallery can be believed, before and after temperature scaling."""
    columns = []
    for side in SIDES:
        for when, said in (("model", "as it is"), ("temperature", "temperature-scaled")):
            for key in ("ece_15", "ece_20", "adaptive_ece", "nll", "brier"):
                more = {"best": min, "note": ERRORS[key][1], "shown": side == "text_to_image"}
                column = f"{side}_{key}" + "_scaled" * (when == "temperature")
                path = side, "calibration", when, key
                columns.append(_column(column, said, ERRORS[key][0], 3, *path, **more))
    note = "Of the posterior over the gallery; the temperature of each half of the queries is fitted on the other."
    return tables.make("calibration", "Calibration, text→image", columns, rows_of(block, columns), note)


def classification(block):
    """Accuracy and calibration in the form of BayesVLM (arXiv 2412.06014)."""
    columns = [
        Column("acc", "", "ACC, %", 1, partial(_accuracy, "1")),
        *([Column("top5", "", "top-5, %", 1, partial(_accuracy, "5"))] if block.any["classes"] > 5 else []),
    ]
    for key, (title, note) in ERRORS.items():
        title = {"NLL": "NLPD"}.get(title, title)
        columns.append(Column(key, "", title, 3, partial(_error, key), min, note=note))
    of_people = "rank correlation of uncertainty and the entropy of people's labels; 1 is ideal"
    for key, group, head, note in (
        ("auroc", "failure", "AUROC", SELECTIVE[0][3]),
        ("spearman", "human labels", "Spearman", of_people),
    ):
        for name, title in (("query", "query-only"), ("entropy", "entropy")):
            read = _by_entropy if (name, key) == ("entropy", "auroc") else partial(_unscaled, key, name)
            columns.append(Column(f"{name}_{key}", group, f"{head}, {title}", 3, read, max, note=note))

    note = _of_temperatures(block) + _constant(block, CLASSES, ("query",))
    return tables.make("classification", "Classification", columns, rows_of(block, columns, believed), note)


def across(key, title, digits, scale, best, said, block):
    """One figure of classification on every data set and on average, in the form of BayesVLM's table 1."""
    names = data_sets(block)
    if len(names) < 2:  # the table of the data set itself has it
        return None
    others = {"query": partial(_unscaled, "auroc", key), "auroc": _by_entropy}
    read = others.get(key, partial(_believed, key, scale))
    columns = {data: [Column(f"{data}_{key}", *head, digits, read, best)] for data, head in names.items()}
    if key == "ece_15":
        more = partial(_believed, "ece_20", 1)
        for data, head in names.items():
            columns[data].append(Column(f"{data}_ece_20", *head, digits, more, best, shown=False))

    def mean(values, about):
        found = [read(each, _fitted(each, about)) for each in values]
        return None if None in found else statistics.fmean(found)

    average = Column(f"average_{key}", "", "average", digits, mean, best)

    def cells(runs, about):
        of = {data: [run.values for run in runs if run.values["evaluated_on"] == data] for data in names}
        found = {}
        for data, values in of.items():
            found |= tables.cells_of(columns[data], values, about) if values else {}
        by_seed = [{each["config"]["seed"]: each for each in values} for values in of.values()]
        shared = [[each[seed] for each in by_seed] for seed in by_seed[0] if all(seed in each for each in by_seed)]
        return found | (tables.cells_of([average], shared, about) if shared else {})

    parts = (lambda runs: [("", "model")]) if key == "query" else believed
    rows = [(heading, [row for row in rows if row.cells]) for heading, rows in rows_of(block, [], parts, cells)]
    every_column = [column for data in names for column in columns[data]]
    note = f"{said[0].upper()}{said[1:]}." if said else _of_temperatures(block)
    averaged = {about for runs in block.results.values() for _, about in parts(runs)}
    if any(average.key in row.cells for _, some in rows for row in some) and any(
        _fitted(run.values, about) != about for run in _runs(block) for about in averaged
    ):
        note += " Where no temperature can be fitted, the average has the probabilities as they are."
    return tables.make(f"across_{key}", title, [*every_column, average], rows, note)


def differences(figure, block):
    """One figure of probabilities less that of a baseline on the same images, with an interval: a row per comparison.

    figure: nll or ece. Seeds are averaged over, draw by draw.
    """
    names, base, rows, columns = data_sets(block), baseline_of(block), [], []
    for data, head in names.items():
        columns.append(Column(f"{data}_{figure}_gap", *head, 3, None, None))
        columns += [Column(f"{data}_{figure}_gap_{end}", *head, 3, None, None, shown=False) for end in ("low", "high")]
    drawn = _drawn(block)
    for name, ours, theirs in comparisons(block):
        cells = {}
        for data in names:
            if ours in drawn[data] and theirs in drawn[data]:
                gap = comparison.gap(drawn[data][ours][figure], drawn[data][theirs][figure])
                # With its sign: what rounds to zero may be real.
                mean, low, high = (f"{value:+.3f}".replace("-", MINUS) for value in gap)
                key = f"{data}_{figure}_gap"
                cells |= {key: Cell(gap.mean, text=f"{mean} [{low}, {high}]" + REAL * gap.real)}
                cells |= {f"{key}_low": Cell(gap.low), f"{key}_high": Cell(gap.high)}
        if cells:
            runs = block.results[ours[0]]
            rows.append(Row(name, runs[0].path.parent.parent, seeds_of(runs), cells, ours[0]))
    title = f"{'NLPD' if figure == 'nll' else 'ECE'} less that of a baseline"
    note = (
        f"Below 0 is better. In brackets the 95 % interval over draws of images, the same for both: {REAL} leaves 0"
        " out, each for itself."
        f" {base} has the plain probabilities (MAP); what is better than a matched temperature comes"
        " from telling items apart rather than from cooling."
    )
    if figure == "ece":
        note += (
            " Drawing adds noise, which raises a small ECE more than a large one, and most where many bins hold few"
            " images: of forecasts that differ much in how sure they are, believe a small difference less."
        )
    return tables.make(f"differences_{figure}", title, columns, [("", rows)], note, heads=("comparison", "seeds"))


def baseline_of(block):
    """The first variant without an uncertainty, which others are compared with; None where there is none."""
    return next((variant for variant, runs in block.results.items() if not has_uncertainty(runs[0])), None)


def has_uncertainty(run):
    """Whether a Result is of a method with an uncertainty of its own."""
    values = run.values
    sides = any(values[side]["levels_by"] for side in (*SIDES, *CLASSES) if side in values)
    return sides or "query" in (values.get("hierarchy") or {}).get("uncertainty", {})


def comparisons(block):
    """What is compared: list of (name, (variant, entry), (variant, entry)).

    Methods as they are, and the plain probabilities under a temperature, with the plain ones; methods with those under
    a temperature, and with the one matched to their own.
    """
    rows = [(variant, label, name) for variant, runs in block.results.items() for label, name in believed(runs)]
    found, base = [], baseline_of(block)
    for variant, label, name in rows if base else ():
        if (variant == base) != (name == "model"):
            ours = f"({variant}{label})" if label else variant
            found.append((f"{ours} less {base}", (variant, name), (base, "model")))
    for variant, label, scaled in rows:
        if variant == base and scaled != "model":
            others = [other for other in block.results if other != base]
            found += [(f"{other} less ({base}{label})", (other, "model"), (base, scaled)) for other in others]
    for variant, _, name in rows:
        if name == "matched":
            found.append((f"{variant} less its matched temperature", (variant, "model"), (variant, name)))
    return found


def hierarchy(block):
    """Whether uncertainty falls along chains of prompts; below, two uncertainties that cost nothing."""
    found = block.any.get("hierarchy")
    if not found:
        return None
    columns = _chains()
    references = []
    for name, record in found["uncertainty"].items():
        if name != "query":
            alone = {"hierarchy": {"uncertainty": {"query": record}}}
            references.append(Row(name, None, None, tables.cells_of(columns, [alone])))
    note = f"{found['prompts']:,} prompts in {found['chains']:,} chains from general to specific."
    return tables.make("hierarchy", "Hierarchy", columns, rows_of(block, columns), note, references)


TABLES = {
    "retrieval": (recall, uncertainty, levels, selective, truth, eccv, calibration, hierarchy),
    "classification": (classification, selective),
    "hierarchy": (hierarchy,),
    "comparison": (
        *(partial(across, *figure) for figure in ACROSS),
        *(partial(differences, x) for x in ("nll", "ece")),
    ),
}


def is_unified(runs):
    """Whether a variant's Results are of runs trained by the unified objective rather than the method's own."""
    return runs[0].values["config"].get("objective") == "infonce"


def rows_of(block, columns, parts=lambda runs: [("", None)], cells=None):
    """The rows of a block by objective: list of (heading, rows), no heading where all are trained by the same.

    parts: function from a variant's runs to its rows, each what its name is followed by, and what its columns are read
    with beside the values. cells: function from the runs, and that, to the cells of a row, by default of `columns`.
    """
    cells = cells or (lambda runs, about: tables.cells_of(columns, [run.values for run in runs], about))
    groups = {}
    for variant, runs in block.results.items():
        heading = UNIFIED if is_unified(runs) else ""
        seen = max(run.values["seen_in_training"] for run in runs)
        name = variant + f" (trained on {seen:,} of the images)" * bool(seen)
        folder, seeds = runs[0].path.parent.parent, seeds_of(runs)
        for label, about in parts(runs):
            groups.setdefault(heading, []).append(Row(name + label, folder, seeds, cells(runs, about), variant))
    return list(groups.items()) if len(groups) > 1 else [("", rows) for rows in groups.values()]


def seeds_of(runs):
    """How many seeds a variant's Results are of, on however many data sets."""
    return len({run.values["config"]["seed"] for run in runs})


def _runs(block):
    return [run for runs in block.results.values() for run in runs]


def data_sets(block):
    """What the results of a block were evaluated on: {evaluated_on: (data set, split)}."""
    found = {}
    for run in _runs(block):
        data, split = run.values["evaluated_on"], run.values["split"]
        found.setdefault(data, (data.removesuffix(f"+{split}"), split))
    return found


def believed(runs):
    """The rows of a classifier: its own probabilities, and below them those of temperatures that some data set has."""
    of = {}
    for run in runs:
        of.setdefault(run.values["evaluated_on"], []).append(run.values["image_to_class"]["calibration"])
    found = [("", "model")]
    for name, title in BELIEFS.items():
        held = [each for each in of.values() if all(name in calibration for calibration in each)]
        if held and name != "model":
            splits = dict.fromkeys(calibration[name].get("split", "") for each in held for calibration in each)
            found.append((f" + {title.format(split=' or '.join(splits))}", name))
    return found


@lru_cache(maxsize=1)  # of the tables of one block
def _drawn(block):
    """NLL and ECE of what is compared, averaged over seeds: {data set: {(variant, entry): {figure: (1 + draws,)}}}."""
    wanted = {side for _, *both in comparisons(block) for side in both}
    found = {data: {} for data in data_sets(block)}
    for data, drawn in found.items():
        runs = [
            (side, run)
            for side in sorted(wanted)
            for run in block.results[side[0]]
            if run.values["evaluated_on"] == data and side[1] in run.values["image_to_class"]["calibration"]
        ]
        if not runs:
            continue
        fields = "nll", "confidence", "hit"
        arrays = [[run.arrays[f"image_to_class_{side[1]}_{field}"] for side, run in runs] for field in fields]
        figures = comparison.resampled(*arrays)
        for side in wanted:
            mine = [i for i, (other, _) in enumerate(runs) if other == side]
            if mine:
                drawn[side] = {name: values[:, mine].mean(axis=1) for name, values in figures.items()}
    return found


def find(values, *path):
    """What lies at a path of keys in nested dicts, None where there is no such thing."""
    for key in path:
        values = None if values is None else values.get(key)
    return values


def _column(key, group, title, digits, *path, scale=1, **more):
    """A Column that reads what lies at `path`."""

    def read(values, about):
        value = find(values, *path)
        return None if value is None else scale * value

    return Column(key, group, title, digits, read, **more)


def _percent(key, group, title, *path, **more):
    return _column(key, group, title, 1, *path, scale=100, **more)


def _reference(cells):
    return [Row("Bayes-optimal", None, None, cells)] if cells else []


def _share_of_limit(side, values, about):
    limit = find(values, side, "bayes_recall")
    return 100 * values[side]["recall"]["1"] / limit if limit else None


def _recall_by(score, side, values, about):
    """R@1 by one score, where the run was evaluated by both."""
    if "other_score" not in values:
        return None
    other = values["other_score"]
    return 100 * (other if other["score"] == score else values)[side]["recall"]["1"]


def _own_or_deterministic(runs):
    """The row of a method's own uncertainty, or those of what stands in for it."""
    if runs[0].values["text_to_image"]["levels_by"]:
        return [("", None)]
    return [(_named(name), name) for name in DETERMINISTIC]


def _named(name):
    return f", {GALLERY_AWARE[name]}" if name else ""


def _levels_by(side, values, about):
    """Say whose uncertainty the levels follow."""
    name = about or values[side]["levels_by"]
    return name and followed(side, name)


def _level_by(side, values, about):
    return _levels_by(side, values, about[0])


def _family(side, values, about):
    """Say whether that is known before the search."""
    return find(values, side, "uncertainty", about or values[side]["levels_by"], "family")


def _record(side, path, values, about, name=None, scale=1):
    """What lies at `path` of the record of one uncertainty, by default the one that the row or else the levels are of.

    None where all queries are equally uncertain.
    """
    found = find(values, side, "uncertainty", name or about or values[side]["levels_by"])
    if found is None or found.get("constant"):
        return None
    for key in path:
        found = found[key] if isinstance(key, int) else found.get(key)
        if found is None:
            return None
    return scale * found


def _level(side, level, values, about):
    """R@1 of one level, or its limit, in percent."""
    name, figure = about
    path = ("levels", "recall", "1") if figure == "recall" else ("levels", figure)
    return _record(side, (*path, level), values, name, scale=100)


def _coco(key, values, about):
    """A figure of metrics/eccv.py in percent: the mean over both directions, or a sum over them as it is."""
    found = find(values, "coco", key)
    if isinstance(found, dict):
        return 100 * sum(found.values()) / len(found)
    return found


def _accuracy(k, values, about):
    """Top-k accuracy in percent of what ranks, or top-1 of the plain cosines that a matched temperature is of."""
    if about == "matched":
        return 100 * values["image_to_class"]["calibration"][about]["accuracy"] if k == "1" else None
    return 100 * values["image_to_class"]["recall"][k]


def _of_temperatures(block):
    """Say what the temperatures of a block's classifiers are."""
    entries = {name for runs in block.results.values() for _, name in believed(runs)}
    note = "The temperature of each half of the images is fitted on the other; it changes no answer."
    if any("temperature" not in run.values["image_to_class"]["calibration"] for run in _runs(block)):
        note += " Where too few answers are wrong to bound one, there is none."
    if "validation" in entries:
        note += " That of another split is fitted on all of its labeled images, however unlike they are."
    if "matched" in entries:
        note += (
            " Matched temperature: plain cosines of the frozen embeddings at the one temperature that cools as much as"
            " the method does on average, so that what is better than that comes from telling items apart."
        )
    return note


def _fitted(values, about):
    """What an average has of a data set: probabilities as they are where a temperature was asked for in vain."""
    asked = about == "temperature" or (about == "validation" and values.get("val"))
    return "model" if asked and about not in values["image_to_class"]["calibration"] else about


def _believed(key, scale, values, about):
    found = find(values, "image_to_class", "calibration", about, key)
    return None if found is None else scale * found


def _by_entropy(values, about):
    """AUROC of failure by the entropy of a row's own probabilities."""
    return _unscaled("auroc", "entropy", values, about) if about == "model" else _believed("auroc", 1, values, about)


def _error(key, values, about):
    return values["image_to_class"]["calibration"][about][key]


def _unscaled(key, name, values, about):
    return _record("image_to_class", (key,), values, about, name) if about == "model" else None


def _chains():
    path = "hierarchy", "uncertainty", "query"
    return [
        _column(key, "chains of prompts", title, digits, *path, key, scale=scale, best=best, note=note)
        for key, title, scale, digits, best, note in HIERARCHY
    ]


def level_counts(part):
    """How many queries each level of one side of a result holds: as many of any uncertainty that is not constant."""
    return next((record["levels"]["count"] for record in part["uncertainty"].values() if "levels" in record), [])


def _sizes(block):
    """Say how many queries a level has: "of 500 captions and of 100 images", or "of 8 or 9 captions"."""
    said = []
    for side, what in (("text_to_image", "captions"), ("image_to_text", "images")):
        counts = level_counts(block.any[side])
        said += [f"of {' or '.join(f'{count:,}' for count in sorted(set(counts)))} {what}"] * bool(counts)
    return " and ".join(said) or "all queries being equally uncertain"


def _constant(block, sides, names=None):
    """Say which rows have no figures, as all queries are equally uncertain; "" where none is so."""
    found = []
    for variant, runs in block.results.items():
        for side, title in sides.items():
            by = runs[0].values[side]["levels_by"]
            for name in names or ([by] if by else DETERMINISTIC):
                records = [find(run.values, side, "uncertainty", name) for run in runs]
                if any(record and record.get("constant") for record in records):
                    found.append(f"{variant}{'' if by else _named(name)} ({title})")
    return f" All queries are equally uncertain, so that there are no figures: {', '.join(found)}." if found else ""
