"""Tables as text: one run for the terminal, and many runs as Markdown, LaTeX, CSV and plain text."""

import csv
import io
import re
import statistics
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

NONE = "\N{EN DASH}"  # stands where a method has no such number
MINUS = "\N{MINUS SIGN}"
TO_IMAGE, TO_TEXT, UNCERTAINTY = "text→image, %", "image→text, %", "uncertainty of captions"
BY_SCORE, AUROC = "R@1, text→image, %", "AUROC of the right answer, text→image"
CSV_ONLY = ""  # the group of what would crowd the other tables
# Each panel is a table of its own, for all in one would fit neither paper nor terminal nor page.
PANELS = ((TO_IMAGE, TO_TEXT), (UNCERTAINTY,), (BY_SCORE, AUROC))
SCORES = {"similarity": "cosine", "log_likelihood": "likelihood"}
GALLERY_AWARE = {  # confidences that need the scores over the whole gallery
    "top": ("top score", "from the best score in the gallery"),
    "margin": ("margin", "from the best score less the second-best"),
    "entropy": ("entropy", "from the entropy of the posterior over the gallery"),
}
UNIFIED = "unified objective"  # heads the rows trained by it


def levels_table(result):
    """Lay out one retrieval result for the terminal: recall both ways, then R@1 by uncertainty level."""
    size = f"{result['images']:,} images, {result['captions']:,} captions"
    ranked = f", ranked by {SCORES[result['score']]}" if "score" in result else ""
    lines = [f"{result['variant']} on {result['evaluated_on']} ({size}){ranked}"]
    if result.get("seen_in_training"):
        lines.append(f"  leakage: {result['seen_in_training']:,} of the images were trained on")
    for name, title in (("text_to_image", "text->image"), ("image_to_text", "image->text")):
        part = result[name]
        limit = f"  (Bayes-optimal R@1 {100 * part['bayes_recall']:.1f})" if "bayes_recall" in part else ""
        lines.append(f"  {title}  {_recalls(part)}{limit}")
        if "levels" in part:
            lines.append(f"    R@1 by uncertainty of the {part['levels_by']}, least uncertain first:")
            lines.append("    " + " ".join(f"{100 * level['recall']['1']:5.1f}" for level in part["levels"]))
            if "bayes_recall" in part["levels"][0]:
                limits = " ".join(f"{100 * level['bayes_recall']:5.1f}" for level in part["levels"])
                lines.append(f"    {limits}  Bayes-optimal")
            if _all_alike(part["levels"]):
                lines.append("    all are equally uncertain, so that the levels mean nothing")
            lines.append(f"    S {part['s']:.3f}   R2 {part['r2']:.3f}   -S*R2 {part['minus_s_r2']:.3f}")
        if "auroc" in part:
            lines.append(f"    AUROC of the right answer, {_doubt_of(part)}: {_auroc(part['auroc'])}")
        if "gallery_aware" in part:
            lines.append(f"    AUROC of the right answer, {_gallery_aware(part)}")
        if "other_score" in result:
            score, other = SCORES[result["other_score"]["score"]], result["other_score"][name]
            lines.append(f"    by {score}  {_recalls(other)}  AUROC, {_gallery_aware(other)}")
    truth = result["text_to_image"].get("spearman_ambiguity")
    if truth is not None:
        lines.append(f"  Spearman of uncertainty and true ambiguity {truth:.3f}")
    return "\n".join(lines)


def _all_alike(levels):
    """Whether all queries have the same uncertainty, as those of a method that has not been trained may."""
    found = [bound for level in levels for bound in level.get("uncertainty", [])]
    return bool(found) and min(found) == max(found)


def _recalls(part):
    return "  ".join(f"R@{k} {100 * value:5.1f}" for k, value in part["recall"].items())


def _doubt_of(part):
    """Say whose uncertainty an AUROC is of: a retrieved caption's is not known from the query alone."""
    return "query-only" if part["levels_by"].startswith("query") else f"uncertainty of the {part['levels_by']}"


def _gallery_aware(part):
    found = [f"{title} {_auroc(part['gallery_aware'][name])}" for name, (title, _) in GALLERY_AWARE.items()]
    return f"gallery-aware: {', '.join(found)}"


def _auroc(value):
    return "-" if value is None else f"{value:.3f}"  # there is none where all answers are right, or all wrong


class Result(NamedTuple):
    """One result file of eval.py."""

    path: Path  # relative to the folder of the report
    values: dict


class Column(NamedTuple):
    """One number per run: its name, how to read it from a result (None where there is none) and how to print it."""

    key: str
    group: str
    title: str
    digits: int
    read: Callable[[dict], float | None]
    limit: Callable[[dict], float | None] = lambda values: None  # what the reference row has
    best: Callable | None = max  # of its values; None where a value alone says nothing
    note: str = ""  # says what it is


class Cell(NamedTuple):
    """Mean and sample standard deviation over seeds, None with one seed; best where no row of the table beats it."""

    mean: float
    sd: float | None = None
    best: bool = False


class Row(NamedTuple):
    """One line of a table; the reference row of limits has neither folder nor seeds nor objective."""

    name: str
    folder: Path | None
    seeds: int | None
    cells: dict  # of a column's key to its Cell, absent where the method has no such number
    objective: str | None = None  # native or infonce


def _recall(direction, k):
    return lambda values: 100 * values[direction]["recall"][str(k)]


def _limit(direction):
    return lambda values: 100 * values[direction]["bayes_recall"] if "bayes_recall" in values[direction] else None


def _trend(part, name):
    return lambda values: values.get(part, {}).get(name)


def _share_of_limit(values):
    limit = _limit("text_to_image")(values)
    return 100 * _recall("text_to_image", 1)(values) / limit if limit else None


def _falling_chains(values):
    return 100 * values["prompt_chains"]["falling_chains"] if "prompt_chains" in values else None


def _recall_by(score, direction):
    """Read R@1 by one score, where the run was evaluated by both."""

    def read(values):
        if "other_score" not in values:
            return None
        other = values["other_score"]
        return _recall(direction, 1)(other if other["score"] == score else values)

    return read


def _query_only(direction):
    def read(values):
        part = values[direction]
        return part["auroc"] if "auroc" in part and _doubt_of(part) == "query-only" else None

    return read


def _from_gallery(direction, name):
    return lambda values: values[direction].get("gallery_aware", {}).get(name)


def _columns():
    for direction, group in (("text_to_image", TO_IMAGE), ("image_to_text", TO_TEXT)):
        yield Column(f"{direction}_r1_percent", group, "R@1", 1, _recall(direction, 1), _limit(direction))
        for k in (5, 10):
            yield Column(f"{direction}_r{k}_percent", group, f"R@{k}", 1, _recall(direction, k))
        if group is TO_IMAGE:
            note = "R@1 as a percentage of the Bayes-optimal R@1"
            yield Column("text_to_image_r1_percent_of_limit", group, "of limit", 1, _share_of_limit, note=note)
    trends = (
        ("s", "S", min, f"rank correlation of uncertainty level and R@1; {MINUS}1 is ideal"),
        ("r2", "R²", None, "of the linear fit of R@1 on uncertainty level; 1 is ideal, if S is negative"),
        ("minus_s_r2", f"{MINUS}S·R²", max, "both in one number; 1 is ideal"),
    )
    for key, title, best, note in trends:
        limit = _trend("bayes_optimal", key)
        yield Column(key, UNCERTAINTY, title, 3, _trend("text_to_image", key), limit, best, note)
    note = "rank correlation of a caption's uncertainty and its true ambiguity; 1 is ideal"
    truth = _trend("text_to_image", "spearman_ambiguity")
    yield Column("spearman_ambiguity", UNCERTAINTY, "Spearman", 3, truth, note=note)
    note = "prompt chains from general to specific along which uncertainty falls at every step"
    yield Column("falling_chains_percent", UNCERTAINTY, "chains, %", 1, _falling_chains, note=note)
    for direction, groups in (("text_to_image", (BY_SCORE, AUROC)), ("image_to_text", (CSV_ONLY, CSV_ONLY))):
        for score, title in SCORES.items():
            key, limit = f"{direction}_r1_percent_by_{title}", _limit(direction)
            yield Column(key, groups[0], f"by {title}", 1, _recall_by(score, direction), limit)
        note = "from the caption's uncertainty, before any search; 0.5 is chance, 1 is ideal"
        key = f"{direction}_auroc_query_only"
        yield Column(key, groups[1], "query-only", 3, _query_only(direction), note=note)
        for name, (title, note) in GALLERY_AWARE.items():
            key = f"{direction}_auroc_{name}"
            yield Column(key, groups[1], title, 3, _from_gallery(direction, name), note=note)
        key = f"{direction}_auroc_probability"
        yield Column(key, CSV_ONLY, "probability", 3, _from_gallery(direction, "probability"))


COLUMNS = tuple(_columns())


class Block:
    """The results that may stand in one table: the same data and backbone, and as many uncertainty levels.

    results: dict of variant to its Results, one per seed, in the order in which the rows shall stand; those trained by
    the unified objective are put last.
    """

    def __init__(self, evaluated_on, backbone, results):
        self.evaluated_on, self.backbone = evaluated_on, backbone
        self.results = dict(sorted(results.items(), key=lambda item: is_unified(item[1])))
        self.title = f"{evaluated_on}, {backbone}"
        self.any = next(iter(results.values()))[0].values  # of what all results agree in
        self.rows = _mark_best([_row(variant, runs) for variant, runs in self.results.items()])
        # Without a known truth there is no limit, and no column that compares with it.
        shown = [column for column in COLUMNS if column.group != CSV_ONLY]
        self.columns = [column for column in shown if any(column.key in row.cells for row in self.rows)]
        limits = {column.key: column.limit(self.any) for column in self.columns}
        limits = {key: Cell(limit) for key, limit in limits.items() if limit is not None}
        self.reference = Row("Bayes-optimal", None, None, limits) if limits else None

    @property
    def every_row(self):
        """The rows, and the reference row last if there is one."""
        return [*self.rows, *filter(None, [self.reference])]

    @property
    def groups(self):
        """The rows by objective, each group under its title: list of (title, rows); no title where none is needed."""
        split = groupby(self.rows, key=lambda row: UNIFIED if row.objective == "infonce" else "")
        groups = [(title, list(rows)) for title, rows in split]
        return groups if len(groups) > 1 else [("", self.rows)]

    def groups_of(self, panel):
        """`groups`, and the reference row as the last if it has a number in `panel`, a list of columns."""
        has_limit = self.reference and any(column.key in self.reference.cells for column in panel)
        return [*self.groups, *([("", [self.reference])] if has_limit else [])]

    @property
    def panels(self):
        """The columns, split into panels: list of lists."""
        split = [[column for column in self.columns if column.group in groups] for groups in PANELS]
        return [panel for panel in split if panel]

    @property
    def summary(self):
        """Say what the numbers are: of one seed, or means over 3, or over 1 to 3 where rows differ."""
        least, most = min(row.seeds for row in self.rows), max(row.seeds for row in self.rows)
        if most == 1:
            return "one seed"
        return f"mean ± s.d. over {most if least == most else f'{least} to {most}'} seeds"


def is_unified(runs):
    """Whether a variant's Results are of runs trained by the unified objective rather than the method's own."""
    return runs[0].values["config"].get("objective") == "infonce"


def mean_sd(values):
    """Mean and sample standard deviation of a list of numbers; None for the deviation of a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def level_recalls(runs):
    """R@1 in % by uncertainty level of one variant's Results: list of Cells, empty where it has no levels."""
    return _level_cells(runs, lambda level: level["recall"]["1"])


def level_limits(runs):
    """Bayes-optimal R@1 in % of the captions in each level: list of Cells, empty where the truth is not known."""
    return _level_cells(runs, lambda level: level.get("bayes_recall"))


def _level_cells(runs, read):
    found = [[read(level) for level in run.values["text_to_image"].get("levels", ())] for run in runs]
    levels = [values for values in zip(*found, strict=True) if None not in values]
    return [Cell(*mean_sd([100 * value for value in values])) for values in levels]


def _row(variant, runs):
    found = {column.key: [column.read(run.values) for run in runs] for column in COLUMNS}
    cells = {key: Cell(*mean_sd(values)) for key, values in found.items() if None not in values}
    objective = "infonce" if is_unified(runs) else "native"
    seen = max(run.values.get("seen_in_training", 0) for run in runs)
    variant += f" (trained on {seen:,} of the images)" * bool(seen)
    return Row(variant, runs[0].path.parent.parent, len(runs), cells, objective)


def _mark_best(rows):
    """Mark the best cells of each column: all that print as the best does, and none where nothing is compared."""
    for column in COLUMNS:
        found = [row.cells for row in rows if column.key in row.cells]
        printed = [float(number(cells[column.key].mean, column.digits)) for cells in found]
        for cells, value in zip(found, printed, strict=True):
            if len(found) > 1 and column.best and value == column.best(printed):
                cells[column.key] = cells[column.key]._replace(best=True)
    return rows


def number(value, digits):
    """Print a number with so many digits behind the point; what rounds to zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def parts(cell, digits):
    """What a cell prints: its mean, and its standard deviation or None."""
    return number(cell.mean, digits), None if cell.sd is None else number(cell.sd, digits)


def spans(names):
    """Group equal neighbors for a head that spans columns: list of (name, how many)."""
    return [(name, len(list(group))) for name, group in groupby(names)]


def to_markdown(blocks):
    """Blocks as Markdown tables under a heading each; a row's name links to the folder of its results."""
    return "\n".join(_markdown_tables(block) for block in blocks)


# No head spans columns in Markdown: a title says what the head above it says elsewhere.
MARKDOWN_HEADS = {
    TO_IMAGE: "{}, " + TO_IMAGE, TO_TEXT: "{}, " + TO_TEXT, BY_SCORE: "R@1 {}, " + TO_IMAGE, AUROC: "AUROC, {}"
}  # fmt: skip


def _markdown_tables(block):
    about = f"### {_in_markdown(block.title)}\n\nNumbers: {block.summary}, best in bold.\n"
    return "\n".join([about, *(_markdown_panel(block, panel) for panel in block.panels)])


def _markdown_panel(block, columns):
    titles = [MARKDOWN_HEADS.get(column.group, "{}").format(column.title) for column in columns]
    heads = [_in_markdown(head) for head in ("method", "seeds", *titles)]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for title, rows in block.groups_of(columns):
        lines += [[f"*{title}*", *[""] * (len(heads) - 1)]] if title else []
        lines += [_markdown_line(row, columns) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_line(row, columns):
    name = _in_markdown(row.name)
    name = f"[{name}](<{row.folder.as_posix()}>)" if row.folder else f"*{name}*"
    cells = [_markdown_cell(row.cells.get(column.key), column.digits) for column in columns]
    return [name, str(row.seeds or ""), *cells]


def _in_markdown(text):
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _markdown_cell(cell, digits):
    if cell is None:
        return NONE
    mean, sd = parts(cell, digits)
    return (f"**{mean}**" if cell.best else mean) + (f" ± {sd}" if sd else "")


LATEX = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    MINUS: "$-$", "±": r"$\pm$", "→": r"$\rightarrow$", "²": r"\textsuperscript{2}", "·": r"$\cdot$",
}  # fmt: skip


def to_latex(blocks):
    r"""Blocks as LaTeX table floats, a panel each, to fit a page's 5.5 inches of text; wants \usepackage{booktabs}."""
    return "\n".join(_latex_table(block, panel) for block in blocks for panel in block.panels)


def _latex_table(block, columns):
    said = _in_latex(f"Retrieval on {block.title}: {block.summary}, best in bold.").replace("s.d. ", r"s.d.\ ")
    lines = [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
    lines += [rf"\caption{{{said}}}", r"\smallskip", _latex_panel(block, columns), r"\end{table}", ""]
    return "\n".join(lines)


def _latex_panel(block, columns):
    heads = spans([column.group for column in columns])
    starts = [2 + sum(count for _, count in heads[:i]) for i in range(len(heads))]
    lines = [rf"\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}", r"\toprule"]
    lines += [_latex_line(["", *(rf"\multicolumn{{{count}}}{{c}}{{{_in_latex(name)}}}" for name, count in heads)])]
    rules = zip(starts, heads, strict=True)
    lines += [" ".join(rf"\cmidrule(lr){{{start}-{start + count - 1}}}" for start, (_, count) in rules)]
    lines += [_latex_line(["method", *(_in_latex(column.title) for column in columns)])]
    for title, rows in block.groups_of(columns):
        lines += [r"\midrule"]
        lines += [_latex_line([rf"\multicolumn{{{1 + len(columns)}}}{{@{{}}l}}{{\emph{{{title}}}}}"])] if title else []
        for row in rows:
            cells = [_latex_cell(row.cells.get(column.key), column.digits) for column in columns]
            lines += [_latex_line([_in_latex(row.name), *cells])]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_line(cells):
    return " & ".join(cells) + r" \\"


def _latex_cell(cell, digits):
    if cell is None:
        return "--"
    mean, sd = parts(cell, digits)
    mean = rf"\mathbf{{{mean}}}" if cell.best else mean
    return f"${mean}$" if sd is None else rf"${mean} {{\scriptstyle\pm {sd}}}$"


def _in_latex(text):
    return "".join(LATEX.get(character, character) for character in text)


def to_csv(blocks):
    """Blocks as one CSV, a line per row: each column's mean and s.d. in full precision, empty where there is none."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    numbers = [f"{column.key}_{part}" for column in COLUMNS for part in ("mean", "sd")]
    writer.writerow(["evaluated_on", "backbone", "variant", "objective", "seeds", *numbers])
    for block in blocks:
        for row in block.every_row:
            cells = [row.cells.get(column.key, (None, None)) for column in COLUMNS]
            numbers = [value for mean, sd, *_ in cells for value in (mean, sd)]
            writer.writerow([block.evaluated_on, block.backbone, row.name, row.objective, row.seeds, *numbers])
    return file.getvalue()


def to_text(blocks):
    """Blocks as plain text for a terminal, one panel above the other, a star at the best."""
    return "\n\n".join(_text_table(block) for block in blocks)


def _text_table(block):
    legend = f"{block.title}: {block.summary}, * best"
    return "\n".join([legend, *(line for panel in block.panels for line in ["", *_text_panel(block, panel)])])


def _text_panel(block, columns):
    groups = block.groups_of(columns)
    cells = {
        row.name: [_text_cell(row.cells.get(column.key), column.digits) for column in columns]
        for _, rows in groups
        for row in rows
    }
    titles = [f"{column.title} ".replace(MINUS, "-") for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *cells.values(), strict=True)]
    names = max(map(len, cells))
    heads, start = " " * names, 0
    for name, count in spans([column.group for column in columns]):
        heads += "  " + name.replace("→", "->").ljust(sum(widths[start : start + count]) + 2 * (count - 1))
        start += count

    def line(name, texts):
        return f"{name:{names}}" + "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [heads, line("", titles)]
    for title, rows in groups:
        lines += [f"{title}:"] if title else []
        lines += [line(row.name, cells[row.name]) for row in rows]
    return [line.rstrip() for line in lines]


def _text_cell(cell, digits):
    if cell is None:
        return f"{NONE} "
    mean, sd = parts(cell, digits)
    return mean + (f" ± {sd}" if sd else "") + ("*" if cell.best else " ")
