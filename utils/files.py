"""Files that are either whole or absent."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np


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


def write_text(path, text):
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_lines(path, values):
    """Write one JSON value per line."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save_array(path, array):
    """Write one .npy."""
    with atomic(path) as partial, open(partial, "wb") as file:
        np.save(file, array)


def save_arrays(path, **arrays):
    """Write several arrays as one compressed .npz."""
    with atomic(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
