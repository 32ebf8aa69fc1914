"""A result: figures as JSON, and beside it, under the same name, an .npz of what was measured per query."""

import json
import zipfile

from utils.config import difference
from utils.files import read_json, save_arrays, write_json

NUMBER = (int, float)


def write(path, values, arrays):
    """Write a result; a killed process leaves the old one, the new one, or none."""
    path.unlink(missing_ok=True)  # its arrays are about to change
    save_arrays(path.with_suffix(".npz"), **arrays)
    write_json(path, values)


def compare(path, wanted):
    """Read a result and compare it with entries that it shall hold: (its values, the names of those that differ).

    Raises FileNotFoundError where there is none, ValueError where its JSON is damaged or lacks one of the entries.
    """
    try:
        values = read_json(path)
        return values, difference({name: values[name] for name in wanted}, json.loads(json.dumps(wanted)))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def has_arrays(path):
    """Whether the arrays of a result are there and whole."""
    return zipfile.is_zipfile(path.with_suffix(".npz"))


def must_hold(values, shape):
    """Raise TypeError or KeyError unless `values` has the types that `shape`, nested likewise, has in their place.

    >>> must_hold({"seed": 3, "scores": [0.5, 1]}, {"seed": int, "scores": [NUMBER]})
    """
    if not isinstance(values, type(shape) if isinstance(shape, dict | list) else shape):
        raise TypeError(f"{values} is no {shape}")
    if isinstance(shape, dict):
        for name, part in shape.items():
            must_hold(values[name], part)
    elif isinstance(shape, list):
        for value in values:
            must_hold(value, shape[0])
