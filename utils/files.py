"""Files that are either whole or absent, and locks on the folders they lie in."""

import contextlib
import json
import os
import re
from pathlib import Path

import filelock
import numpy as np

from utils.errors import UserError


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path` that takes its place when the block ends well, and is removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """Hold `folder` for this process alone inside the block; raises UserError where another process holds it.

    What killed processes left half-written in it is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            for partial in folder.glob(".*.part"):
                partial.unlink()
            yield
    except filelock.Timeout:
        raise UserError(f"another process is writing {folder}: wait for it, or stop it.") from None


def write_text(path, text):
    """Write text as UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_lines(path, values):
    """Write one JSON value per line."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_json(path, value):
    """Write one JSON value, lists of numbers in a line; raises ValueError at a number that is not finite."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, re.sub(r"\[\n[-+.\w,\s]*\]", lambda found: " ".join(found[0].split()), text) + "\n")


def read_json(path):
    """Read a JSON object; raises ValueError where it is none, or holds a number that is not finite."""
    value = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _refuse(constant):
    raise ValueError(f"{constant} is not a finite number")


def save_array(path, array):
    """Write one .npy."""
    with atomic(path) as partial, open(partial, "wb") as file:
        np.save(file, array)


def save_arrays(path, **arrays):
    """Write several arrays as one compressed .npz."""
    with atomic(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
