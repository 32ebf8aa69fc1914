"""Memory: how much a device has free, and arrays that lie in a file where they would take too much of it."""

import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch

SHARE = 0.5  # of the free memory that embeddings may take


def fits(size, device):
    """Whether `size` bytes leave half of a device's free memory to everything else.

    device: a torch.device. Of the CPU's memory, what the system can give without swapping, and no more than what the
    limit of the job (a cgroup's, as of Slurm and containers) leaves, shared by the processes that torchrun starts here.
    """
    return size <= SHARE * _free(torch.device(device))


def _free(device):
    """Bytes that a device has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(psutil.virtual_memory().available, *_left_to_group()) // processes


def _left_to_group():
    """Bytes that each control group of this process leaves it; the page cache of a group counts as free."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # another system than Linux
        groups = []
    left = [psutil.virtual_memory().total]
    for _, controllers, name in groups:
        root = Path("/sys/fs/cgroup", *(["memory"] if controllers else []))
        limit, anonymous = ("memory.limit_in_bytes", "total_rss") if controllers else ("memory.max", "anon")
        if controllers not in ("", "memory"):
            continue
        folder = root / name.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                most = int((place / limit).read_text())  # "max" is no number
                used = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                left.append(max(0, most - int(used[anonymous])))
            except (OSError, ValueError, KeyError):
                continue
    return left


def empty(rows, count):
    """Empty tensors (count, ...) for rows like these tensors, or None; on a CPU without the memory, in unnamed files.

    The files lie in the working folder, which has the disk of results, and last as long as the tensors.
    """
    size = count * sum(row.nbytes for row in rows if row is not None)
    device = next(row.device for row in rows if row is not None)
    make = torch.empty if device.type != "cpu" or fits(size, device) else _in_file
    shapes = [None if row is None else (count, *row.shape) for row in rows]
    return [shape and make(shape, dtype=row.dtype, device=device) for row, shape in zip(rows, shapes, strict=True)]


def _in_file(shape, dtype, device):
    size = int(np.prod(shape)) * dtype.itemsize
    with tempfile.TemporaryFile(dir=".") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here; later, writing to the map would be a signal
            os.posix_fallocate(file.fileno(), 0, size)
        content = np.memmap(file, dtype=np.uint8, mode="r+" if hasattr(os, "posix_fallocate") else "w+", shape=(size,))
    return torch.from_numpy(content).view(dtype).view(shape)
