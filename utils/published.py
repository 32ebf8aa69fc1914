"""Figures that others have published (configs/published.yaml), as columns that stand beside one's own."""

from functools import lru_cache
from pathlib import Path

import yaml

from utils.tables import Column

FILE = Path(__file__).parent.parent / "configs" / "published.yaml"
OWN = {"official"}  # what a variant may be beside its method for published figures to be of it


@lru_cache
def entries():
    """The parts of the file: each what one source says of one data set and some backbones in one table."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def columns(block, table, ours, name=lambda about: ""):
    """The published twins of `ours`, columns of a table by name, source by source.

    name: function from what a row is about, beside its values, to what the row's name has after the method's.
    """
    found = []
    for entry in entries():
        if (entry["table"], entry["data"]) == (table, block.evaluated_on) and block.backbone in entry["backbones"]:
            for column in ours:
                if column.key in entry["columns"]:
                    found.append(_twin(column, entry, name))
    return found


def _twin(column, entry, name):
    at = entry["columns"].index(column.key)
    figures = {row: values[at] for row, values in entry["rows"].items()}
    digits = max(len(str(figure).partition(".")[2]) for figure in figures.values() if figure is not None)

    def read(values, about):
        config, (method, *differs) = values["config"], values["variant"].split("+")
        if config["objective"] != "native" or not OWN.issuperset(differs):
            return None
        return figures.get(method + name(about))

    key = "published_" + "".join(c if c.isalnum() else "_" for c in entry["source"].lower()) + f"_{column.key}"
    source = entry["source"] + (f", {entry['levels']} levels" if "levels" in entry else "")
    group = ", ".join(filter(None, [f"published ({source})", column.group]))
    return Column(key, group, column.title, digits, read, None, note=entry["note"], published=True)
