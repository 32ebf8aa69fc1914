"""Tables of figures, with their means over seeds and their best cells."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

HEADS = "method", "seeds"


class Selector(NamedTuple):
    """Which records of a result a row shows; columns are read with it."""

    uncertainty: str = ""  # its name; empty: the one that the levels follow
    of_level: str = "recall"  # or bayes_recall, its limit
    probabilities: str = "model"  # entry of a classifier's calibration


class Column(NamedTuple):
    """One figure per row: its name, how to read it from a result (None where there is none) and how to print it."""

    key: str
    group: str
    title: str
    digits: int
    read: Callable | None  # from a result's values and a Selector to the figure; None: the row brings its cells
    best: Callable | None = max  # of the values; None where a value alone says nothing
    among: str = ""  # key of a text column: values are compared among rows where its cells are equal
    note: str = ""  # what the figure is
    published: bool = False  # by others, for comparison
    shown: bool = True  # False: in the CSV alone


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
    """Make a Table of those columns that have a figure in any row, the best ones marked; None where there is none.

    groups: list of (heading, rows). references: rows that stand below the others, and are never the best.
    """
    rows = [row for _, rows in groups for row in rows]
    _mark_best(columns, rows)
    filled = [column for column in columns if any(column.key in row.cells for row in rows)]
    shown = [column for column in filled if column.shown]
    if all(column.published for column in shown):
        return None
    references = [row for row in references if any(column.key in row.cells for column in shown)]
    groups = [group for group in groups if group[1]]
    if references:
        groups.append(("", references))
    return Table(name, title, note, shown, groups, tuple(column for column in filled if not column.shown), heads)


def has_best(table):
    """Whether a cell of the table is marked as the best of its column."""
    return any(cell.best for _, rows in table.groups for row in rows for cell in row.cells.values())


def mean_sd(values):
    """Mean and sample standard deviation of a list of numbers; None for the deviation of a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cells_of(columns, results, selector):
    """The Cells of a row: means over the results of its seeds, each read with the row's Selector."""
    cells = {}
    for column in columns:
        values = [column.read(result, selector) for result in results]
        if all(isinstance(value, str) for value in values):
            cells[column.key] = Cell(None, text=" / ".join(dict.fromkeys(values)))
        elif all(isinstance(value, tuple) for value in values):  # intervals: means of both bounds
            low, high = (number(statistics.fmean(ends), column.digits) for ends in zip(*values, strict=True))
            cells[column.key] = Cell(None, text=f"[{low}, {high}]")
        elif None not in values:
            cells[column.key] = Cell(*mean_sd(values[:1] if column.published else values))
    return cells


def _mark_best(columns, rows):
    """Mark the best cells of each column: all that print like the best, and none where all print alike."""
    for column in columns:
        if not column.best or column.published:
            continue
        compared = defaultdict(list)
        for row in rows:
            if column.key in row.cells and not row.cells[column.key].text:
                compared[row.cells[column.among].text if column.among else ""].append(row.cells)
        for alike in compared.values():
            printed = [float(number(cells[column.key].mean, column.digits)) for cells in alike]
            for cells, value in zip(alike, printed, strict=True):
                best = len(set(printed)) > 1 and value == column.best(printed)
                cells[column.key] = cells[column.key]._replace(best=best)


def number(value, digits):
    """Print a number with so many digits behind the point; what rounds to zero has no sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def parts(cell, digits):
    """What a cell prints: its mean, and its standard deviation or whatever its text has behind ±, or None."""
    if cell.text:
        text, _, spread = cell.text.partition(" ± ")
        return text, spread or None
    return number(cell.mean, digits), None if cell.sd is None else number(cell.sd, digits)


def spans(names):
    """Group equal neighbors for a head that spans columns: list of (name, how many)."""
    return [(name, len(list(group))) for name, group in groupby(names)]
