"""A result: a JSON file of figures and, under the same name, an .npz of per-query arrays."""

import json
import zipfile

from utils.config import difference
from utils.files import UNREADABLE, read_json, save_arrays, write_json


def write(path, values, arrays):
    """Write a result; a killed process leaves the old one, the new one, or none."""
    path.unlink(missing_ok=True)  # its arrays are about to change
    save_arrays(path.with_suffix(".npz"), **arrays)
    write_json(path, values)


def compare(path, wanted):
    """Read a result and compare it with the entries `wanted`: returns its values, and the keys in which they differ.

    Raises FileNotFoundError if there is no result, ValueError if its JSON is damaged or lacks one of the entries.
    """
    try:
        values = read_json(path)
        return values, difference({name: values[name] for name in wanted}, json.loads(json.dumps(wanted)))
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def has_arrays(path):
    """Whether the .npz of a result exists and is whole."""
    return zipfile.is_zipfile(path.with_suffix(".npz"))
