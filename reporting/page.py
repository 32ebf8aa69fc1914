"""The report as one page that needs no network: its style, script, figures and pictures are inside."""

import base64
import hashlib
import urllib.parse
from pathlib import Path

import jinja2
from markupsafe import Markup

from reporting import findings, tables
from reporting.figures import style
from reporting.pictures import Pictures
from reporting.rendering import render
from reporting.runs import OF_EVAL
from reporting.words import ANSWER, DIRECTIONS, MINUS, NONE, QUERY, followed

SHOWN = 5  # of the most and of the least certain queries, per method and direction
ENDS = {"most_certain": "Most certain", "least_certain": "Least certain"}
UNIFIED = " Dashes and hollow markers: trained by the unified objective."


def page(dataset, parts, looks, figures=None):
    """Render the page of all Parts of a report.

    dataset: trained on. looks: dict of variant to its figures.style.Look. figures: {(number of the part, name of the
    figure): its `rendering.render`}; by default they are drawn here.
    """
    if figures is None:
        figures = {
            (number, drawing.name): render(number, part, drawing, looks)
            for number, part in enumerate(parts, 1)
            for drawing in style.drawings(part)
        }
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,  # a caption stays text, whatever it holds
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(parts=tables.parts, absent=NONE)
    environment.filters.update(has_best=tables.has_best, heads=_heads, minus=_minus, url=_url)
    script = (folder / "page.js").read_text(encoding="utf-8")
    pictures = Pictures()
    numbered = [(number, part, _figures(number, part, looks, figures)) for number, part in enumerate(parts, 1)]
    first = next((number for number, part, _ in numbered if part.task in findings.OPENING), None)
    opening = first and _opening(*numbered[first - 1][1:])
    sections = [
        _section(number, part, shown, pictures, findings.OPENING[part.task] if number == first else ())
        for number, part, shown in numbered
    ]
    return environment.get_template("page.html.j2").render(
        dataset=dataset,
        opening=opening,
        sections=sections,
        adaptors=any(part.task in OF_EVAL for part in parts),
        pictures=pictures,
        script=Markup(script),
        # The one script that the page's policy allows.
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colors={theme: style.variables(theme) for theme in style.THEMES},
    )


def _opening(part, figures):
    """What the page opens with: the findings of a Part, with the table and the figure that show them."""
    shown = findings.OPENING[part.task]
    return {
        "title": part.title,
        "sentences": findings.sentences(part),
        "table": next((table for table in part.tables if table.name in shown), None),
        "figures": [figure for figure in figures if figure["name"] in shown],
    }


def _section(number, part, figures, pictures, without):
    """What the template shows of a Part, without the tables and figures of these names."""
    gallery = {
        variant: [_strip(direction, result, pictures) for direction, result in by_direction.items()]
        for variant, by_direction in part.gallery.items()
    }
    return {
        "name": f"b{number}", "title": part.title, "facts": part.facts, "warnings": part.warnings,
        "tables": [table for table in part.tables if table.name not in without],
        "figures": [figure for figure in figures if figure["name"] not in without],
        "gallery": gallery, "files": part.files,
    }  # fmt: skip


def _figures(number, part, looks, figures):
    """The figures of a Part that have something to draw, as the template shows them."""
    unified = part.task in OF_EVAL and any(looks[variant].unified for variant in part.results)
    return [
        {
            "name": drawing.name,
            "title": drawing.title,
            "caption": drawing.caption + UNIFIED if unified and drawing.line_per_method else drawing.caption,
            "screens": figures[number, drawing.name],
        }
        for drawing in style.drawings(part)
        if figures[number, drawing.name]
    ]


def _strip(direction, result, pictures):
    """What the template shows of the most and least certain queries of one method and direction."""
    examples = result["examples"]
    return {
        "title": DIRECTIONS[direction],
        "uncertainty": followed(direction, result["levels_by"] or "entropy"),
        "target": f"its own {ANSWER[direction]}",
        "ends": {
            title: [_card(direction, example, pictures) for example in examples[end][:SHOWN]]
            for end, title in ENDS.items()
        },
    }


def _card(direction, example, pictures):
    """One query with its best answers, and the right one where it is not among them."""

    def shown(kind, item):
        return {"picture": pictures.show(item), "name": Path(item).name} if kind == "image" else {"text": item}

    answers = []
    for best in example["best"]:
        mark = "right" if best["right"] else "true" if best.get("true") else "wrong"
        answers.append(shown(ANSWER[direction], best["answer"]) | {"mark": mark})
    hit = any(best["right"] for best in example["best"])
    return {
        "query": shown(QUERY[direction], example["query"]),
        "uncertainty": f"{example['uncertainty']:.3g}",
        "answers": answers,
        "target": None if hit else shown(ANSWER[direction], example["own"]),
    }


def _heads(table):
    """The groups of a table's columns: list of ((name, whether others published it), how many columns)."""
    return tables.spans([(column.group, column.published) for column in table.columns])


def _minus(text):
    return text.replace("-", MINUS)


def _url(path):
    return urllib.parse.quote(path.as_posix())
