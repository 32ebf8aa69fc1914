"""The page and the figures of report.py on small synthetic results, and the page in a browser."""

import html.parser
import json
import math
import re
import shutil
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import made_once
from scipy import sparse
from studies import write_study, write_trace

from labeling.strategies import STRATEGIES
from models.base import Adaptor, Embedding
from reporting import evaluations, findings, traces
from reporting import page as pages
from reporting import studies as study_results
from reporting.figures import lines as line_figures
from reporting.figures import panels, style
from reporting.rendering import NARROW
from reporting.words import NONE
from tasks import Choices, classification, hierarchy, retrieval
from utils.files import save_arrays

LEVELS, IMAGES, CAPTIONS, SIZE = 4, 20, 60, 8
SCRIPT, HANDLER = "<script>document.title='x'</script>", "<img src=x onerror=document.title='x'>"
CROWD = ["clip", *(f"method{i}{objective}" for i in range(5) for objective in ("", "+infonce"))]


class Stub(Adaptor):
    """An adaptor whose uncertainty is exp of the first entry. images: whether images have an uncertainty, too."""

    def __init__(self, uncertain=True, images=True, constant=False):
        super().__init__()
        self.uncertain, self.images, self.constant = uncertain, images, constant

    def _adapt(self, embedding, is_uncertain):
        uncertainty = torch.ones_like(embedding[:, 0]) if self.constant else embedding[:, 0].exp()
        return Embedding(F.normalize(embedding[:, 1:], dim=-1), uncertainty if is_uncertain else None)

    def adapt_image(self, image):
        return self._adapt(image, self.uncertain and self.images)

    def adapt_text(self, text):
        return self._adapt(text, self.uncertain)


class Opened(SimpleNamespace):
    """The part of the interface of `Pairs` that tasks use."""

    def fed(self, side, pooled=False):
        return self.chains["text"] if side == "prompt" else getattr(self, side)


def pairs_of(folder, seed=0, truth=True):
    """Images with three captions each; the most certain captions need escaping, and half of the image files exist."""
    rng = np.random.default_rng(seed)
    image, owner = rng.normal(size=(IMAGES, SIZE)), np.repeat(np.arange(IMAGES), 3)
    text = image[owner] + 0.8 * rng.normal(size=(CAPTIONS, SIZE))
    text[:2, 0] = -9, -8
    image[:2, 0] = -9, -8
    matches = (rng.random((IMAGES, CAPTIONS)) < 0.2) | (owner == np.arange(IMAGES)[:, None])
    files = [folder / f"picture{i}.png" for i in range(IMAGES)]
    for i, file in enumerate(files[::2]):
        PIL.Image.new("RGB", (300, 200), (12 * i, 99, 0)).save(file)
    words = [SCRIPT, HANDLER, *(f"caption {i}" for i in range(2, CAPTIONS))]
    chains = {"chain": np.tile(np.arange(5), 3), "depth": np.repeat(np.arange(3), 5)}
    prompts = np.repeat(np.linspace(2, -2, 3), 5)[:, None] + 0.1 * rng.normal(size=(15, SIZE))
    return Opened(
        image=image, text=text, dim=SIZE, image_of_text=owner, classes=None,
        items={"image": list(map(str, files)), "text": words, "prompt": ["a prompt"] * 15},
        matches=sparse.csr_array(matches) if truth else None,
        chains=chains | {"text": prompts} if truth else None,
        meta={"logit_scale": 10.0, "id_space": "shapes"},
    )  # fmt: skip


def classes_of(folder):
    """Images with classes and human label distributions."""
    pairs, rng = pairs_of(folder), np.random.default_rng(1)
    pairs.label, pairs.classes = np.arange(IMAGES) % 4, [SCRIPT, "dog", "cat", "bird"]
    pairs.text, pairs.class_of_text = pairs.text[:8], np.repeat(np.arange(4), 2)
    pairs.human = rng.dirichlet(np.ones(4), IMAGES)
    return pairs


TASKS = {"retrieval": retrieval, "classification": classification, "hierarchy": hierarchy}


def write(folder, variant, seed, pairs, adaptor, task="retrieval", evaluated_on="shapes", **changes):
    """Evaluate and write one result as eval.py does; returns its path."""
    figures, arrays = TASKS[task].evaluate(adaptor, pairs, Choices(["similarity"], LEVELS, quiet=True), "cpu")
    metadata = {
        "task": task, "evaluated_on": evaluated_on, "split": "val", "uncer_levels": LEVELS, "levels_by": None,
        "drop_remainder": False, "images": IMAGES, "captions": len(pairs.text), "classes": len(pairs.classes or ()),
        "skipped": 0, "seen_in_training": 0, "fingerprint": "f", "checkpoint": "c", "variant": variant,
    }  # fmt: skip
    config = {"backbone": "tiny", "seed": seed, "score": "similarity", "model": {}, "optim": {}, "method": variant}
    config |= {"objective": "infonce" if "+infonce" in variant else "native", "preset": "default"}
    config |= {"train": {"batch_size": 8, "epochs": 2}}
    path = folder / "shapes" / "tiny" / variant / f"seed{seed}" / f"{evaluated_on}-{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(path.with_suffix(".npz"), **arrays)
    path.write_text(json.dumps(metadata | {"config": config} | figures | changes), encoding="utf-8")
    return path


def copy(path, variant):
    """Copy a result to another variant."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["config"]["objective"] = "infonce" if "+infonce" in variant else "native"
    other = path.parents[2] / variant / path.parent.name / path.name
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(values | {"variant": variant}), encoding="utf-8")
    shutil.copy(path.with_suffix(".npz"), other.with_suffix(".npz"))


def make_folder():
    """Results of all three tasks: no uncertainty, one of captions alone, one of both sides, and a constant one."""
    folder = Path.cwd()
    pairs, classes = pairs_of(folder), classes_of(folder)
    write(folder, "clip", 0, pairs, Stub(uncertain=False))
    for seed in range(2):
        write(folder, "both", seed, pairs_of(folder, seed), Stub())
    write(folder, "captions", 0, pairs, Stub(images=False), seen_in_training=7)
    write(folder, "constant", 0, pairs, Stub(constant=True))
    for variant, stub in (("clip", Stub(uncertain=False)), ("both", Stub())):
        write(folder, variant, 0, classes, stub, "classification", "cifar")
        write(folder, variant, 0, pairs, stub, "hierarchy", "chains")
    write_study(folder, STRATEGIES)
    write_trace(folder)
    make_page(folder, evaluations.read(folder / "shapes"), *others_in(folder))


def others_in(folder):
    """Parts of a page beside evaluations: active learning and traces of factors."""
    return [*study_results.read(folder / "shapes"), *traces.read(folder / "shapes")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of `make_folder`, whose page takes ten seconds: once for all workers."""
    return made_once(tmp_path_factory, "page", make_folder)


@pytest.fixture(scope="module")
def blocks(folder):
    return evaluations.read(folder / "shapes")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A block of clip and five methods by both objectives: more variants than colors."""
    folder = tmp_path_factory.mktemp("crowd")
    first = write(folder, "method0", 0, pairs_of(folder, truth=False), Stub())
    for variant in CROWD[2:]:
        copy(first, variant)
    write(folder, "clip", 0, pairs_of(folder, truth=False), Stub(uncertain=False))
    return evaluations.read(folder / "shapes")


def make_page(folder, blocks, *others):
    path = folder / "shapes" / "report.html"
    path.write_text(pages.page("shapes", [*blocks, *others], style.looks(blocks)), encoding="utf-8")
    for suffix in ("md", "tex", "csv"):
        path.with_name(f"table.{suffix}").write_text("")
    return path


@pytest.fixture(scope="module")
def others(folder):
    return others_in(folder)


@pytest.fixture(scope="module")
def page(folder):
    return folder / "shapes" / "report.html"


class Page(html.parser.HTMLParser):
    """The tags and ids of a page, and the targets that it loads or links to."""

    VOID = "meta", "br"

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.links, self.open, self.ids = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        targets = [attributes[name] for name in ("href", "xlink:href", "src", "srcset") if name in attributes]
        (self.links if tag == "a" else self.loads).extend(targets)
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained(page):
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert not parsed.open and len(parsed.ids) == len(set(parsed.ids))
    assert all(load.startswith("data:image/") or load[1:] in parsed.ids for load in parsed.loads)
    assert not any(word in text for word in ("http:", "https:", "file:", "@import"))
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "iframe", "object", "img")]
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    for link in parsed.links:
        assert link[1:] in parsed.ids if link[0] == "#" else (page.parent / urllib.parse.unquote(link)).exists()


def test_each_picture_is_in_the_page_once(page):
    text = page.read_text(encoding="utf-8")
    pictures = [attributes["href"] for tag, attributes in Page(text).tags if tag == "image" and "href" in attributes]
    assert len(pictures) == len(set(pictures)) == IMAGES // 2
    assert text.count('<use href="#p') > 10 * len(pictures)


def test_captions_stay_text_and_missing_images_are_named(page):
    text = page.read_text(encoding="utf-8")
    assert SCRIPT not in text and HANDLER not in text
    assert "&lt;script&gt;document.title=" in text and "no file picture1.png" in text
    assert 'aria-label="image picture0.png"' in text


def test_gallery_marks_answers(folder, blocks):
    part = blocks[0].results["both"][0].values["text_to_image"]
    strip = pages._strip("text_to_image", part, pages.Pictures())
    for end, cards in zip(pages.ENDS, strip["ends"].values(), strict=True):
        assert len(cards) == pages.SHOWN
        for card, item in zip(cards, part["examples"][end], strict=False):
            marks = ["right" if best["right"] else "true" if best["true"] else "wrong" for best in item["best"]]
            assert [answer["mark"] for answer in card["answers"]] == marks
            assert (card["target"] is None) == ("right" in marks) and card["query"] == {"text": item["query"]}


def test_page_explains_warnings_levels_and_families(page):
    text = page.read_text(encoding="utf-8")
    assert "captions was trained on 7 of these 20 images" in text
    assert "To constant all captions are equally uncertain (by the query caption)" in text
    assert "4 levels of 15" in text and "4 levels of 5" in text and "<dt>split</dt><dd>val</dd>" in text
    assert "<dt>query-only</dt>" in text and "<dt>gallery-aware</dt>" in text


def test_published_columns_are_marked(folder, one_figure):
    blocks = evaluations.read(folder / "shapes")[:1]
    table = next(table for table in blocks[0].tables if table.name == "recall")
    printed = table.columns[0]._replace(published=True, group="published (a paper)", note="<of its table 1>")
    blocks[0].tables = [table._replace(columns=[*table.columns, printed])]
    text = pages.page("shapes", blocks, style.looks(blocks))
    rows = sum(len(rows) for _, rows in table.groups)
    assert text.count('class="published"') == 2 + rows  # both heads
    assert "<dt>published (a paper)</dt><dd>&lt;of its table 1&gt;</dd>" in text


def test_pages_of_the_same_results_are_the_same(page, blocks, others):
    assert pages.page("shapes", [*blocks, *others], style.looks(blocks)) == page.read_text(encoding="utf-8")


def test_every_part_has_its_section_tables_and_figures(page, blocks, others):
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert [part.task for part in others][-2:] == ["active", "factor-trace"]
    for i, part in enumerate([*blocks, *others], 1):
        assert f'<h2 id="b{i}">{part.title}</h2>' in text and f'<li><a href="#b{i}">{part.title}</a>' in text
        for table in part.tables:
            name = "found" if table.name == "gains" else f"b{i}"  # the table that the page opens with
            assert text.count(f'<h3 id="{name}-{table.name}">{table.title}</h3>') == 1
    for drawing in (drawing for task in ("active", "factor-trace") for drawing in style.REGISTERED[task]):
        assert text.count(f'role="img" aria-label="{drawing.title}, ') == 2  # for wide and for narrow screens
    assert '<th class="name" scope="col">strategy</th><th scope="col">seeds</th>' in text
    assert '<a href="tiny/active/shifted-test/bald-seed2.json">seed 2</a>' in text
    assert "<dt>labels that pick the epoch</dt><dd>500 of shifted-val, free</dd>" in text


def test_differences_sort_by_their_number(page, others, opened):
    tab, _, _ = opened(page)
    active = next(part for part in others if part.task == "active")
    [(_, rows), _] = active.tables[1].groups
    gaps = {row.name: row.cells["nll_25_gap"].mean for row in rows if "nll_25_gap" in row.cells}
    index = 2 + [column.key for column in active.tables[1].columns].index("nll_25_gap")
    table = tab.locator(".scroll[aria-labelledby$=-nll] table")
    table.locator("thead tr").last.locator("th").nth(index).locator("button").click()
    names = table.locator("tbody tr:not(.reference) th").all_inner_texts()
    assert names == [*sorted(gaps, key=gaps.get, reverse=True), "random"] and len(gaps) == 9


FIGURES = {drawing.name for drawing in style.REGISTERED["retrieval"]}


def drawn(block, looks):
    """The names of the figures that a block has."""
    return {drawing.name for drawing in style.drawings(block) if drawing.draw(block, looks)}


DRAWN = {
    "retrieval": FIGURES,
    "classification": FIGURES - {"hierarchy", "overview"},
    "hierarchy": {"hierarchy"},
    "comparison": set(),
}


def test_figures_of_each_task(blocks):
    looks = style.looks(blocks)
    assert {block.task for block in blocks} == set(DRAWN)
    for block in blocks:
        assert drawn(block, looks) == DRAWN[block.task]


@pytest.mark.parametrize("width", [style.WIDE, NARROW])
def test_axes_are_labelled_and_nothing_is_cut_off(blocks, crowd, width):
    for block in (*blocks, *crowd):
        looks = style.looks([block])
        for figure in filter(None, (drawing.draw(block, looks, width) for drawing in style.drawings(block))):
            style.lay_out(figure)
            parts = [part for part in (figure, *figure.subfigs) if part.axes and not part.subfigs] or [figure]
            for part in parts:
                assert part._supxlabel or all(axes.get_xlabel() for axes in part.axes)
                assert part._supylabel or all(axes.get_ylabel() for axes in part.axes)
            box = figure.get_tightbbox().extents
            whole = min(box[:2]) >= -0.02 and box[2] <= width + 0.02 and box[3] <= figure.get_figheight() + 0.02
            assert whole, (block.title, [axes.get_title() for axes in figure.axes], box, figure.get_size_inches())


def test_a_variant_and_its_infonce_twin_share_a_color(crowd):
    looks = style.looks(crowd)
    assert looks["clip"] == (None, False)  # it uses up no color
    for i in range(5):
        assert looks[f"method{i}"] == (i, False) and looks[f"method{i}+infonce"] == (i, True)
    native, twin = (style.mark(looks[name]) for name in ("method3", "method3+infonce"))
    assert native["color"] == twin["color"] and twin["markerfacecolor"] == style.LIGHT["paper"]


def test_colors_of_a_theme_differ_and_have_counterparts():
    for theme in style.THEMES:
        assert len(set(style.variables(theme).values())) == len(style.variables(theme))
    assert style.variables("light").keys() == style.variables("dark").keys()


def test_figures_take_their_colors_from_the_page(blocks):
    text = style.svg(line_figures.recall_by_level(blocks[0], style.looks(blocks)), "name")
    named = set(re.findall(r' id="([^"]+)"', text))
    assert set(re.findall(r"#([^;\")]+)", text)) == named  # ids alone: no fixed color
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(style.variables("dark"))
    assert all("fill: var(--figure-ink)" in tag for tag in re.findall(r"<text [^>]*>", text))


def test_rounding_coordinates_leaves_text_alone(blocks):
    figure = line_figures.recall_by_level(blocks[0], style.looks(blocks))
    figure.axes[0].set_title("0.123456")
    assert ">0.123456<" in style.svg(figure, "name")


@pytest.mark.parametrize("width", [style.WIDE, NARROW])
def test_many_variants_stand_in_panels_by_method(crowd, width):
    figure = line_figures.recall_by_level(crowd[0], style.looks(crowd), width)
    assert len(figure.axes) == 10  # both directions
    style.lay_out(figure)
    for i, axes in enumerate(figure.axes):
        legend = axes.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [f"method{i % 5}", f"method{i % 5}+infonce"]
        others, *highlighted = axes.lines
        assert np.isnan(others.get_ydata()).sum() == 8 and len(highlighted) == 2
        bounds = legend.get_window_extent()
        # The legend hides no line and is not cut off.
        assert bounds.y0 >= axes.get_window_extent().y1 - 1 and bounds.x1 <= figure.bbox.x1


def test_few_variants_share_a_panel(blocks):
    to_image, to_text = line_figures.recall_by_level(blocks[0], style.looks(blocks)).axes
    assert [line.get_label() for line in to_image.lines] == ["both", "captions", "Bayes-optimal"]
    assert [line.get_label() for line in to_text.lines] == ["both", "captions*"]  # levels by the retrieved caption
    runs = blocks[0].results["both"]
    recalls = [run.values["text_to_image"]["uncertainty"]["query"]["levels"]["recall"]["1"] for run in runs]
    assert to_image.lines[0].get_ydata() == pytest.approx(100 * np.mean(recalls, axis=0))


def test_title_names_the_uncertainty_that_defines_the_levels():
    line = line_figures.Line(np.arange(2), np.arange(2))
    lines, followed = dict.fromkeys("abc", line), {"a": "query image", "b": "retrieved caption", "c": "query image"}
    title, marked = line_figures._whose("levels by uncertainty of the {}", lines, followed)
    assert title == "levels by uncertainty of the query image; * of the retrieved caption"
    assert [line.mark for line in marked.values()] == ["", "*", ""]


def test_names_of_variants_stay_text(blocks):
    name = "pfe+$_^<script>&"
    block = evaluations.Evaluation("retrieval", "shapes", "tiny", {name: blocks[0].results["both"]})
    text = pages.page("shapes", [block], style.looks([block]))
    assert "<script>&" not in text and text.count("$_^&lt;script&gt;&amp;") > 10


def test_risk_coverage_ends_with_all_queries(blocks):
    to_image, _ = line_figures.risk_coverage(blocks[0], style.looks(blocks)).axes
    hit = blocks[0].results["both"][0].arrays["text_to_image_hit"]
    lines = {line.get_label(): line for line in to_image.lines}
    assert lines["both"].get_ydata()[-1] == pytest.approx(100 * (1 - hit.mean()))
    assert lines["both"].get_xdata()[-1] == 100 and "clip, entropy" in lines
    (best,) = (line for label, line in lines.items() if label.startswith("best order"))
    assert (np.diff(best.get_ydata()) >= -1e-9).all() and best.get_ydata()[0] == 0


def test_bins_hold_the_percentiles_of_their_values():
    ambiguity = np.repeat([0.0, math.log(10), math.log(1000)], [101, 101, 3])  # three captions are too few
    uncertainty = np.concatenate([np.arange(101), np.arange(101) + 7, [9, 9, 9]])
    centers, (low, middle, high) = panels.binned(ambiguity, uncertainty)
    assert centers == pytest.approx([0, math.log(10)])
    assert (low, middle, high) == (pytest.approx([10, 17]), pytest.approx([50, 57]), pytest.approx([90, 97]))


def test_saved_figures(blocks, tmp_path):
    for name in ("recall_by_level", "uncertainty_against_ambiguity"):
        files = []
        for again in range(2):
            stem = tmp_path / f"{name}{again}"
            [draw] = [drawing.draw for drawing in style.drawings(blocks[0]) if drawing.name == name]
            style.save(draw(blocks[0], style.looks(blocks)), stem)
            files.append([stem.with_suffix(suffix).read_bytes() for suffix in (".png", ".pdf")])
        assert files[0] == files[1]
        pdf = files[0][1]
        assert pdf.startswith(b"%PDF") and b"/CIDFontType2" in pdf and b"/Type3" not in pdf
        with PIL.Image.open(stem.with_suffix(".png")) as image:
            assert min(image.size) > 500


def test_without_any_uncertainty_only_figures_by_entropy_are_drawn(tmp_path):
    write(tmp_path, "clip", 0, pairs_of(tmp_path, truth=False), Stub(uncertain=False))
    blocks = evaluations.read(tmp_path / "shapes")
    looks = style.looks(blocks)
    assert drawn(blocks[0], looks) == {"risk_coverage", "reliability"}
    assert "Bayes" not in pages.page("shapes", blocks, looks)


class ImagesOnly(Stub):
    """An adaptor whose images alone have an uncertainty."""

    def adapt_text(self, text):
        return self._adapt(text, False)


def test_uncertainties_of_images_alone_are_drawn(tmp_path):
    pairs = pairs_of(tmp_path)
    write(tmp_path, "clip", 0, pairs, Stub(uncertain=False))
    write(tmp_path, "images", 0, pairs, ImagesOnly())
    blocks = evaluations.read(tmp_path / "shapes")
    looks = style.looks(blocks)
    assert "overview" in drawn(blocks[0], looks)
    assert "Before the search" not in " ".join(findings.sentences(blocks[0]))
    assert pages.page("shapes", blocks, looks)


def test_a_page_opens_with_what_was_found(blocks, others, tmp_path, one_figure):
    """Of retrieval, of classification over data sets, and of active learning; or with what is still to be done."""
    compared = next(part for part in blocks if part.task == "comparison")
    study = next(part for part in others if part.task == "active")
    for part, sentence in ((blocks[0], "R@1 text→image: clip has"), (compared, "NLPD"), (study, "Mean accuracy, %")):
        [first, *_] = findings.sentences(part)
        assert first.startswith(sentence) or "No difference in NLPD" in first
        opening = html.unescape(pages.page("shapes", [part], style.looks(blocks))).partition("</section>")[0]
        assert f"<li>{first}</li>" in opening and 'id="found"' in opening
    write(tmp_path, "both", 0, pairs_of(tmp_path), Stub())
    [alone, *_] = evaluations.read(tmp_path / "shapes")
    text = pages.page("shapes", [alone], style.looks([alone]))
    assert findings.sentences(alone) == [] and "There is nothing to compare with yet: train and evaluate" in text


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, driven by Playwright."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """A function that opens a page and returns (tab, console messages and errors, URLs loaded)."""
    contexts = []

    def open_page(path, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        tab, messages, loaded = context.new_page(), [], []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: loaded.append(request.url))
        tab.goto(path.as_uri())
        return tab, messages, loaded

    yield open_page
    for context in contexts:
        context.close()


OPEN = "for (const details of document.querySelectorAll('details')) details.open = true"


def test_browser_reports_no_error_and_loads_nothing(page, opened):
    tab, messages, loaded = opened(page)
    assert messages == [] and {url for url in loaded if not url.startswith("data:")} == {page.as_uri()}
    assert tab.title() == "Post-hoc uncertainty: shapes"
    tab.evaluate(OPEN)
    for words in (SCRIPT, HANDLER):
        assert tab.locator(".words", has_text=words).first.is_visible()
    assert tab.title() == "Post-hoc uncertainty: shapes" and messages == []


# A column of a table: its sort order, and for each row the kind of row, the cell's text and value, and the row's name.
COLUMN = """(button) => {
  const head = button.closest("th");
  const bodies = [...head.closest("table").tBodies].map((body) => [...body.rows].map((row) => ({
    kind: row.className, text: row.cells[head.cellIndex]?.textContent.trim(),
    value: row.cells[head.cellIndex]?.dataset.value ?? null, name: row.cells[0].textContent,
  })));
  return [head.getAttribute("aria-sort"), bodies];
}"""
EVERY_COLUMN = f"""() => [...document.querySelectorAll("thead button")].map((button) => {{
  const column = {COLUMN};
  return [0, 1, 2, 3].map((presses) => {{ if (presses) button.click(); return column(button); }});
}})"""


def values_of(rows):
    return [float(row["value"]) for row in rows if not row["kind"] and row["value"] is not None]


def is_number(text):
    return re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) is not None


def test_click_on_a_column_sorts_its_rows(page, opened):
    tab, messages, _ = opened(page)
    moved, lacking = 0, 0
    for states in tab.evaluate(EVERY_COLUMN):
        (_, before), *_ = states
        if not all(is_number(row["value"]) for rows in before for row in rows if row["value"]):
            continue
        assert [order for order, _ in states[1:]] == ["descending", "ascending", None] and states[3][1] == before
        for sign, (_, bodies) in zip((-1, 1), states[1:], strict=False):
            for old, new in zip(before, bodies, strict=True):
                assert sorted(row["name"] for row in new) == sorted(row["name"] for row in old)
                kinds = [("heading", "", "reference").index(row["kind"]) for row in new]
                assert kinds == sorted(kinds)
                rows, values = [row for row in new if not row["kind"]], values_of(new)
                assert values == sorted(values, key=lambda value: sign * value)
                assert all(row["value"] is None and row["text"] in (NONE, "") for row in rows[len(values) :])
                moved += new != old
                lacking += 0 < len(values) < len(rows)
    assert moved > 10 and lacking > 10 and messages == []
    assert tab.locator("[aria-sort]").count() == 0


def test_names_sort_by_keyboard(page, opened):
    tab, _, _ = opened(page)
    button = tab.get_by_role("button", name="method").first
    button.focus()
    for order in ("ascending", "descending"):
        tab.keyboard.press("Enter")
        sorted_by, (rows, *_) = button.evaluate(COLUMN)
        names = [row["value"] for row in rows if not row["kind"]]
        assert sorted_by == order and names == sorted(names, reverse=order == "descending")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_never_scrolls_sideways(page, opened, width, scheme):
    tab, _, _ = opened(page, viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.evaluate(OPEN)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator("figure .wide").first.is_visible() == (width == 1280)
    assert tab.locator("figure .narrow").first.is_visible() == (width == 390)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(252, 252, 250)", "dark": "rgb(21, 24, 28)"}[scheme]


def test_letters_in_figures_are_readable(page, opened):
    for width in (1280, 390):
        tab, _, _ = opened(page, viewport={"width": width, "height": 800})
        sizes = """() => [...document.querySelectorAll("figure svg text")].filter((text) => text.checkVisibility())
          .map((text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""
        heights = [abs(size) for size in tab.evaluate(sizes) if abs(size) > 1]  # a rotated label's matrix has a = 0
        assert heights and min(heights) >= 9.5


def test_page_reads_without_a_script(page, opened):
    tab, _, _ = opened(page, java_script_enabled=False)
    assert tab.locator("button").count() == 0 and tab.locator("table").first.is_visible()
    tab.locator("summary", has_text="both").first.click()
    assert tab.locator("details[open] .words", has_text=SCRIPT).first.is_visible()
