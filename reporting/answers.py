"""Answers of a gallery as one page that needs no network, with small copies of their pictures."""

from pathlib import Path

import jinja2

from reporting.pictures import Pictures


def page(rows):
    """Render answers, the rows that uncertainty.py --gallery prints, as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # a caption stays text, whatever it holds
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = Pictures()
    shown = []
    for row in rows:
        of_query, of_answer = (("text", "image"), ("image", "text"))[row["kind"] == "image"]
        best = [each | {"shown": _shown(of_answer, each["answer"], pictures)} for each in row["best"]]
        shown.append({"unseen_words": []} | row | {"query": _shown(of_query, row["item"], pictures), "best": best})
    return environment.get_template("answers.html.j2").render(rows=shown, pictures=pictures)


def _shown(kind, item, pictures):
    """What the template shows of an item: a picture's number and its file's name, or a text."""
    return {"picture": pictures.show(item), "text": Path(item).name} if kind == "image" else {"text": item}
