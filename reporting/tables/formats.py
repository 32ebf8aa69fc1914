"""Tables as Markdown, LaTeX, CSV and plain text."""

import csv
import io
import math
import re
import textwrap
from itertools import groupby
from urllib.parse import quote

from reporting.tables import has_best, parts, spans
from reporting.words import MINUS, NONE, plain

# Tables that are too long for a terminal.
LONG = ("levels", "selective", "calibration", "across_auroc", "across_query", "across_aurc")
TERMINAL, PAPER = 128, 104  # characters of a line, the latter in small type on a page's 5.5 inches of text


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
        count = math.ceil(sum(widths) / max(room, *widths))  # panels that the group needs
        size = math.ceil(len(group) / count)
        for start in range(0, len(group), size):
            wide = sum(widths[start : start + size])
            if not split or used + wide > room or count > 1:
                split, used = [*split, []], 0
            split[-1] += group[start : start + size]
            used += wide
    return split


def _groups_of(table, columns):
    """The groups of a table, without the reference rows that have no figure in these columns."""
    keys = {column.key for column in columns}
    kept = [(title, [row for row in rows if row.folder or keys & set(row.cells)]) for title, rows in table.groups]
    return [(title, rows) for title, rows in kept if rows]


def to_markdown(report):
    """The parts of a report as Markdown tables under headings; a row's name links to the folder of its results."""
    return "\n".join(_markdown_part(part) for part in report)


def _markdown_part(part):
    best = ", best in bold" if any(map(has_best, part.tables)) else ""
    heading = f"## {_in_markdown(part.title)}\n\nNumbers: {part.summary}{best}.\n"
    return "\n".join([heading, *(_markdown_table(table) for table in part.tables)])


def _markdown_table(table):
    lines = [f"### {_in_markdown(table.title)}", ""]
    if table.note:
        lines += [_in_markdown(table.note), ""]
    # No head spans columns in Markdown: a title repeats the head that stands above it elsewhere.
    titles = [", ".join(filter(None, [column.title, column.group])) for column in table.columns]
    heads = [_in_markdown(head) for head in (*table.heads, *titles)]
    cells = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for title, rows in table.groups:
        if title:
            cells.append([f"*{title}*", *[""] * (len(heads) - 1)])
        cells += [_markdown_line(row, table.columns) for row in rows]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    titles_of = {}
    for column in table.columns:
        if column.note:
            titles_of.setdefault(column.note, []).append(noted(column))
    if titles_of:
        lines.append("")
    for note, titles in titles_of.items():
        lines.append(f"- {_in_markdown(', '.join(dict.fromkeys(titles)))}: {_in_markdown(note)}.")
    return "".join(f"{line}\n" for line in lines)


def noted(column):
    """The title that a column's note explains: published columns have one note for each source."""
    return column.group.partition(", ")[0] if column.published else column.title


def _markdown_line(row, columns):
    name = _in_markdown(row.name)
    link = re.sub("[<>]", lambda mark: quote(mark[0]), row.folder.as_posix()) if row.folder else ""
    name = f"[{name}](<{link}>)" if link else f"*{name}*"
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


def to_latex(report):
    r"""The parts of a report as LaTeX table floats that fit 5.5 inches of text; needs \usepackage{booktabs}."""
    floats = []
    for part in report:
        for table in part.tables:
            split = panels(table, PAPER)
            for number, columns in enumerate(split, 1):
                which = f" ({number} of {len(split)})" if len(split) > 1 else ""
                floats.append(_latex_table(part, table, which, columns))
    return "\n".join(floats)


def _latex_table(part, table, which, columns):
    best = ", best in bold" if has_best(table) else ""
    caption = f"{table.title}{which}. {part.title}, {part.summary}{best}. {table.note}".strip()
    caption = _in_latex(caption).replace("s.d. ", r"s.d.\ ")
    lines = [r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
    lines += [rf"\caption{{{caption}}}", r"\smallskip", _latex_panel(table, columns), r"\end{table}", ""]
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
        if title:
            lines.append(_latex_line([rf"\multicolumn{{{1 + len(columns)}}}{{@{{}}l}}{{\emph{{{title}}}}}"]))
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


def to_csv(report):
    """The parts of a report as one CSV in long form: a line per figure, in full precision, hidden columns included."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for part in report:
        for table in part.tables:
            place = part.evaluated_on, part.backbone, part.task, table.name
            for row in (row for _, rows in table.groups for row in rows):
                for column in (*table.columns, *table.hidden):
                    if column.key in row.cells:
                        cell = row.cells[column.key]
                        names = map(_in_csv, (*place, row.name, row.variant, str(row.seeds or ""), column.key))
                        writer.writerow([*names, cell.mean, cell.sd, cell.text, int(column.published)])
    return file.getvalue()


def _in_csv(name):
    """A name, of data or flags, that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in tuple("=+-@\t\r") else name


def to_text(report):
    """The parts of a report as plain text for a terminal: the shorter tables, a star at the best."""
    return "\n\n\n".join(_text_part(part) for part in report)


def _text_part(part):
    best = ", * best" if any(map(has_best, part.tables)) else ""
    lines = [f"{part.title}: {part.summary}{best}"]
    for table in part.tables:
        if table.name in LONG:
            continue
        lines += ["", f"[{table.name}] {plain(table.title)}", *map(plain, _wrapped(table.note))]
        for i, columns in enumerate(panels(table, TERMINAL)):
            lines += ([""] if i else []) + _text_panel(table, columns)
    long = [table.title for table in part.tables if table.name in LONG]
    if long:
        lines += ["", plain(f"Only in the files: {'; '.join(long)}.")]
    return "\n".join(lines)


def _wrapped(note):
    return textwrap.wrap(note, TERMINAL) if note else []


def _text_panel(table, columns):
    groups = _groups_of(table, columns)
    cells = {
        row.name: [_text_cell(row.cells.get(column.key), column.digits) for column in columns]
        for _, rows in groups
        for row in rows
    }
    titles = [plain(f"{column.title} ") for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *cells.values(), strict=True)]
    names = max(map(len, cells))
    heads = [(plain(name), count) for name, count in spans([column.group for column in columns])]
    start = 0
    for name, count in heads:  # a head may be longer than the columns under it
        room = sum(widths[start : start + count]) + 2 * (count - 1)
        widths[start] += max(0, len(name) - room)
        start += count
    above, start = " " * names, 0
    for name, count in heads:
        above += "  " + name.ljust(sum(widths[start : start + count]) + 2 * (count - 1))
        start += count

    def line(name, texts):
        return f"{name:{names}}" + "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [above, line("", titles)] if above.strip() else [line("", titles)]
    for title, rows in groups:
        if title:
            lines.append(f"{title}:")
        lines += [line(row.name, cells[row.name]) for row in rows]
    return [line.rstrip() for line in lines]


def _text_cell(cell, digits):
    if cell is None:
        return f"{NONE} "
    mean, sd = parts(cell, digits)
    return plain(mean) + (f" ± {sd}" if sd else "") + ("*" if cell.best else " ")
