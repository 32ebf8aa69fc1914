"""The figures in README.md and docs against the stored ones, docs/results.csv: tables, and claims in prose."""

import itertools
import re
import runpy

import pytest
from check_method import SPEARMAN

from reporting.words import RETRIEVAL
from utils.config import HOME, known, load_config

RESULTS = runpy.run_path(str(HOME / "docs" / "make_results.py"))
FIGURES, COMMIT = RESULTS["read"]()
OF_CLASSES, _ = RESULTS["read"](RESULTS["CLASSES"])
TARGET = "shifted-test"  # of active learning


def mean(table, row, column):
    return float((FIGURES | OF_CLASSES)[table, row, column]["mean"])


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
QUERY, OF_QUERY = SELECTIVE.format("query"), TRUTH.format("query")
OBJECTS, COLORS = (f"shapes-{name}+shifted-test classification" for name in ("objects", "colors"))
FEW, PUBLISHED = "docs/few-pairs.md", "configs/methods/README.md"
CLAIMS = [  # page, words of its prose with figures in braces, and where each stands
    ("README.md", "entropy ({})", [("selective", "clip", SELECTIVE.format("entropy"))]),
    ("README.md", "top probability ({})", [("selective", "clip", SELECTIVE.format("probability"))]),
    ("README.md", "words has {}, an untrained `density` of the training pairs {}, and training {} to {}", [
        ("selective", name, QUERY) for name in ("clip, few words", "density", "asymvlm-psd", "pfe")
    ]),
    ("README.md", "expected R@1 is {}", [("recall", RESULTS["OPTIMAL"], RESULTS["R1"])]),
    ("docs/results.md", "Spearman of {} and an AUROC of {}, where trained methods have {} to {}", [
        ("truth", "density", OF_QUERY), *(("selective", name, QUERY) for name in ("density", "asymvlm-psd", "pfe"))
    ]),
    ("docs/results.md", "`bayesvlm` ({}:", [("truth", "bayesvlm", OF_QUERY)]),
    ("docs/results.md", "ProbVLM ({}, {}, {}: with", [
        ("truth", f"{name}+official", OF_QUERY) for name in ("pcmepp", "prolip", "probvlm")
    ]),
    ("docs/results.md", "unified objective ({})", [("truth", "pfe+infonce", OF_QUERY)]),
    ("docs/results.md", "ProLIP have {} and {} with", [(PUBLISHED, "pcmepp_mean", -1), (PUBLISHED, "prolip_mean", -1)]),
    ("docs/results.md", "R@1 {} for plain CLIP, {} with it. `linear` with it has {}", [
        (FEW, row, "R@1") for row in ("clip", "clip, hubs", "linear, hubs")
    ]),
    ("docs/results.md", "AURC falls from {} to {}.", [(FEW, row, "AURC") for row in ("clip", "linear, hubs")]),
    ("docs/results.md", "an AUROC of {}, `density` {}, the best trained method, loss prediction, {},", [
        (FEW, row, "query-only") for row in ("knn", "density", "loss-prediction, frozen")
    ]),
    ("docs/results.md", "AUROC {} for `linear` with hub correction, {} for plain", [
        (FEW, "linear, hubs", "AUROC of the probability"), (FEW, "clip", "of the entropy")
    ]),
    ("docs/bayesvlm.md", "wrong answers on objects ({})", [(OBJECTS, "bayesvlm", "query_auroc")]),
    ("docs/bayesvlm.md", "({} against {} and plain CLIP's {})", [
        (COLORS, "bayesvlm", "query_auroc"), (COLORS, "bayesvlm", "entropy_auroc"), (COLORS, "clip", "entropy_auroc")
    ]),
    ("docs/bayesvlm.md", "upside down ({})", [("truth", "bayesvlm", OF_QUERY)]),
    ("docs/bayesvlm.md", "by {} to {} points", [
        (f"{TARGET} accuracy", name, "accuracy_100_gap") for name in ("entropy-targeted", "epig")
    ]),
    ("docs/footguns.md", "NLPD {} → {} on new", [
        (OBJECTS, row, "nll") for row in ("clip", "clip + temperature of val")
    ]),
    ("docs/footguns.md", "COCO has {} such", [(PUBLISHED, "pcmepp_negatives", -2)]),
    ("docs/footguns.md", "β is then {} whatever", [(PUBLISHED, "probvlm_shape", 0)]),
    (PUBLISHED, "order is {} and ProLIP's {} with", [(PUBLISHED, "pcmepp_mean", -1), (PUBLISHED, "prolip_mean", -1)]),
    (PUBLISHED, "right on `shapes` ({} and {} on `test`", [("truth", name, OF_QUERY) for name in ("pcmepp", "prolip")]),
    (PUBLISHED, "long ones ({})", [("truth", "bayesvlm", OF_QUERY)]),
    ("configs/methods/bayesvlm.yaml", "is {} and {}, its entropy's {} and {} (seed", [
        (world, "bayesvlm", f"{name}_auroc") for name in ("query", "entropy") for world in (OBJECTS, COLORS)
    ]),
    ("configs/methods/clip.yaml", "R@1 {} of {}, image->text {} of {}.", [
        ("recall", row, f"{side}_r1") for side in RETRIEVAL for row in ("clip", RESULTS["OPTIMAL"])
    ]),
    ("configs/backbones/shapes-tiny.yaml", "held out as well: {} ({}), {} ({}).", [
        ("recall", row, f"{side}_r1") for side in RETRIEVAL for row in ("clip", RESULTS["OPTIMAL"])
    ]),
]  # fmt: skip
MINUS = "\N{MINUS SIGN}"
NUMBER = rf"[+{MINUS}]?\d+(?:\.\d+)?"


def number(text):
    """The first number in a text, as pages print it."""
    return float(re.search(NUMBER, text).group().replace(MINUS, "-"))


def stored(table, row, column):
    """A stored figure: in a .csv, or in a row of a page's tables.

    Of `docs/few-pairs.md`, the first table with such a column; of `configs/methods/README.md`, the figure at a
    place among those that a row of benchmarks.published prints.
    """
    if table not in (FEW, PUBLISHED):
        return mean(table, row, column)
    lines = (HOME / table).read_text(encoding="utf-8").splitlines()
    if table == PUBLISHED:
        (line,) = (line for line in lines if f"`{row}`: " in line)
        figures = line.partition(f"`{row}`: ")[2].partition("; on `shapes`")[0].partition(" | ")[0]
        return number(re.findall(rf"(?<![\w=])(?:{NUMBER})(?=[ ,;.%]|$)", figures)[column])
    titles = next([*map(str.strip, line.split("|"))] for line in lines if f"| {column} |" in line)
    line = next(line for line in lines if line.startswith(f"| {row} |"))
    return number(line.split("|")[titles.index(column)])


@pytest.mark.parametrize(("page", "words", "places"), CLAIMS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_claim_in_prose_is_the_stored_figure(page, words, places):
    (match,) = set(
        re.findall(claim(words), " ".join((HOME / page).read_text(encoding="utf-8").replace("\n#", "\n").split()))
    )
    for printed, place in zip([match] if isinstance(match, str) else match, places, strict=True):
        value = stored(*place)
        in_percent = place[0] == "recall" and page.endswith(".yaml")
        assert number(printed) == round(value / 100 if in_percent else value, len(printed.partition(".")[2])), place


def claim(words):
    """The pattern of a claim's words and figures."""
    return re.escape(words).replace(r"\{\}", f"({NUMBER})")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/bayesvlm.md"])
def test_every_figure_in_prose_is_claimed(page):
    """Outside of tables, code and links, a number with decimals is a claim above, or one of these."""
    excused = ["less than 0.2 points", "Python 3.10", "3.9 million", "p < 0.05", "0.02 and 0.01 are left"]  # see below
    text = (HOME / page).read_text(encoding="utf-8")
    text = " ".join(re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE).split())
    for pattern in [*map(re.escape, excused), *(claim(words) for name, words, _ in CLAIMS if name == page)]:
        text = re.sub(pattern, "", text)
    assert not re.findall(r"\d+\.\d+", re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+", "", text))


def test_what_a_temperature_leaves_of_bayesvlm():
    """docs/bayesvlm.md: where both have a temperature of their own, 0.02 and 0.01 are left."""
    left = [
        mean(world, "clip + temperature", "nll") - mean(world, "bayesvlm + temperature", "nll")
        for world in (OBJECTS, COLORS)
    ]
    assert [round(gap, 2) for gap in left] == [0.02, 0.01]


def table_of(page, head):
    """The rows of the first table of a page whose head has these words: list of lists of cells."""
    lines = iter((HOME / page).read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith("|") and head in line)
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows][1:]


WORLDS = ["shapes-objects", "shapes-objects+shifted-test", "shapes-colors", "shapes-colors+shifted-test"]


def test_the_page_of_bayesvlm_has_the_stored_figures():
    names = {"plain CLIP": "clip", "BayesVLM": "bayesvlm", "its matched temperature": "bayesvlm + matched temperature"}
    names |= {f"{name} with its own temperature": f"{row} + temperature" for name, row in [*names.items()][:2]}
    names["plain CLIP, temperature of 500 familiar images"] = "clip + temperature of val"
    columns = {"accuracy, %": "acc", "NLPD": "nll", "AUROC of its entropy": "entropy_auroc"}
    columns |= {"AUROC of the image's own uncertainty": "query_auroc", "AUROC of its top probability": "query_auroc"}
    for title, *cells in table_of("docs/bayesvlm.md", "objects, familiar"):
        name, _, figure = title.partition(": ")
        row, column = names[name], columns[figure or "NLPD"]
        row += ", top probability" * figure.endswith("top probability")
        for world, text in zip([*WORLDS[:2], WORLDS[3]], cells, strict=True):
            check(text, f"{world} classification", row, column)


def check(text, table, row, column):
    """Assert that a cell is a stored figure with its interval, or a dash where there is none."""
    stored_figures = FIGURES | OF_CLASSES
    if text == "\N{EN DASH}":
        assert (table, row, column) not in stored_figures
        return
    printed, _, interval = text.partition(" ")
    assert number(printed) == round(mean(table, row, column), len(printed.partition(".")[2])), (table, row, column)
    assert not interval or interval == stored_figures[table, row, f"{column}_interval"]["text"]


def test_the_benchmarks_of_bayesvlm_are_the_stored_figures():
    of = {"diagonal": "bayesvlm", "`--preset reference`": "bayesvlm+reference"}
    of |= {name: f"bayesvlm+{name}" for name in ("kronecker", "tangent", "reference")}
    method = "clip"
    for title, *cells in table_of("benchmarks/RESULTS.md", "objects, test | objects, shifted"):
        kind = title.removeprefix("MAP, ").removeprefix("BayesVLM, ")
        method = "clip" if title.startswith("MAP") else of.get(kind, method)
        kind = {"temperature of the other half": "temperature", "its matched temperature": "matched temperature"}.get(
            kind, kind
        )
        row = f"{method} + {kind}" if kind.startswith(("temp", "match")) else method
        for world, text in zip(WORLDS, cells, strict=True):
            for part, column in zip(text.split(" / "), ("nll", "ece_15"), strict=text != "\N{EN DASH}"):
                check(part, f"{world} classification", row, column)
    for title, *cells in table_of("benchmarks/RESULTS.md", "| NLPD less that of |"):
        name, base = title.split(": ")
        row = f"{of[name]} less {'clip' if base == 'MAP' else 'its matched temperature'}"
        texts = [OF_CLASSES["4 data sets differences_nll", row, f"{world}_nll_gap"]["text"] for world in WORLDS]
        assert cells == texts
    for title, *cells in table_of("benchmarks/RESULTS.md", "| | objects, shifted | colors, shifted |"):
        row, column = {"the image's own uncertainty": ("bayesvlm", "query"), "entropy": ("bayesvlm", "entropy")}.get(
            re.sub("bayesvlm[:,] ", "", title), (title, "query")
        )
        for world, text in zip(WORLDS[1::2], cells, strict=True):
            check(text, f"{world} classification", row, f"{column}_auroc")


def test_the_benchmarks_of_active_learning_are_the_stored_figures():
    for strategy, *cells in table_of("benchmarks/RESULTS.md", "| minus random, 20 seeds |"):
        texts = [
            OF_CLASSES[f"{TARGET} {figure}", strategy, f"{figure}_{budget}_gap"]["text"]
            for figure in ("accuracy", "nll", "ece")
            for budget in (50, 100)
        ]
        assert cells == texts


def test_an_order_is_claimed_only_where_it_holds_on_test():
    """`ordered: true` in a method's YAML: a Spearman with true ambiguity as tests.check_method asks of it."""
    claimed = [name for name in known("methods") if load_config("shapes", name).ordered]
    assert claimed and all(mean("truth", name, OF_QUERY) >= SPEARMAN for name in claimed)


def test_the_range_of_trained_query_only_uncertainties():
    """README names the lowest and the highest AUROC of the eight that are trained."""
    column = SELECTIVE.format("query")
    others = {"clip", "linear", "bayesvlm", *RESULTS["UNTRAINED"]}
    trained = {row: mean("selective", row, column) for row in RESULTS["METHODS"] if row not in others}
    assert (min(trained, key=trained.get), max(trained, key=trained.get)) == ("asymvlm-psd", "pfe")


def test_no_recall_differs_from_that_of_clip():
    """README: no R@1 differs beyond the sampling error, so no such difference is marked as significant."""
    gaps = [figure["text"] for key, figure in FIGURES.items() if key[2].endswith("_r1_less")]
    assert gaps and not any("\N{DOUBLE DAGGER}" in gap for gap in gaps)


@pytest.mark.parametrize("method", [name for name in RESULTS["METHODS"] if name not in ("clip", "linear")])
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
