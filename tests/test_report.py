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
from utils import tables

LEVELS = 4
RECALLS = {"clip": (0.25, 0.30, 0.20), "pfe": (0.10, 0.40, 0.25), "a_b+50%": (0.30,)}
UNCERTAIN = {"pfe": (-0.8, -0.9, -1.0), "a_b+50%": (-0.2,)}  # S of each seed
SCRIPT = "<script>alert(1)</script>"


def direction(recall, s, truth):
    part = {"recall": {"1": recall, "5": 0.5, "10": 0.75}}
    if truth:
        part["bayes_recall"] = 0.5
    if s is not None:
        limit = {"bayes_recall": 0.5} if truth else {}
        levels = [{"count": 25, "recall": {"1": recall / level}} | limit for level in range(1, LEVELS + 1)]
        part |= {"levels": levels, "s": s, "r2": 0.5, "minus_s_r2": -0.5 * s}
    return part


def write(folder, variant, seed, recall, s=None, truth=True, image="gone.png", **changes):
    config = {"backbone": "tiny", "seed": seed, "score": "similarity", "model": {}, "optim": {}}
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
    path.write_text(json.dumps(result | changes))
    return path


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
    assert best("r2") == {"pfe", "a_b+50%"} and best("image_to_text_r1_percent") == set(RECALLS)
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


def test_markdown(folder):
    lines = [line for line in text_of(folder, "table.md").splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    clip, _, pfe, limit = lines[2:]
    assert clip.startswith("| [clip](<tiny/clip>) | 3 | 25.0 ± 5.0 |") and clip.endswith(f"{f'| {tables.NONE} ' * 4}|")
    assert "| **-0.900** ± 0.100 | **0.500** ± 0.000 | **0.450** ± 0.050 | **0.750** ± 0.000 |" in pfe
    assert limit.startswith(f"| *Bayes-optimal* |  | 50.0 {f'| {tables.NONE} ' * 3}|") and "**" not in limit
    assert "a\\_b+50%" in lines[3] and "(<tiny/a_b+50%>)" in lines[3]


def test_latex_escapes_and_balances(folder):
    text = text_of(folder, "table.tex")
    assert r"a\_b+50\% & $\mathbf{30.0}$ &" in text and r"$25.0 {\scriptstyle\pm 15.0}$" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2 and text.isascii()
    for panel in text.split(r"\begin{tabular}{l")[1:]:
        columns = panel.index("}")
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
    from utils.plots import binned

    ambiguity = np.repeat([0.0, math.log(10), math.log(1000)], [101, 101, 3])  # three captions say too little
    at, (low, middle, high) = binned(ambiguity, np.concatenate([np.arange(101), np.arange(101) + 7, [9, 9, 9]]))
    assert at == pytest.approx([0, math.log(10)])
    assert (low, middle, high) == (pytest.approx([10, 17]), pytest.approx([50, 57]), pytest.approx([90, 97]))
