"""report.py on a small synthetic folder of results: numbers against hand computation, and the page as it is read."""

import csv
import html.parser
import io
import json
import math
import statistics
import urllib.parse

import numpy as np
import PIL.Image
import pytest

import report
from utils import plots, tables

LEVELS = 4
RECALLS = {"clip": (0.25, 0.30, 0.20), "pfe": (0.10, 0.40, 0.25), "a_b+50%": (0.30,)}
UNCERTAIN = {"pfe": (-0.8, -0.9, -1.0), "a_b+50%": (-0.2,)}  # S of each seed
CONFIDENT = {"auroc": 0.625, "gallery_aware": {"top": 0.5, "margin": 0.875, "entropy": 0.75, "probability": 0.25}}
ALL_CONFIDENT = {"text_to_image": CONFIDENT, "image_to_text": CONFIDENT | {"levels_by": "retrieved caption"}}
SCRIPT = "<script>alert(1)</script>"


def direction(recall, s, truth):
    part = {"recall": {"1": recall, "5": 0.5, "10": 0.75}}
    if truth:
        part["bayes_recall"] = 0.5
    if s is not None:
        limit = {"bayes_recall": 0.5} if truth else {}
        levels = [{"count": 25, "recall": {"1": recall / level}} | limit for level in range(1, LEVELS + 1)]
        part |= {"levels_by": "query caption", "levels": levels, "s": s, "r2": 0.5, "minus_s_r2": -0.5 * s}
    return part


def write(folder, variant, seed, recall, s=None, truth=True, image="gone.png", parts=None, **changes):
    """Write one result. parts: what is added to its directions. changes: values of the result that are other ones."""
    objective = "infonce" if "infonce" in variant.split("+") else "native"
    config = {"backbone": "tiny", "seed": seed, "objective": objective, "score": "similarity", "model": {}, "optim": {}}
    result = {"evaluated_on": "shapes", "uncer_levels": LEVELS, "images": 20, "captions": 100, "fingerprint": "f"}
    result |= {"variant": variant, "config": config | {"train": {"batch_size": 8, "epochs": 2}}}
    result |= {"text_to_image": direction(recall, s, truth), "image_to_text": direction(0.5, None, truth)}
    path = folder / "shapes" / "tiny" / variant / f"seed{seed}" / "shapes-retrieval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if truth:
        result["bayes_optimal"] = {"levels": [1.0, 0.5, 0.25, 0.1], "s": -1.0, "r2": 0.9, "minus_s_r2": 0.9}
    if s is not None:
        card = {"caption": f"{SCRIPT} {variant}", "image": str(image), "uncertainty": 0.1, "hit": 0.5}
        result["examples"] = {"most_certain": [card], "least_certain": [card | {"image": "gone.png", "hit": 0.0}]}
        if truth:
            result["text_to_image"]["spearman_ambiguity"] = 0.75
        ambiguity = np.log(np.arange(1, 101))
        np.savez_compressed(path.with_suffix(".npz"), ambiguity=ambiguity, text_uncertainty=np.linspace(1, 20, 100))
    for name, part in (parts or {}).items():
        result[name] |= part
    path.write_text(json.dumps(result | changes))
    return path


def both_scores(ranking, other):
    """What a result holds that was evaluated by both scores: `ranking` ranked, and the R@1 of the other is `other`."""
    name = {"similarity": "log_likelihood", "log_likelihood": "similarity"}[ranking]
    part = direction(other, None, True) | {"gallery_aware": {"top": 0.25, "margin": 0.375, "entropy": 0.125}}
    return {"score": ranking, "other_score": {"score": name, "text_to_image": part, "image_to_text": part}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of three variants: clip without an uncertainty, and one with a single seed and a name full of traps."""
    folder = tmp_path_factory.mktemp("results")
    PIL.Image.new("RGB", (300, 200), "red").save(folder / "picture.png")
    for variant, recalls in RECALLS.items():
        for seed, recall in enumerate(recalls):
            s = UNCERTAIN[variant][seed] if variant in UNCERTAIN else None
            write(folder, variant, seed, recall, s, image=folder / "picture.png")
    report.main(["--dataset", "shapes", "--results", str(folder), "--quiet"])
    return folder


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A report of clip and of four methods by either objective: one variant more than there are colors."""
    folder = tmp_path_factory.mktemp("crowd")
    write(folder, "clip", 0, 0.25)
    for i in range(4):
        for variant in (f"method{i}", f"method{i}+infonce"):
            both = both_scores("log_likelihood", 0.2)
            write(folder, variant, 0, 0.3 + i / 100, -0.5, parts=ALL_CONFIDENT, **both)
    report.main(["--dataset", "shapes", "--results", str(folder), "--quiet"])
    return folder


@pytest.fixture
def block(folder):
    return report.read(folder / "shapes")[0]


def text_of(folder, name):
    return (folder / "shapes" / name).read_text(encoding="utf-8")


def fails(folder, capsys, *more):
    """Run the script, and return the one sentence with which it ends."""
    with pytest.raises(SystemExit) as error:
        report.main(["--dataset", "shapes", "--results", str(folder), *more])
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    return said


def test_mean_and_deviation_are_those_over_seeds(block):
    rows = {row.name: row for row in block.rows}
    assert list(rows) == ["clip", "a_b+50%", "pfe"]  # without an uncertainty first, then by name
    cell = rows["pfe"].cells["text_to_image_r1_percent"]
    assert cell.mean == pytest.approx(25) and cell.sd == pytest.approx(15)  # of 10, 40, 25
    assert rows["pfe"].cells["text_to_image_r1_percent_of_limit"].mean == pytest.approx(50)
    assert rows["a_b+50%"].cells["text_to_image_r1_percent"].sd is None
    assert [row.seeds for row in block.rows] == [3, 1, 3] and block.summary == "mean ± s.d. over 1 to 3 seeds"


def test_best_is_the_highest_but_the_lowest_s_and_every_tie(block):
    def best(key):
        return {row.name for row in block.rows if key in row.cells and row.cells[key].best}

    assert best("text_to_image_r1_percent") == {"a_b+50%"}
    assert best("s") == {"pfe"} and best("minus_s_r2") == {"pfe"}
    assert best("r2") == set() and best("image_to_text_r1_percent") == set(RECALLS)
    assert block.reference.name == "Bayes-optimal" and not any(cell.best for cell in block.reference.cells.values())


def test_alone_nothing_is_best(tmp_path):
    write(tmp_path, "pfe", 0, 0.3, -0.5)
    block = report.read(tmp_path / "shapes")[0]
    assert not any(cell.best for cell in block.rows[0].cells.values()) and block.summary == "one seed"


def test_what_prints_alike_ties(tmp_path):
    for variant, recall in (("a", 0.3), ("b", 0.3004), ("c", 0.299)):
        write(tmp_path, variant, 0, recall)
    rows = report.read(tmp_path / "shapes")[0].rows
    assert [row.cells["text_to_image_r1_percent"].best for row in rows] == [True, True, False]


@pytest.mark.parametrize(("value", "text"), [(-0.0, "0.0"), (-0.04, "0.0"), (-0.06, "-0.1"), (12.25, "12.2")])
def test_zero_has_no_sign(value, text):
    assert tables.number(value, 1) == text


def markdown_tables(folder):
    """The tables of a report in Markdown: each a list of lines, which all have as many cells."""
    found = [part.strip().splitlines() for part in text_of(folder, "table.md").split("\n\n") if part.startswith("|")]
    assert all(len({line.replace("\\|", "").count("|") for line in lines}) == 1 for lines in found)
    return found


def test_markdown(folder):
    recall, uncertainty = markdown_tables(folder)
    clip, trap, _, limit = recall[2:]
    assert clip.startswith("| [clip](<tiny/clip>) | 3 | 25.0 ± 5.0 |")
    assert limit.startswith(f"| *Bayes-optimal* |  | 50.0 {f'| {tables.NONE} ' * 3}|") and "**" not in limit
    assert "a\\_b+50%" in trap and "(<tiny/a_b+50%>)" in trap
    clip, _, pfe, limit = uncertainty[2:]
    assert clip == f"| [clip](<tiny/clip>) | 3 {f'| {tables.NONE} ' * 4}|"
    assert "| **-0.900** ± 0.100 | 0.500 ± 0.000 | **0.450** ± 0.050 | **0.750** ± 0.000 |" in pfe
    assert "**" not in limit


def test_latex_escapes_and_balances(folder):
    text = text_of(folder, "table.tex")
    assert r"a\_b+50\% & $\mathbf{30.0}$ &" in text and r"$25.0 {\scriptstyle\pm 15.0}$" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{table}") == 2 and text.isascii()
    for panel in text.split(r"\begin{tabular}{@{}l")[1:]:
        columns = panel.index("@{}}")
        lines = [line for line in panel.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert {line.replace(r"\&", "").count("&") for line in lines} == {columns}
    assert tables._in_latex(r"\~^{$&#") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\{\$\&\#"


def test_csv_holds_the_exact_numbers(folder):
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(text_of(folder, "table.csv")))}
    for variant, recalls in RECALLS.items():
        percent = [100 * recall for recall in recalls]
        assert float(rows[variant]["text_to_image_r1_percent_mean"]) == statistics.fmean(percent)
        sd = rows[variant]["text_to_image_r1_percent_sd"]
        assert float(sd) == statistics.stdev(percent) if len(recalls) > 1 else sd == ""
    assert rows["clip"]["s_mean"] == rows["clip"]["s_sd"] == rows["Bayes-optimal"]["seeds"] == ""
    assert float(rows["pfe"]["s_mean"]) == statistics.fmean(UNCERTAIN["pfe"])


def test_terminal_shows_an_aligned_table(block):
    said = tables.to_text([block])
    row = next(line for line in said.splitlines() if line.startswith("pfe") and "25.0" in line)
    head = next(line for line in said.splitlines() if "R@1" in line)
    assert row.index("25.0 ± 15.0") + len("25.0 ± 15.0") == head.index("R@1") + len("R@1")
    assert "-0.900 ± 0.100*" in said and max(map(len, said.splitlines())) <= 120
    said.encode("cp1252")  # a Windows terminal prints it


def test_either_score_fills_the_column_of_its_name(tmp_path):
    write(tmp_path, "cosine", 0, 0.3, **both_scores("similarity", 0.4))
    write(tmp_path, "likelihood", 0, 0.3, **both_scores("log_likelihood", 0.4))
    write(tmp_path, "one", 0, 0.3, score="similarity")
    write(tmp_path, "seeds", 0, 0.3, **both_scores("similarity", 0.4))
    write(tmp_path, "seeds", 1, 0.3)
    block = report.read(tmp_path / "shapes")[0]
    cells = {row.name: row.cells for row in block.every_row}
    keys = ["text_to_image_r1_percent_by_cosine", "text_to_image_r1_percent_by_likelihood"]
    assert [column.key for column in block.panels[-1]] == keys
    assert [cells["cosine"][key].mean for key in keys] == pytest.approx([30, 40])
    assert [cells["likelihood"][key].mean for key in keys] == pytest.approx([40, 30])
    assert [cells["cosine"][key].best for key in keys] == [False, True]
    assert [cells["Bayes-optimal"][key].mean for key in keys] == pytest.approx([50, 50])
    assert not any(key in cells[name] for key in keys for name in ("one", "seeds"))  # of no or of one seed only


def test_aurocs_of_captions_are_shown_and_of_images_kept_for_the_csv(tmp_path):
    write(tmp_path, "clip", 0, 0.3, parts={"text_to_image": {"gallery_aware": CONFIDENT["gallery_aware"]}})
    write(tmp_path, "asymmetric", 0, 0.3, -0.5, parts=ALL_CONFIDENT)
    parts = ALL_CONFIDENT | {"image_to_text": CONFIDENT | {"levels_by": "query image"}}
    write(tmp_path, "symmetric", 0, 0.3, -0.5, parts=parts)
    write(tmp_path, "old", 0, 0.3, -0.5)
    report.main(["--dataset", "shapes", "--results", str(tmp_path), "--quiet"])
    block = report.read(tmp_path / "shapes")[0]
    assert [column.title for column in block.panels[-1]] == ["query-only", "top score", "margin", "entropy"]
    last = {line[2:12]: line for line in markdown_tables(tmp_path)[-1]}
    assert last["method | s"] == (
        "| method | seeds | AUROC, query-only | AUROC, top score | AUROC, margin | AUROC, entropy |"
    )
    assert last["[clip](<ti"].endswith(f"| 1 | {tables.NONE} | **0.500** | **0.875** | **0.750** |")
    assert last["[asymmetri"].endswith("| 1 | **0.625** | **0.500** | **0.875** | **0.750** |")
    assert last["[old](<tin"].endswith(f"| 1 {f'| {tables.NONE} ' * 4}|")
    assert not any("Bayes" in line for line in last.values())  # the best method's confidence is not known
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(text_of(tmp_path, "table.csv")))}
    assert {row["image_to_text_auroc_margin_mean"] for row in rows.values()} == {"0.875", ""}
    assert rows["clip"]["text_to_image_auroc_probability_mean"] == "0.25"
    # The uncertainty of what was retrieved is not known from the query alone.
    query_only = {name: row["image_to_text_auroc_query_only_mean"] for name, row in rows.items()}
    assert [name for name, value in query_only.items() if value] == ["symmetric"]


def test_where_all_answers_are_wrong_there_is_no_auroc(tmp_path):
    nothing = {"auroc": None, "gallery_aware": {"top": None, "margin": None, "entropy": None}}
    path = write(tmp_path, "lost", 0, 0.0, -0.5, parts={"text_to_image": nothing})
    block = report.read(tmp_path / "shapes")[0]
    assert tables.AUROC not in {column.group for column in block.columns}
    assert "gallery-aware: top score -, margin -, entropy -" in tables.levels_table(json.loads(path.read_text()))


def test_results_of_before_aurocs_have_no_such_columns(folder, block):
    assert {column.group for column in block.columns} == {tables.TO_IMAGE, tables.TO_TEXT, tables.UNCERTAINTY}
    assert not any("AUROC" in text_of(folder, f"table.{suffix}") for suffix in ("md", "tex"))


def test_one_result_in_the_terminal(tmp_path):
    both = both_scores("log_likelihood", 0.4)
    path = write(tmp_path, "pfe", 0, 0.3, -0.5, parts=ALL_CONFIDENT, **both)
    lines = tables.levels_table(json.loads(path.read_text())).splitlines()
    assert lines[0] == "pfe on shapes (20 images, 100 captions), ranked by likelihood"
    assert "    AUROC of the right answer, query-only: 0.625" in lines
    assert "    AUROC of the right answer, uncertainty of the retrieved caption: 0.625" in lines
    gallery_aware = "    AUROC of the right answer, gallery-aware: top score 0.500, margin 0.875, entropy 0.750"
    assert lines.count(gallery_aware) == 2 and max(map(len, lines)) <= 120
    other = "gallery-aware: top score 0.250, margin 0.375, entropy 0.125"
    assert lines.count(f"    by cosine  R@1  40.0  R@5  50.0  R@10  75.0  AUROC, {other}") == 2
    for old in (write(tmp_path, "pfe", 0, 0.3, -0.5), write(tmp_path, "clip", 0, 0.3)):
        said = tables.levels_table(json.loads(old.read_text()))
        assert not any(word in said for word in ("AUROC", "cosine", "ranked"))


def test_rows_of_the_unified_objective_stand_apart_below(crowd):
    block = report.read(crowd / "shapes")[0]
    native, unified = ["clip", *(f"method{i}" for i in range(4))], [f"method{i}+infonce" for i in range(4)]
    assert [(title, [row.name for row in rows]) for title, rows in block.groups] == [
        ("", native),
        (tables.UNIFIED, unified),
    ]
    # The best is the best of all.
    assert [row.name for row in block.rows if row.cells["text_to_image_r1_percent"].best] == [native[-1], unified[-1]]

    found = markdown_tables(crowd)
    assert len(found) == 3
    for lines in found:
        at = lines.index(next(line for line in lines if line.startswith(f"| *{tables.UNIFIED}* |")))
        assert "[method3]" in lines[at - 1] and "[method0+infonce]" in lines[at + 1]
    assert ["Bayes" in lines[-1] for lines in found] == [True, True, True]

    said = tables.to_text([block]).splitlines()
    above = [i for i, line in enumerate(said) if line == f"{tables.UNIFIED}:"]
    assert len(above) == 3 and all(said[i + 1].startswith("method0+infonce ") for i in above)
    assert max(map(len, said)) <= 120

    for table in text_of(crowd, "table.tex").split(r"\begin{tabular}")[1:]:
        lines = table.splitlines()
        at = next(i for i, line in enumerate(lines) if tables.UNIFIED in line)
        assert lines[at - 1] == r"\midrule" and lines[at - 2].startswith("method3 &")
        assert lines[at].endswith(rf"{{\emph{{{tables.UNIFIED}}}}} \\")
        assert lines[at + 1].startswith("method0+infonce &")

    page = text_of(crowd, "report.html")
    heading = f'<th class="name" scope="rowgroup">{tables.UNIFIED}</th>'
    assert page.count(heading) == 4 and not Page(page).open  # three panels, and the levels
    assert page.index(">method3<") < page.index(heading) < page.index(">method0+infonce<")

    rows = list(csv.DictReader(io.StringIO(text_of(crowd, "table.csv"))))
    assert [row["objective"] for row in rows] == ["native"] * 5 + ["infonce"] * 4 + [""]


@pytest.mark.parametrize("variants", [("clip", "pfe"), ("clip+infonce", "pfe+infonce")])
def test_one_objective_alone_needs_no_heading(tmp_path, variants):
    for variant in variants:
        write(tmp_path, variant, 0, 0.3, -0.5)
    report.main(["--dataset", "shapes", "--results", str(tmp_path), "--quiet"])
    assert [title for title, _ in report.read(tmp_path / "shapes")[0].groups] == [""]
    assert not any(tables.UNIFIED in text_of(tmp_path, name) for name in ("report.html", "table.md", "table.tex"))


class Page(html.parser.HTMLParser):
    """What a page's tags are and what they load or link to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.links, self.open, self.ids = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.loads += [attributes[name] for name in ("src", "srcset") if name in attributes]
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_else(folder):
    text = text_of(folder, "report.html")
    page = Page(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert page.loads and all(load.startswith("data:image/") for load in page.loads)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    assert not any(word in text for word in ("http:", "https:", "file:", "@import", "url("))
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    for link in page.links:
        assert link[1:] in page.ids if link[0] == "#" else (folder / "shapes" / urllib.parse.unquote(link)).exists()


def test_captions_stay_text_and_missing_images_are_said(folder):
    text = text_of(folder, "report.html")
    assert SCRIPT not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "no file gone.png" in text and 'alt="image picture.png"' in text
    assert "tied, right in 50 %" in text and ">wrong<" in text


def test_figures(folder):
    for name in ("recall_by_level", "uncertainty_against_ambiguity"):
        pdf = (folder / "shapes" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/CIDFontType2" in pdf and b"/Type3" not in pdf
        with PIL.Image.open(folder / "shapes" / f"{name}.png") as image:
            assert min(image.size) > 500


def test_a_variant_and_its_twin_look_alike_but_for_the_objective(crowd):
    looks = plots.looks(report.read(crowd / "shapes"))
    assert "clip" not in looks and len(looks) == 8  # what has no levels is not drawn and uses up no color
    for i in range(4):
        assert looks[f"method{i}"] == (i, False) and looks[f"method{i}+infonce"] == (i, True)
    for theme in plots.THEMES:
        own, twin = (plots._mark(theme, looks[name]) for name in ("method3", "method3+infonce"))
        assert own["color"] == twin["color"] and twin["markerfacecolor"] == plots.THEMES[theme]["paper"]


@pytest.mark.parametrize("theme", plots.THEMES)
@pytest.mark.parametrize("width", [plots.WIDE, 4.0])
def test_many_variants_stand_in_panels_by_method(crowd, theme, width):
    blocks = report.read(crowd / "shapes")
    figure = plots.recall_by_level(blocks[0], plots.looks(blocks), theme, width)
    assert len(figure.axes) == 4
    for i, axes in enumerate(figure.axes):
        legend = axes.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [f"method{i}", f"method{i}+infonce"]
        others, *own, limit = axes.lines
        assert np.isnan(others.get_ydata()).sum() == 6 and len(own) == 2 and len(limit.get_ydata()) == LEVELS
        assert own[0].get_ydata() == pytest.approx([(30 + i) / level for level in range(1, LEVELS + 1)])
    figure.canvas.draw()  # only then are places known
    for axes in figure.axes:
        bounds = axes.get_legend().get_window_extent()
        assert bounds.y0 >= axes.get_window_extent().y1 - 1 and bounds.x1 <= figure.bbox.x1  # hides no line, is whole
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["other variants", "Bayes-optimal"]


def test_few_variants_share_a_panel(folder):
    blocks = report.read(folder / "shapes")
    (axes,) = plots.recall_by_level(blocks[0], plots.looks(blocks)).axes
    assert [line.get_label() for line in axes.lines] == ["a_b+50%", "pfe", "Bayes-optimal"]


def test_panels_of_a_method_stay_small(tmp_path):
    names = ["pfe", *(f"pfe+tag{i}" for i in range(9))]
    for name in names:
        write(tmp_path, name, 0, 0.3, -0.5)
    blocks = report.read(tmp_path / "shapes")
    figure = plots.recall_by_level(blocks[0], plots.looks(blocks))
    shown = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert shown == [names[:4], names[4:8], names[8:]]


def test_the_same_bytes_each_time(folder, capsys):
    def files():
        return {path.name: path.read_bytes() for path in (folder / "shapes").iterdir() if path.is_file()}

    before = files()
    report.main(["--dataset", "shapes", "--results", str(folder)])
    assert len(before) == 8 and files() == before
    assert capsys.readouterr().out.endswith(f"\n\n{folder / 'shapes' / 'report.html'}\n")


def test_without_truth_nothing_is_said_of_limits(tmp_path):
    write(tmp_path, "pfe", 0, 0.3, -0.5, truth=False)
    write(tmp_path, "clip", 0, 0.3, truth=False)
    report.main(["--dataset", "shapes", "--results", str(tmp_path), "--quiet"])
    for name in ("report.html", "table.md", "table.tex"):
        assert "Bayes" not in text_of(tmp_path, name) and "limit" not in text_of(tmp_path, name)
    assert not (tmp_path / "shapes" / "uncertainty_against_ambiguity.png").exists()


def test_without_any_uncertainty_the_table_is_all(tmp_path):
    write(tmp_path, "clip", 0, 0.3)
    report.main(["--dataset", "shapes", "--results", str(tmp_path), "--quiet"])
    assert "uncertainty level" not in text_of(tmp_path, "report.html")
    assert not list((tmp_path / "shapes").glob("*.png"))


def test_other_data_and_backbones_stand_apart(tmp_path):
    for evaluated_on, backbone, levels in (("coco", "tiny", 4), ("shapes", "tiny", 4), ("shapes", "large", 5)):
        path = write(tmp_path, "clip", 0, 0.3, evaluated_on=evaluated_on, uncer_levels=levels)
        result = json.loads(path.read_text())
        result["config"]["backbone"] = backbone
        path.write_text(json.dumps(result))
        path.rename(path.with_name(f"{evaluated_on}{backbone}-retrieval.json"))
    blocks = report.read(tmp_path / "shapes")
    assert [block.title for block in blocks] == ["coco, tiny", "shapes, large", "shapes, tiny"]
    assert [block.title for block in report.read(tmp_path / "shapes", "large")] == ["shapes, large"]


def test_no_results_names_the_command(tmp_path, capsys):
    assert "python eval.py --dataset shapes" in fails(tmp_path, capsys)
    write(tmp_path, "clip", 0, 0.3)
    assert "of backbone 'huge'" in fails(tmp_path, capsys, "--backbone", "huge")


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"config": 3}'])
def test_damaged_result_is_named(tmp_path, capsys, damage):
    path = write(tmp_path, "clip", 0, 0.3)
    path.write_text(damage)
    assert f"{path} is damaged" in fails(tmp_path, capsys)


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_damaged_arrays_are_named(tmp_path, capsys, damage):
    path = write(tmp_path, "pfe", 0, 0.3, -0.5).with_suffix(".npz")
    path.write_bytes(damage) if damage is not None else path.unlink()
    assert f"{path} is missing or damaged" in fails(tmp_path, capsys)


@pytest.mark.parametrize("changes", [{"uncer_levels": 5}, {"fingerprint": "g"}])
def test_what_does_not_fit_one_table_is_named(tmp_path, capsys, changes):
    paths = [write(tmp_path, "clip", 0, 0.3), write(tmp_path, "pfe", 0, 0.3, **changes)]
    said = fails(tmp_path, capsys)
    assert all(str(path) in said for path in paths) and "different" in said


def test_seeds_of_one_variant_differ_in_the_seed_alone(tmp_path, capsys):
    first, second = write(tmp_path, "clip", 0, 0.3), write(tmp_path, "clip", 1, 0.3)
    result = json.loads(second.read_text())
    for change, reason in (({"seed": 0}, "the same seed"), ({"train": {"batch_size": 8, "epochs": 3}}, "train.epochs")):
        second.write_text(json.dumps(result | {"config": result["config"] | change}))
        said = fails(tmp_path, capsys)
        assert reason in said and str(first) in said and str(second) in said


def test_bins_hold_the_middle_of_what_falls_into_them():
    ambiguity = np.repeat([0.0, math.log(10), math.log(1000)], [101, 101, 3])  # three captions say too little
    at, (low, middle, high) = plots.binned(ambiguity, np.concatenate([np.arange(101), np.arange(101) + 7, [9, 9, 9]]))
    assert at == pytest.approx([0, math.log(10)])
    assert (low, middle, high) == (pytest.approx([10, 17]), pytest.approx([50, 57]), pytest.approx([90, 97]))
