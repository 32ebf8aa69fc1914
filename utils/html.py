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
from utils.results import TASKS
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
        " calibration error (15 bins), as the method has it and after temperature scaling on the other half of the"
        " queries; matched: of a classifier, that of plain cosines cooled as much. First seed.",
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
    "learning_curves": (
        "Learning curves",
        "How well the model does on the target after so many labels have been paid for, by the strategy that chose what"
        " to label. Line: mean over seeds; band: their standard deviation, up and down, which says how much seeds"
        " differ and not whether strategies do (the tables do). Dashed: the model without any label.",
    ),
    "error_by_entropy": (
        "Error by entropy",
        "The images of the target in levels of equal size by the entropy of their prediction, and the share of wrong"
        " predictions in each: before any label, and after fine-tuning with as many labels as were paid for at most."
        " Line: mean over seeds; band: their standard deviation. AUROC: the chance that a wrong prediction has more"
        " entropy than a right one, before and after (mean over seeds).",
    ),
    "factor_trace": (
        "Trace of the B factor by candidates and batches",
        "Whether a smaller set of candidates K, or fewer random batches of it, would do for the factors of BayesVLM:"
        " where the curve is level, it would (at the largest K with all batches it is 1 by definition). Marker: mean"
        " over trials, each with other random batches;"
        " bar: their standard deviation. Those of the same K stand beside one another to be told apart.",
    ),
}
LINES = {"recall_by_level", "risk_coverage", "uncertainty_against_ambiguity", "hierarchy"}  # a method's line is its own
UNIFIED = " Dashes and hollow markers: trained by the unified objective."


def page(dataset, parts, looks):
    """Render the page of all parts of the report: results.Blocks, active_results.Studies and factor_traces.Traces.

    dataset: trained on. looks: dict of variant to its plots.Look.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,  # a caption is text, whatever it holds
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(parts=tables.parts, absent=tables.NONE)
    environment.filters.update(has_best=tables.has_best, heads=_heads, minus=_minus, url=_url)
    script = (folder / "report.js").read_text(encoding="utf-8")
    pictures = Pictures()
    return environment.get_template("report.html.j2").render(
        dataset=dataset,
        sections=[_section(part, looks, pictures, f"b{i}") for i, part in enumerate(parts, 1)],
        adaptors=any(part.task in TASKS for part in parts),
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


def _section(part, looks, pictures, name):
    """Gather what the template shows of one part of the report; name: begins the ids of what is in it."""
    figures = {key: _drawn(draw, f"{name}-{key}") for key, draw in plots.drawings(part, looks).items()}
    section = {"facts": {"numbers": part.summary}, "warnings": [], "gallery": {}, "files": {}, "unified": False}
    if part.task in TASKS:
        section |= _of_block(part, looks, pictures)
    elif part.task in plots.OTHERS:
        section |= {"facts": part.facts, "files": part.files}
    return section | {
        "name": name,
        "title": part.title,
        "tables": part.tables,
        "figures": [
            (title, caption + UNIFIED * (section["unified"] and key in LINES), figures[key])
            for key, (title, caption) in FIGURES.items()
            if figures.get(key)
        ],
    }


def _of_block(block, looks, pictures):
    """What a section has of a results.Block alone."""
    values = {variant: runs[0].values for variant, runs in block.results.items()}
    sides = plots.sides_of(block)
    warnings, gallery = [], {}
    for variant, result in values.items():
        if result["seen_in_training"]:
            count = f"{result['seen_in_training']:,} of these {block.any['images']:,} images"
            warnings.append(f"Leakage: {variant} was trained on {count}, so that its numbers are too good.")
    for variant, result in values.items():
        for side in sides:
            by = result[side]["levels_by"]
            if result[side]["uncertainty"].get(by, {}).get("constant"):
                alike = f"all {QUERY[side]}s are equally uncertain (by the {followed(side, by)})"
                warnings.append(f"To {variant} {alike}: for them it has no levels.")
        strips = [_strip(side, result[side], pictures) for side in sides if "examples" in result[side]]
        if strips:
            gallery[variant] = strips
    return {
        "facts": _facts(block),
        "warnings": warnings,
        "gallery": gallery,
        "unified": any(looks[variant].unified for variant in block.results),
        "files": {
            variant: [(f"seed {run.values['config']['seed']}", run.path) for run in runs]
            for variant, runs in block.results.items()
        },
    }


def _facts(block):
    """What a reader has to know of a block: dict of a short name to text."""
    one = block.any
    facts = {"split": one["split"], "images": f"{one['images']:,}"}
    if one["classes"]:
        facts["classes"] = f"{one['classes']:,}"
    facts["prompts" if one["classes"] else "captions"] = f"{one['captions']:,}"
    if one["skipped"]:
        facts["skipped as unreadable"] = f"{one['skipped']:,}"
    if one.get("hierarchy"):
        facts["chains of prompts"] = f"{one['hierarchy']['chains']:,}"
    for side in plots.sides_of(block):
        counts = level_counts(one[side])
        if counts:
            sizes = " or ".join(f"{size:,}" for size in sorted(set(counts)))
            facts[f"{QUERY[side]}s as queries"] = f"{len(counts)} levels of {sizes}"
    return facts | {"numbers": block.summary}


def _drawn(draw, name):
    """Draw a figure for wide and for narrow screens: dict of the kind of screen to SVG, None where there is nothing."""
    figures = {"wide": draw(plots.WIDE), "narrow": draw(NARROW)}
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


def _heads(table):
    """The groups of a table's columns: list of ((name, whether others published it), how many columns)."""
    return tables.spans([(column.group, column.published) for column in table.columns])


def _minus(text):
    return text.replace("-", tables.MINUS)


def _url(path):
    return urllib.parse.quote(path.as_posix())
