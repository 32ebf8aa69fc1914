"""A new figure and a new kind of part appear in the files and the page of a report once they are registered."""

import csv
import html
import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from studies import write_trace

import report
from reporting import tables, traces
from reporting.figures import style
from reporting.parts import Part


@pytest.fixture(autouse=True)
def registered(monkeypatch, blank_figures):
    """A copy of the list of figures, all of them blank, so that a test's figures end with it."""
    figures = {task: list(drawings) for task, drawings in style.REGISTERED.items()}
    monkeypatch.setattr(style, "REGISTERED", figures)


def write_report(folder):
    """Report the data set `shapes` under a folder of results: the names of the files, and the text of the page."""
    report.main(["--dataset", "shapes", "--results", str(folder), "--quiet"])
    files = {path.name for path in (folder / "shapes").iterdir() if path.is_file()}
    return files, html.unescape((folder / "shapes/report.html").read_text(encoding="utf-8"))


def bar(value, width):
    """A figure of one bar."""
    figure = Figure(figsize=(width, 2))
    figure.add_subplot(xlabel="Run", ylabel="Value").bar(["one"], [value])
    return figure


def test_a_registered_figure_is_in_files_and_page(tmp_path):
    @style.figure([traces.Trace.task], "Number of trials", "One bar: the trials of the trace.")
    def number_of_trials(trace, looks, width=style.WIDE):
        return bar(trace.values["trials"], width)

    write_trace(tmp_path)
    files, page = write_report(tmp_path)
    assert {"number_of_trials.png", "number_of_trials.pdf", "factor_trace.png"} <= files
    [part] = traces.read(tmp_path / "shapes")
    assert page.count(f'aria-label="Number of trials, {part.title}"') == 2  # for wide and for narrow screens
    assert page.count("<figcaption>One bar: the trials of the trace.</figcaption>") == 1


def test_a_figure_without_data_is_left_out(tmp_path):
    @style.figure([traces.Trace.task], "Nothing", "Nothing to draw.")
    def nothing(trace, looks, width=style.WIDE):
        return None

    write_trace(tmp_path)
    files, page = write_report(tmp_path)
    assert not any(name.startswith("nothing") for name in files) and "Nothing to draw." not in page


class Speed(Part):
    """Seconds per image of one backbone."""

    task = "speed"
    evaluated_on = "shapes"
    summary = "one run"
    warnings = ("Measured on a shared machine.",)

    def __init__(self, folder, seconds):
        self.backbone, self.title, self.seconds = folder.name, f"shapes, {folder.name}: speed", seconds
        column = tables.Column("seconds", "", "seconds per image", 2, None, None)
        row = tables.Row("encode", folder, 1, {"seconds": tables.Cell(seconds)})
        self.tables = [tables.make("speed", "Seconds per image", [column], [("", [row])])]
        self.files = {"encode": [("speed.json", folder / "speed.json")]}


def paths(folder):
    return sorted(folder.glob("*/speed.json"))


def read(folder, backbone=None):
    chosen = [path for path in paths(folder) if backbone in (None, path.parent.name)]
    return [Speed(path.parent.relative_to(folder), json.loads(path.read_text())["seconds"]) for path in chosen]


def test_a_new_kind_of_part_needs_an_entry_in_kinds_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "KINDS", (*report.KINDS, SimpleNamespace(paths=paths, read=read)))

    @style.figure([Speed.task], "Speed", "One bar: seconds per image.")
    def speed(part, looks, width=style.WIDE):
        return bar(part.seconds, width)

    path = tmp_path / "shapes/huge/speed.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"seconds": 0.25}')
    write_trace(tmp_path)
    files, page = write_report(tmp_path)
    assert {"speed.png", "speed.pdf", "factor_trace.png"} <= files
    assert "shapes, huge: speed</h2>" in page
    assert page.count("<figcaption>One bar: seconds per image.</figcaption>") == 1
    assert '<p class="warning">Measured on a shared machine.</p>' in page and 'href="huge/speed.json"' in page
    folder = tmp_path / "shapes"
    assert "| [encode](<huge>) | 1 | 0.25 |" in (folder / "table.md").read_text(encoding="utf-8")
    assert "encode & $0.25$" in (folder / "table.tex").read_text(encoding="utf-8")
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["task"] == "speed"]
    assert [(line["backbone"], line["row"], float(line["mean"])) for line in lines] == [("huge", "encode", 0.25)]

    capsys.readouterr()
    report.main(["--dataset", "shapes", "--results", str(tmp_path), "--backbone", "huge"])
    printed = capsys.readouterr().out
    assert "shapes, huge: speed: one run" in printed and "tiny" not in printed
    (folder / "tiny/factor-trace.json").unlink()
    assert write_report(tmp_path)[0] == {"report.html", "table.md", "table.tex", "table.csv", "speed.png", "speed.pdf"}
