"""Figures that others have published (configs/published.yaml), as columns beside our own."""

from functools import lru_cache

import yaml

from reporting.tables import Column
from utils.config import HOME, known, presets_of

FILE = HOME / "configs" / "published.yaml"
PRESETS = ("official", "reference", "default")  # the first that a method has computes what its paper published


@lru_cache
def entries():
    """The entries of the file: each what one source says of one data set and some backbones in one table."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def no_suffix(selector):
    """What follows a method's name in the published rows: nothing."""
    return ""


def columns(block, table, ours, suffix=no_suffix):
    """The published twins of `ours`, columns of a table by name, source by source.

    suffix: function from a row's Selector to what follows the method's name in the published row.
    """
    return [
        _twin(column, entry, suffix)
        for entry in entries()
        if (entry["table"], entry["data"]) == (table, block.evaluated_on) and block.backbone in entry["backbones"]
        for column in ours
        if column.key in entry["columns"]
    ]


@lru_cache
def computes_it(method):
    """What follows the method's name in the variant with which its published figures are comparable: a list."""
    has = ["default", *(presets_of(method) if method in known("methods") else ())]
    preset = next(preset for preset in PRESETS if preset in has)
    return [] if preset == "default" else [preset]


def _twin(column, entry, suffix):
    place = entry["columns"].index(column.key)
    figures = {row: values[place] for row, values in entry["rows"].items()}
    digits = max(len(str(figure).partition(".")[2]) for figure in figures.values() if figure is not None)

    def read(values, selector):
        config, (method, *differences) = values["config"], values["variant"].split("+")
        if config["objective"] != "native" or differences != computes_it(method):
            return None
        return figures.get(method + suffix(selector))

    key = "published_" + "".join(c if c.isalnum() else "_" for c in entry["source"].lower()) + f"_{column.key}"
    source = f"{entry['source']}, {entry['levels']} levels" if "levels" in entry else entry["source"]
    group = ", ".join(filter(None, [f"published ({source})", column.group]))
    return Column(key, group, column.title, digits, read, None, note=entry["note"], published=True)
