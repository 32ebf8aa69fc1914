"""Tables of figures with their means over seeds, and how they print as Markdown, LaTeX, CSV and plain text."""

import csv
import io
import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

NONE = "\N{EN DASH}"  # stands where there is no such number
MINUS = "\N{MINUS SIGN}"
HEADS = "method", "seeds"
# Tables that would take a terminal's reader too far.
LONG = ("levels", "selective", "calibration", "across_auroc", "across_query", "across_aurc")
TERMINAL, PAPER = 128, 104  # characters of a line, the latter in small type on a page's 5.5 inches of text


class Column(NamedTuple):
    """One figure per row: its name, how to read it from a result (None where there is none) and how to print it."""

    key: str
    group: str
    title: str
    digits: int
    read: Callable | None  # of a result's values, and of what the row is about beside them; None: cells come ready
    best: Callable | None = max  # of its values; None where a value alone says nothing
    among: str = ""  # key of the column of text whose cells must be equal where values are compared
    note: str = ""  # says what it is
    published: bool = False  # by others, beside which the rest is to be read
    shown: bool = True  # or else in the CSV alone, as it would crowd the other tables


class Cell(NamedTuple):
    """Mean and sample standard deviation over seeds, None with one seed; best where no row of the table beats it."""

    mean: float | None
    sd: float | None = None
    best: bool = False
    text: str = ""  # instead of a number


class Row(NamedTuple):
    """One line of a table; a reference row, such as of limits, has neither folder nor seeds nor variant."""

    name: str
    folder: Path | None
    seeds: int | None
    cells: dict  # of a column's key to its Cell, absent where there is no such number
    variant: str = ""


class Table(NamedTuple):
    """Rows under headings, the reference rows last, and columns; `hidden` columns are in the CSV alone.

    heads: what rows are, and what their numbers are means over.
    """

    name: str
    title: str
    note: str
    columns: list[Column]
    groups: list[tuple[str, list[Row]]]
    hidden: tuple[Column, ...] = ()
    heads: tuple[str, str] = HEADS


def make(name, title, columns, groups, note="", references=(), heads=HEADS):
    """Make a Table of those columns for which any row has a figure, its best ones marked; None where there is none.

    groups: list of (heading, rows). references: rows that stand below the others, and are never the best.
    """
    rows = _mark_best(columns, [row for _, rows in groups for row in rows])
    marked = iter(rows)
    groups = [(heading, [next(marked) for _ in rows]) for heading, rows in groups]
    found = [column for column in columns if any(column.key in row.cells for row in rows)]
    shown = [column for column in found if column.shown]
    if not any(not column.published for column in shown):
        return None
    references = [row for row in references if any(column.key in row.cells for column in shown)]
    groups = [group for group in groups if group[1]] + ([("", references)] if references else [])
    return Table(name, title, note, shown, groups, tuple(column for column in found if not column.shown), heads)


def has_best(table):
    """Whether a cell of the table is marked as the best of its column."""
    return any(cell.best for _, rows in table.groups for row in rows for cell in row.cells.values())


def mean_sd(values):
    """Mean and sample standard deviation of a list of numbers; None for the deviation of a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cells_of(columns, runs, about=None):
    """The Cells of a row whose seeds' values are `runs`; about: whatever else its columns are read with."""
    cells = {}
    for column in columns:
        found = [column.read(values, about) for values in runs]
        if all(isinstance(value, str) for value in found):
            cells[column.key] = Cell(None, text=" / ".join(dict.fromkeys(found)))
        elif None not in found:
            cells[column.key] = Cell(*mean_sd(found[:1] if column.published else found))
    return cells


def _mark_best(columns, rows):
    """Mark the best cells of each column: all that print as the best does, and none where all do."""
    for column in columns:
        if not column.best or column.published:
            continue
        found = defaultdict(list)
        for row in rows:
            if column.key in row.cells and not row.cells[column.key].text:
                found[row.cells[column.among].text if column.among else ""].append(row.cells)
        for alike in found.values():
            printed = [float(number(cells[column.key].mean, column.digits)) for cells in alike]
            for cells, value in zip(alike, printed, strict=True):
                best = len(set(printed)) > 1 and value == column.best(printed)
                cells[column.key] = cells[column.key]._replace(best=best)
    return rows


def number(value, digits):
    """Print a number with so many digits behind the point; what rounds to zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def over(counts, what):
    """Say what the numbers are, whose rows are of so many seeds or trials: of one, or means over 3, or over 1 to 3."""
    least, most = min(counts), max(counts)
    if most == 1:
        return f"one {what}"
    return f"mean ± s.d. over {most if least == most else f'{least} to {most}'} {what}s"


def parts(cell, digits):
    """What a cell prints: its mean, and its standard deviation or whatever its text has behind ±, or None."""
    if cell.text:
        text, _, spread = cell.text.partition(" ± ")
        return text, spread or None
    return number(cell.mean, digits), None if cell.sd is None else number(cell.sd, digits)


def spans(names):
    """Group equal neighbors for a head that spans columns: list of (name, how many)."""
    return [(name, len(list(group))) for name, group in groupby(names)]


def panels(table, widest):
    """Split a table's columns to fit lines of `widest` characters, groups whole where possible: list of lists."""
    rows = [row for _, rows in table.groups for row in rows]
    room = widest - max(len(row.name) for row in rows)

    def width(column):
        texts = [_text_cell(row.cells.get(column.key), column.digits) for row in rows]
        return 2 + max(map(len, [f"{column.title} ", *texts]))

    split, used = [], 0
    for head, group in groupby(table.columns, key=lambda column: column.group):
        group = list(group)
        widths = [width(column) for column in group]
        widths[0] += max(0, 2 + len(head) - sum(widths))
        count = -(-sum(widths) // max(room, *widths))  # panels that the group needs for itself
        size = -(-len(group) // count)
        for start in range(0, len(group), size):
            wide = sum(widths[start : start + size])
            if not split or used + wide > room or count > 1:
                split, used = [*split, []], 0
            split[-1] += group[start : start + size]
            used += wide
    return split


def _groups_of(table, columns):
    """The groups of a table less those reference rows that say nothing in these columns."""
    keys = {column.key for column in columns}
    kept = [(title, [row for row in rows if row.folder or keys & set(row.cells)]) for title, rows in table.groups]
    return [(title, rows) for title, rows in kept if rows]


def to_markdown(blocks):
    """Blocks as Markdown tables under a heading each; a row's name links to the folder of its results."""
    return "\n".join(_markdown_block(block) for block in blocks)


def _markdown_block(block):
    best = ", best in bold" if any(map(has_best, block.tables)) else ""
    about = f"## {_in_markdown(block.title)}\n\nNumbers: {block.summary}{best}.\n"
    return "\n".join([about, *(_markdown_table(table) for table in block.tables)])


def _markdown_table(table):
    lines = [f"### {_in_markdown(table.title)}", ""]
    lines += [_in_markdown(table.note), ""] if table.note else []
    # No head spans columns in Markdown: a title says what the head above it says elsewhere.
    titles = [", ".join(filter(None, [column.title, column.group])) for column in table.columns]
    heads = [_in_markdown(head) for head in (*table.heads, *titles)]
    table_lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for title, rows in table.groups:
        table_lines += [[f"*{title}*", *[""] * (len(heads) - 1)]] if title else []
        table_lines += [_markdown_line(row, table.columns) for row in rows]
    lines += [f"| {' | '.join(line)} |" for line in table_lines]
    said = {}
    for column in table.columns:
        if column.note:
            said.setdefault(column.note, []).append(noted(column))
    keys = [(", ".join(dict.fromkeys(titles)), note) for note, titles in said.items()]
    lines += ["", *(f"- {_in_markdown(title)}: {_in_markdown(note)}." for title, note in keys)] if keys else []
    return "".join(f"{line}\n" for line in lines)


def noted(column):
    """What a column's note is about: what is published is noted once for each source."""
    return column.group.partition(", ")[0] if column.published else column.title


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
    mean = _in_markdown(mean)
    return (f"**{mean}**" if cell.best else mean) + (f" ± {sd}" if sd else "")


LATEX = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    MINUS: "$-$", "±": r"$\pm$", "→": r"$\rightarrow$", "²": r"\textsuperscript{2}", "·": r"$\cdot$", NONE: "--",
    "†": r"$\dagger$", "‡": r"$\ddagger$",
}  # fmt: skip


def to_latex(blocks):
    r"""Blocks as LaTeX table floats that fit a page's 5.5 inches of text; wants \usepackage{booktabs}."""
    tables = [(block, table) for block in blocks for table in block.tables]
    floats = []
    for block, table in tables:
        split = panels(table, PAPER)
        parts = [f" ({number} of {len(split)})" if len(split) > 1 else "" for number in range(1, len(split) + 1)]
        floats += [_latex_table(block, table, *pair) for pair in zip(parts, split, strict=True)]
    return "\n".join(floats)


def _latex_table(block, table, part, columns):
    best = ", best in bold" if has_best(table) else ""
    said = f"{table.title}{part}. {block.title}, {block.summary}{best}. {table.note}".strip()
    said = _in_latex(said).replace("s.d. ", r"s.d.\ ")
    lines = [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
    lines += [rf"\caption{{{said}}}", r"\smallskip", _latex_panel(table, columns), r"\end{table}", ""]
    return "\n".join(lines)


def _latex_panel(table, columns):
    heads = spans([column.group for column in columns])
    starts = [2 + sum(count for _, count in heads[:i]) for i in range(len(heads))]
    lines = [rf"\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}", r"\toprule"]
    if any(name for name, _ in heads):
        lines += [_latex_line(["", *(rf"\multicolumn{{{count}}}{{c}}{{{_in_latex(name)}}}" for name, count in heads)])]
        rules = [(start, count) for start, (name, count) in zip(starts, heads, strict=True) if name]
        lines += [" ".join(rf"\cmidrule(lr){{{start}-{start + count - 1}}}" for start, count in rules)]
    lines += [_latex_line([table.heads[0], *(_in_latex(column.title) for column in columns)])]
    for title, rows in _groups_of(table, columns):
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
    if cell.text:
        return _in_latex(cell.text)
    mean, sd = parts(cell, digits)
    mean = rf"\mathbf{{{mean}}}" if cell.best else mean
    return f"${mean}$" if sd is None else rf"${mean} {{\scriptstyle\pm {sd}}}$"


def _in_latex(text):
    return "".join(LATEX.get(character, character) for character in text)


CSV_HEAD = (
    "evaluated_on", "backbone", "task", "table", "row", "variant", "seeds", "column", "mean", "sd", "text", "published"
)  # fmt: skip


def to_csv(blocks):
    """Blocks as one CSV in long form: a line per figure, in full precision, also of what finds no room elsewhere."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for block in blocks:
        for table in block.tables:
            about = block.evaluated_on, block.backbone, block.task, table.name
            for row in (row for _, rows in table.groups for row in rows):
                for column in (*table.columns, *table.hidden):
                    if column.key in row.cells:
                        cell = row.cells[column.key]
                        figures = column.key, cell.mean, cell.sd, cell.text, int(column.published)
                        writer.writerow([*about, row.name, row.variant, row.seeds, *figures])
    return file.getvalue()


def to_text(blocks):
    """Blocks as plain text for a terminal, the shorter tables one above the other, a star at the best."""
    return "\n\n\n".join(_text_block(block) for block in blocks)


def _text_block(block):
    lines = [f"{block.title}: {block.summary}" + ", * best" * any(map(has_best, block.tables))]
    long = [table.title for table in block.tables if table.name in LONG]
    for table in block.tables:
        if table.name in LONG:
            continue
        lines += ["", f"[{table.name}] {_in_text(table.title)}"]
        lines += [_in_text(line) for line in _wrapped(table.note)]
        for i, columns in enumerate(panels(table, TERMINAL)):
            lines += [""] * bool(i) + _text_panel(table, columns)
    return "\n".join([*lines, *(["", _in_text(f"Only in the files: {'; '.join(long)}.")] if long else [])])


def _wrapped(note):
    return textwrap.wrap(note, TERMINAL) if note else []


def _text_panel(table, columns):
    groups = _groups_of(table, columns)
    cells = {
        row.name: [_text_cell(row.cells.get(column.key), column.digits) for column in columns]
        for _, rows in groups
        for row in rows
    }
    titles = [_in_text(f"{column.title} ") for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *cells.values(), strict=True)]
    names = max(map(len, cells))
    heads = [(_in_text(name), count) for name, count in spans([column.group for column in columns])]
    start = 0
    for name, count in heads:  # a head may be longer than what stands under it
        room = sum(widths[start : start + count]) + 2 * (count - 1)
        widths[start] += max(0, len(name) - room)
        start += count
    above, start = " " * names, 0
    for name, count in heads:
        above += "  " + name.ljust(sum(widths[start : start + count]) + 2 * (count - 1))
        start += count

    def line(name, texts):
        return f"{name:{names}}" + "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [above] * bool(above.strip()) + [line("", titles)]
    for title, rows in groups:
        lines += [f"{title}:"] if title else []
        lines += [line(row.name, cells[row.name]) for row in rows]
    return [line.rstrip() for line in lines]


def _text_cell(cell, digits):
    if cell is None:
        return f"{NONE} "
    mean, sd = parts(cell, digits)
    return _in_text(mean) + (f" ± {sd}" if sd else "") + ("*" if cell.best else " ")


def _in_text(text):
    return text.replace(MINUS, "-").replace("→", "->")
