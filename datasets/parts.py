"""Embeddings in parts: files one after another, or chosen rows of them, opened as one array."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import UNREADABLE, reason

PART = 2**20  # rows of a file in a cache of more: 1 GB at D = 512


class Parts:
    """Embeddings (N, D), float16, of which only the rows that are asked for are read; indexed like an array.

    parts: arrays (n, D), or the paths of .npy with floats, one after another. lengths: n of each. rows: those of all of
    them, in order, that it has (N,); by default every one. stamps: of the paths, taken before they were first read. A
    file is opened when it is read: some systems let a process have no more than a thousand open.
    """

    ndim, dtype = 2, np.dtype(np.float16)

    def __init__(self, parts, lengths, rows=None, stamps=None):
        self.parts, self.rows, self.stamps = parts, rows, stamps
        self.ends = np.cumsum(lengths)
        self.shape = (int(self.ends[-1]) if rows is None else len(rows), self.opened(0).shape[-1])

    def __len__(self):
        return self.shape[0]

    def opened(self, number):
        """The part of a number, as it is; raises UserError if it cannot be read."""
        part = self.parts[number]
        if not isinstance(part, Path):
            return part
        try:
            return np.load(part, mmap_mode="r", allow_pickle=False)
        except UNREADABLE as error:
            again = "restore it, or delete the cache that has it and cache the split again"
            raise UserError(f"{part} cannot be read ({reason(error, part)}): {again}.") from None

    def places(self, rows):
        """Yield the number of each part that has some of the rows (n,), which of them it has, and their rows in it."""
        if self.rows is not None:
            rows = self.rows[rows]
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.ends[-1]:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.ends[-1]}")
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows, [0, *self.ends], sorter=order)
        for number, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                here, start = order[first:last], self.ends[number - 1] if number else 0
                yield number, here, rows[here] - start

    def __getitem__(self, index):
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = np.asarray(index)
            rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        result = np.empty((len(rows), self.shape[1]), self.dtype)
        for number, here, inside in self.places(rows):
            result[here] = self.opened(number)[inside]
        return result

    def __array__(self, dtype=None, copy=None):
        return self[:] if dtype is None else self[:].astype(dtype)


def choose(array, rows):
    """Rows (n,), numbers or a mask, of an array (N, D): of a memory map or of Parts without reading them."""
    if isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        return array[rows]
    rows = np.asarray(rows)
    rows = np.flatnonzero(rows) if rows.dtype == bool else rows
    if not isinstance(array, Parts):
        return Parts([array], [len(array)], rows)
    rows = rows if array.rows is None else array.rows[rows]
    return Parts(array.parts, np.diff(array.ends, prepend=0), rows, array.stamps)
