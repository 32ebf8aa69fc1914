"""The figures in README.md and docs against the stored ones, docs/results.csv: tables, and claims in prose."""

import re
import runpy

import pytest

from utils.config import HOME

RESULTS = runpy.run_path(str(HOME / "docs" / "make_results.py"))
FIGURES, COMMIT = RESULTS["read"]()


def mean(table, row, column):
    return float(FIGURES[table, row, column]["mean"])


def test_tables_are_fresh():
    for path, text in RESULTS["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: run `python docs/make_results.py`"


def test_every_figure_is_of_three_seeds():
    free = {name.removeprefix("clip, ") for name in RESULTS["STAND_INS"]} | {*RESULTS["STAND_INS"], RESULTS["OPTIMAL"]}
    for (table, row, column), figure in FIGURES.items():
        assert figure["seeds"] == ("" if row in free else "3") or table == "gains", (row, column)
    assert re.fullmatch(r"[0-9a-f]{7}", COMMIT)


def claims():
    """Claims in prose that pages mark: <!-- claim: FIGURE = table / row / column, digits --> behind the sentence."""
    for page in (HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"<!-- (\S+) = ([^/]+) / ([^/]+) / (\w+) -->", text):
            before = text[: match.start()].rpartition("\n\n")[2]
            yield pytest.param(before, *match.groups(), id=f"{page.name}-{match[2]}-{match[3]}-{match[4]}")


@pytest.mark.parametrize(("paragraph", "printed", "table", "row", "column"), claims())
def test_a_claim_is_the_stored_figure(paragraph, printed, table, row, column):
    """The figure stands in the paragraph before its mark, and is the stored one at the digits printed."""
    assert printed in paragraph
    digits = len(printed.partition(".")[2])
    value = float(printed.replace("\N{MINUS SIGN}", "-"))
    assert value == round(mean(table, row, column), digits)


def test_counting_words_is_no_evidence():
    """What docs/results.md says of minus S R^2: words lead it, above the Bayes-optimal order."""
    column = "text_to_image_minus_s_r2"
    words = mean("uncertainty", "clip, few words", column)
    others = [
        float(figure["mean"]) for key, figure in FIGURES.items() if key[2] == column and key[1] in RESULTS["METHODS"]
    ]
    assert words > max(others) and words > mean("uncertainty", RESULTS["OPTIMAL"], column)
