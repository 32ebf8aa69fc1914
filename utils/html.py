"""The report as one page that needs no network: its style, script, figures and pictures are inside."""

import base64
import functools
import hashlib
import io
import urllib.parse
from pathlib import Path

import jinja2
import PIL.Image
from markupsafe import Markup

from utils import plots, tables
from utils.paper_tables import level_counts
from utils.terminal import ANSWER, QUERY, followed

NARROW = 3.6  # inches: a figure as wide as a phone, so that its type keeps its size there
THUMBNAIL = 96  # pixels of the longer side
SHOWN = 5  # of the most and of the least certain queries, per method and direction
ENDS = {"most_certain": "Most certain", "least_certain": "Least certain"}
FIGURES = {  # title and caption
    "recall_by_level": (
        "R@1 by uncertainty level",
        "The queries stand in levels of equal size, from those a method is surest of to those it doubts most: a"
        " line that falls all the way shows an uncertainty that tells which answers to trust. Band: 95 % bootstrap"
        " interval over queries (over several seeds, the means of recall and of both bounds).",
    ),
    "risk_coverage": (
        "Risk and coverage",
        "Share of wrong answers when only the least uncertain queries are answered: the lower a line starts and the"
        " later it rises, the better. At full coverage all queries are answered. Dashed without markers: the same for"
        " a method without an uncertainty, by the entropy of its scores over the gallery. Dotted: what nothing can"
        " beat, the answers of the method with the fewest wrong ones, all right ones first. First seed.",
    ),
    "reliability": (
        "Reliability",
        "Whether the probability that a method gives its best answer is the share of such answers that are right:"
        " on the diagonal it is. Above it a method is too modest, below it too sure. The larger a marker, the more"
        " queries are in its bin. The captions of an image share the probability that it is the answer. ECE: expected"
        " calibration error (15 bins), as trained and after temperature scaling on the other half of the queries. First"
        " seed.",
    ),
    "uncertainty_against_ambiguity": (
        "Uncertainty against true ambiguity",
        "Each dot is a query (a sample of them): an honest uncertainty rises along the axis. Line: median; band:"
        " the middle 80 % of queries. First seed.",
    ),
    "uncertainty_distributions": (
        "Distributions of uncertainty",
        "How uncertainties of captions and of images are spread; methods measure them in different units, so each"
        " has its own scale. First seed.",
    ),
    "hierarchy": (
        "Uncertainty from general to specific prompts",
        "Along a chain prompts become more specific, so that an honest uncertainty falls. Line: median; band: the"
        " middle 80 % of prompts. First seed.",
    ),
}
LINES = {"recall_by_level", "risk_coverage", "uncertainty_against_ambiguity", "hierarchy"}  # a method's line is its own
UNIFIED = " Dashes and hollow markers: trained by the unified objective."


def page(dataset, blocks, looks):
    """Render the page of all blocks. dataset: trained on. looks: dict of variant to its plots.Look."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,  # a caption is text, whatever it holds
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(parts=tables.parts, absent=tables.NONE)
    environment.filters.update(has_best=_has_best, heads=_heads, minus=_minus, url=_url)
    script = (folder / "report.js").read_text(encoding="utf-8")
    pictures = Pictures()
    return environment.get_template("report.html.j2").render(
        dataset=dataset,
        sections=[_section(block, looks, pictures, f"b{i}") for i, block in enumerate(blocks, 1)],
        pictures=pictures,
        script=Markup(script),
        # The one script that the page allows itself to run.
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colors={theme: plots.variables(theme) for theme in plots.THEMES},
    )


class Pictures:
    """Small copies of image files, each of which is in the page once however often it is shown."""

    def __init__(self):
        self.kept = {}  # of a data URI to its number and size

    def show(self, path):
        """Keep a copy, and give its number; None where the file is gone or broken."""
        small = _thumbnail(path)
        return small and self.kept.setdefault(small[0], (len(self.kept), small[1]))[0]


def _section(block, looks, pictures, name):
    """Gather what the template shows of one block; name: begins the ids of what is in it."""
    values = {variant: runs[0].values for variant, runs in block.results.items()}
    sides = plots.sides_of(block)
    constant, gallery = [], {}
    for variant, result in values.items():
        for side in sides:
            by = result[side]["levels_by"]
            if result[side]["uncertainty"].get(by, {}).get("constant"):
                constant.append((variant, f"{QUERY[side]}s", followed(side, by)))
        strips = [_strip(side, result[side], pictures) for side in sides if "examples" in result[side]]
        if strips:
            gallery[variant] = strips
    unified = any(looks[variant].unified for variant in block.results)
    figures = {key: _drawn(draw, block, looks, f"{name}-{key}") for key, draw in plots.FIGURES.items()}
    return {
        "name": name,
        "block": block,
        "levels": _levels(block),
        "constant": constant,
        "leaks": {variant: result["seen_in_training"] for variant, result in values.items()},
        "figures": [
            (title, caption + UNIFIED * (unified and key in LINES), figures[key])
            for key, (title, caption) in FIGURES.items()
            if figures[key]
        ],
        "gallery": gallery,
    }


def _levels(block):
    """Say how many queries a level holds: dict of "captions" to "10 levels of 500"."""
    said = {}
    for side in plots.sides_of(block):
        counts = level_counts(block.any[side])
        if counts:
            sizes = " or ".join(f"{size:,}" for size in sorted(set(counts)))
            said[f"{QUERY[side]}s"] = f"{len(counts)} levels of {sizes}"
    return said


def _drawn(draw, block, looks, name):
    """Draw a figure for wide and for narrow screens: dict of the kind of screen to SVG, None where there is nothing."""
    figures = {"wide": draw(block, looks, plots.WIDE), "narrow": draw(block, looks, NARROW)}
    return {kind: Markup(plots.svg(figure, f"{name}-{kind}")) for kind, figure in figures.items() if figure} or None


def _strip(side, part, pictures):
    """What the template shows of the most and least certain queries of one method and direction."""
    examples = part["examples"]
    return {
        "title": plots.SIDES[side],
        "doubt": followed(side, part["levels_by"] or "entropy"),
        "own": f"its own {ANSWER[side]}",
        "ends": {title: [_card(side, item, pictures) for item in examples[end][:SHOWN]] for end, title in ENDS.items()},
    }


def _card(side, item, pictures):
    """One query with its best answers, and its own where that is not among them; `item` as in a result's `examples`."""

    def shown(kind, what):
        return {"picture": pictures.show(what), "name": Path(what).name} if kind == "image" else {"text": what}

    answers = [
        shown(ANSWER[side], best["answer"])
        | {"mark": "right" if best["right"] else "true" if best.get("true") else "wrong"}
        for best in item["best"]
    ]
    found = any(best["right"] for best in item["best"])
    return {
        "query": shown(QUERY[side], item["query"]),
        "uncertainty": f"{item['uncertainty']:.3g}",
        "answers": answers,
        "own": None if found else shown(ANSWER[side], item["own"]),
    }


@functools.cache
def _thumbnail(path):
    """Make a small copy of an image file: a data URI and (width, height); None where the file is gone or broken."""
    try:
        with PIL.Image.open(path) as image:
            small = image.convert("RGB")
    except Exception:  # Pillow raises a dozen kinds on a broken file
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    encoded = {}
    for kind, options in (("jpeg", {"quality": 80}), ("png", {"optimize": True})):  # flat drawings are smaller as PNG
        file = io.BytesIO()
        small.save(file, kind, **options)
        encoded[kind] = file.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}", small.size


def _has_best(table):
    return any(cell.best for _, rows in table.groups for row in rows for cell in row.cells.values())


def _heads(table):
    """The groups of a table's columns: list of ((name, whether others published it), how many columns)."""
    return tables.spans([(column.group, column.published) for column in table.columns])


def _minus(text):
    return text.replace("-", tables.MINUS)


def _url(path):
    return urllib.parse.quote(path.as_posix())
