"""Files that are written whole or not at all, and locks on folders."""

import contextlib
import errno
import json
import os
import pickle
import platform
import re
import struct
import tempfile
import tokenize
import types
import zipfile
import zlib
from datetime import datetime
from pathlib import Path

import filelock
import numpy as np

from utils.errors import UserError

# What libraries raise on a file that is damaged or of another kind: found by tests/test_fuzz.py.
UNREADABLE = (
    OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, AssertionError, EOFError, MemoryError,
    RuntimeError, SyntaxError, tokenize.TokenError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def not_downloaded(path):
    """What lies in the place of a file that was not downloaded: a pointer of Git LFS or a web page; "" if neither."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS, which `git lfs pull` replaces by the file"
        if start.startswith((b"<!doctype html", b"<html")):
            return "it is a web page"
    return ""


def reason(error, path):
    """Why the file `path` cannot be read, by an exception of UNREADABLE: on one line, without advice to unpickle it."""
    message = " ".join(str(error).split())
    return not_downloaded(path) or ("it is no file of NumPy" if "pickled" in message else message)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds and is removed if not.

    Raises UserError if the disk is full, and OSError, which names `path`, if it cannot be written for another reason.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno in FULL:
            hint = "free space on its disk, and run the same command again"
            raise UserError(f"{path} cannot be written ({error.strerror}): {hint}.") from None
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """Lock `folder` for this process inside the block; raises UserError, which names the process that has locked it.

    Removes the temporary files that killed processes left in it. The lock of a process ends with it, however it ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    writer = folder.with_name(f".{folder.name}.writer.lock")  # a file of its own, as opening the lock empties it
    try:
        acquired = lock.acquire(timeout=0)
    except filelock.Timeout:
        who = writer.read_text(encoding="utf-8") if writer.is_file() else "another process"
        raise UserError(f"{who} is writing {folder}: wait for it, or stop it.") from None
    except NotImplementedError:  # by which filelock reports a file system without flock
        raise UserError(f"the file system of {folder.parent} has no locks: work in a folder of another one.") from None
    with acquired:
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        writer.write_text(f"process {os.getpid()} on {platform.node()}, started {now},", encoding="utf-8")
        try:
            for partial in folder.glob(".*.part"):
                partial.unlink()
            yield
        finally:
            writer.unlink(missing_ok=True)


def must_write(folder):
    """Raise UserError unless files can be written into a folder, or into the nearest one above it that exists."""
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))  # also a link to nothing
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{place} cannot be written into ({error.strerror}): change that, or work elsewhere.") from None


def is_name(text, windows=os.name == "nt"):
    """Whether a text can name a file or a folder inside another: printable, and no path, device or stream."""
    if windows and re.search(r'^(con|prn|aux|nul|com\d|lpt\d)\s*(\.|$)|[<>:"|?*]|[. ]$', text, re.IGNORECASE):
        return False
    return text.isprintable() and re.fullmatch(r"[^./\\][^/\\]*", text) is not None


def write_text(path, text):
    """Write text as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content):
    """Write bytes. Libraries that write to a disk by themselves can cut a file without an error when it is full."""
    with atomic(path) as partial:
        partial.write_bytes(content)


def write_lines(path, values):
    """Write one JSON value per line."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_json(path, value):
    """Write one JSON value, each list of numbers on one line; raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, re.sub(r"\[\n[-+.\w,\s]*\]", lambda match: " ".join(match[0].split()), text) + "\n")


def read_json(path):
    """Read a JSON object; raises ValueError for any other value, and for NaN and infinity."""
    value = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _refuse(constant):
    raise ValueError(f"{constant} is not a finite number")


def save_array(path, array):
    """Write one .npy."""
    with atomic(path) as partial, open(partial, "wb") as file:
        # To a file itself NumPy writes outside of Python, and if the disk is full can lose the end without an error.
        np.save(types.SimpleNamespace(write=file.write), array)


def save_arrays(path, **arrays):
    """Write several arrays as one compressed .npz."""
    with atomic(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
