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


def test_no_figure_is_missing():
    """Every row of a page has its recall, and no page waits for a figure."""
    rows = {row for names, columns in RESULTS["TABLES"].values() for row in names if columns[0].table == "recall"}
    missing = [
        row for row in rows - {*RESULTS["FREE"], *RESULTS["AFTER"]} if ("recall", row, RESULTS["R1"]) not in FIGURES
    ]
    assert not missing
    for page in (HOME / "README.md", *(HOME / "docs").glob("*.md")):
        assert "PLACEHOLDER" not in page.read_text(encoding="utf-8"), page


def test_every_figure_is_of_three_seeds():
    without = {"few words", "long embedding", *RESULTS["FREE"], RESULTS["OPTIMAL"]}  # of no run
    for (_, row, column), figure in FIGURES.items():
        assert figure["seeds"] == "3" or row in without, (row, column)
    assert re.fullmatch(r"[0-9a-f]{7}", COMMIT)


SELECTIVE, TRUTH = "text_to_image_{}_auroc", "{}_spearman"
CLAIMS = [  # page, words of its prose with the figure in braces, and where that stands
    ("README.md", "entropy ({}", "selective", "clip", SELECTIVE.format("entropy")),
    ("README.md", "top probability ({}", "selective", "clip", SELECTIVE.format("probability")),
    ("README.md", "expected R@1 is {}. AUROC", "recall", RESULTS["OPTIMAL"], RESULTS["R1"]),
    ("README.md", "AUROC of {} to", "selective", "asymvlm-psd", SELECTIVE.format("query")),
    ("README.md", "to {} where", "selective", "pfe", SELECTIVE.format("query")),
    ("README.md", "counting words has {}", "selective", "clip, few words", SELECTIVE.format("query")),
]


@pytest.mark.parametrize(("page", "words", "table", "row", "column"), CLAIMS)
def test_a_claim_in_prose_is_the_stored_figure(page, words, table, row, column):
    before, after = (re.escape(part) for part in words.split("{}"))
    text = " ".join((HOME / page).read_text(encoding="utf-8").split())
    (printed,) = set(re.findall(rf"{before}([\d.\N{{MINUS SIGN}}]*\d){after}", text))
    digits = len(printed.partition(".")[2])
    assert float(printed.replace("\N{MINUS SIGN}", "-")) == round(mean(table, row, column), digits)


def test_the_range_of_trained_query_only_uncertainties():
    """README names the lowest and the highest AUROC of the eight that are trained."""
    column = SELECTIVE.format("query")
    trained = {row: mean("selective", row, column) for row in RESULTS["METHODS"] if row not in ("clip", "bayesvlm")}
    assert (min(trained, key=trained.get), max(trained, key=trained.get)) == ("asymvlm-psd", "pfe")


def test_no_recall_differs_from_that_of_clip():
    """README: no R@1 differs beyond the sampling error, so no such difference is marked as significant."""
    gaps = [figure["text"] for key, figure in FIGURES.items() if key[2].endswith("_r1_less")]
    assert gaps and not any("\N{DOUBLE DAGGER}" in gap for gap in gaps)


@pytest.mark.parametrize("method", [name for name in RESULTS["METHODS"] if name != "clip"])
def test_the_yaml_of_a_method_has_the_stored_figures(method):
    text = (HOME / f"configs/methods/{method}.yaml").read_text(encoding="utf-8")
    pattern = (
        r"test split of shapes, three seeds: Spearman with true ambiguity (\S+), AUROC (\S+); words: (\S+), (\S+)\."
    )
    printed = [float(number) for number in re.search(pattern, text).groups()]
    query, words = SELECTIVE.format("query"), "clip, few words"
    stored = [mean("truth", row, TRUTH.format("query")) for row in (method, words)]
    stored += [mean("selective", row, query) for row in (method, words)]
    assert printed == [round(stored[place], 3) for place in (0, 2, 1, 3)]


def test_counting_words_is_no_evidence():
    """What docs/results.md says of minus S R^2: words lead it, above the Bayes-optimal order."""
    column = "text_to_image_minus_s_r2"
    words = mean("uncertainty", "clip, few words", column)
    others = [
        float(figure["mean"]) for key, figure in FIGURES.items() if key[2] == column and key[1] in RESULTS["METHODS"]
    ]
    assert words > max(others) and words > mean("uncertainty", RESULTS["OPTIMAL"], column)
