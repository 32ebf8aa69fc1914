"""The report as one page that needs no network: its style, figures and pictures are inside."""

import base64
import functools
import io
import urllib.parse
from pathlib import Path

import jinja2
import PIL.Image

from utils import plots, tables

NARROW = 4.0  # inches: a figure as wide as a phone, so that its type keeps its size there
PANEL = 3.3  # inches
THUMBNAIL = 144  # pixels of the longer side
THUMBNAILS = 120  # in the whole page, which keeps their part of it below about 1 MB
SIDES = {"most_certain": "Most certain", "least_certain": "Least certain"}


def page(dataset, blocks, samples, looks):
    """Render the page of all blocks.

    dataset: trained on. samples: for each block what plots.uncertainty_against_ambiguity draws. looks: dict of variant
    to its plots.Look.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # a caption is text, whatever it holds
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(parts=tables.parts, spans=tables.spans, absent=tables.NONE)
    environment.filters.update(minus=_minus, url=_url)
    strips = sum("examples" in runs[0].values for block in blocks for runs in block.results.values())
    shown = min(10, max(3, THUMBNAILS // max(1, 2 * strips)))
    sections = [_section(*pair, looks, shown) for pair in zip(blocks, samples, strict=True)]
    return environment.get_template("report.html.j2").render(dataset=dataset, sections=sections)


def _section(block, samples, looks, shown):
    """Gather what the template shows of one block."""
    levels = {name: (tables.level_recalls(runs), tables.level_limits(runs)) for name, runs in block.results.items()}
    examples = {variant: runs[0].values.get("examples") for variant, runs in block.results.items()}
    return {
        "block": block,
        "limits": block.any.get("bayes_optimal", {}).get("levels"),
        "lines": [_themed(plots.recall_by_level, block, looks, width) for width in (plots.WIDE, NARROW)],
        "panels": {
            variant: _themed(plots.uncertainty_against_ambiguity, {variant: sample}, looks, PANEL)
            for variant, sample in samples.items()
        },
        "levels": [
            (title, found)
            for title, rows in block.groups
            if (found := {row.name: levels[row.name] for row in rows if levels[row.name][0]})
        ],
        "strips": {
            variant: {title: [_card(item) for item in items[side][:shown]] for side, title in SIDES.items()}
            for variant, items in examples.items()
            if items
        },
    }


def _themed(draw, data, looks, width):
    """Draw one figure per theme: dict of theme to data URI, or None where there is nothing to draw."""
    figures = {theme: draw(data, looks, theme, width) for theme in plots.THEMES}
    return {theme: _data_uri("svg+xml", plots.svg(figure)) for theme, figure in figures.items() if figure} or None


def _card(item):
    """One caption with its picture and what came of it; `item` as in a result's `examples`."""
    hit = item["hit"]
    answer = {0.0: "wrong", 1.0: "right"}.get(hit, f"tied, right in {100 * hit:.0f} %")
    return {
        "caption": item["caption"],
        "name": Path(item["image"]).name,
        "picture": _thumbnail(item["image"]),
        "uncertainty": f"{item['uncertainty']:.3g}",
        "answer": answer,
        "fits": item.get("fits"),
    }


@functools.cache
def _thumbnail(path):
    """Make a small copy of an image file as a data URI, or None where the file is gone or broken."""
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
    return _data_uri(kind, encoded[kind])


def _data_uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _minus(text):
    return text.replace("-", tables.MINUS)


def _url(path):
    return urllib.parse.quote(path.as_posix())
