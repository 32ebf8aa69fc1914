"""Encode a split block by block, by one process or several, killed and started again at will.

What is encoded lies in `unfinished/` inside the split's folder, one file per block of rows, each whole or absent. A
block is always encoded in the same batches, so its bytes depend neither on who encodes it nor on what was done before.
"""

import collections
import contextlib
import hashlib
import shutil
import warnings

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from datasets.embeddings import UNREADABLE, WORKING
from utils.errors import UserError
from utils.files import atomic, read_json, write_json

BLOCK = 256  # images of a block, or a whole batch if that is more
PROOF = 16  # images or captions on which pooled features are held against the ordinary encoding
TEXTS = 4096  # captions of a block: sorted by length, they are cut to about their own
PLAN = "plan.json"
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}  # of the reconstruction of pooled features


class Blocks:
    """What is encoded so far of a split, in its folder."""

    def __init__(self, folder):
        self.folder = folder / WORKING

    def begin(self, plan):
        """Throw away what was encoded for another plan."""
        with contextlib.suppress(*UNREADABLE):
            if read_json(self.folder / PLAN) == plan:
                return
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(self.folder / PLAN, plan)

    def _file(self, kind, number):
        return self.folder / f"{kind}-{number:08d}.npz"

    def read(self, kind, number, rows):
        """Read a block as a dict of arrays, or None where it is absent, damaged or not of `rows` rows."""
        with contextlib.suppress(*UNREADABLE), np.load(self._file(kind, number)) as file:
            block = dict(file)
            if len(block["embedding"]) == rows:
                return block

    def write(self, kind, number, **arrays):
        with atomic(self._file(kind, number)) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def parts(self, kind, size, count):
        """Give the blocks of `count` rows in order; raises UserError where one is missing."""
        for number, rows in enumerate(_cut(count, size)):
            block = self.read(kind, number, len(rows))
            if block is None:
                raise UserError(
                    f"{self._file(kind, number)} is missing: do all processes see the same folder? The same command"
                    " goes on from the other blocks."
                )
            yield rows, block


def _cut(count, size):
    """Cut `count` rows into ranges of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class _Decoded(torch.utils.data.Dataset):
    """Images as the transform sees them, with the reason in place of those that cannot be read."""

    def __init__(self, source, images, transform):
        self.source, self.images, self.transform = source, images, transform

    def __getitem__(self, row):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata help nobody here
                with self.source.open(self.images[row]) as image:
                    if image.format != "PNG":
                        return self.transform(image)
                    image.verify()  # PNG alone has checksums, which decoding does not look at
                with self.source.open(self.images[row]) as image:
                    return self.transform(image)
        except PIL.UnidentifiedImageError:
            return "it is no image that Pillow can read"
        except Exception as error:  # Pillow raises a dozen kinds on a broken file
            return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _collate(items):
    """Stack the images that could be read, and tell the others' reasons by their place in the batch."""
    good = [item for item in items if not isinstance(item, str)]
    return torch.stack(good) if good else None, {i: item for i, item in enumerate(items) if isinstance(item, str)}


def _stamp(images):
    """What changes when somebody mends or replaces one of the images' files."""
    digest = hashlib.sha256()
    for image in images:
        with contextlib.suppress(OSError, AttributeError):  # no file, or none that can be read
            found = image.path.stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _next(decoded):
    """Take the next batch; raises UserError where a worker was ended from outside."""
    try:
        return next(decoded)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"a process that decodes images was ended ({said}): free memory, or take fewer with --workers 1."
        ) from None


class BlockEncoder:
    """Encodes this process's blocks of a split.

    blocks: a Blocks. ranks: a Ranks. pooled: keep the input of the last projections, too. on_error: what to do with an
    image that cannot be read. workers: processes that decode.
    """

    def __init__(self, blocks, backbone, ranks, pooled=False, on_error="stop", workers=0, quiet=False):
        self.blocks, self.backbone, self.ranks = blocks, backbone, ranks
        self.pooled, self.on_error, self.workers, self.quiet = pooled, on_error, workers, quiet
        self.proved = set()  # sides whose pooled features were held against the ordinary encoding
        batch = backbone.config.batch_size
        self.sizes = {"image": -(-BLOCK // batch) * batch, "text": TEXTS, "prompt": TEXTS}  # rows of a block

    def _mine(self, kind, count, redo=lambda rows, block: False):
        """List this process's blocks that are still to be done, and a progress bar that knows of the others."""
        numbered = list(enumerate(_cut(count, self.sizes[kind])))[self.ranks.rank :: self.ranks.world]
        todo = []
        for number, rows in numbered:
            block = self.blocks.read(kind, number, len(rows))
            if block is None or redo(rows, block):
                todo.append((number, rows))
        total, left = (sum(len(rows) for _, rows in which) for which in (numbered, todo))
        share = f" ({self.ranks.rank + 1} of {self.ranks.world})" * (self.ranks.world > 1)
        hidden = True if self.quiet or not self.ranks.first else None
        return todo, tqdm(total=total, initial=total - left, desc=kind + share, unit=kind, disable=hidden)

    def parts(self, kind, count):
        """Give the blocks of all ranks in order, (rows, dict of arrays); raises UserError where one is missing."""
        return self.blocks.parts(kind, self.sizes[kind], count)

    def images(self, source, images):
        """Encode images that `source` opens; raises UserError at one that cannot be read, if told to stop there."""

        def redo(rows, block):
            """Whether a file has changed since, or one that could not be read must not be left out any more."""
            left_out = self.on_error == "stop" and len(block["bad"])
            return left_out or block["stamp"].item() != _stamp(images[rows.start : rows.stop])

        size = self.backbone.config.batch_size
        todo, bar = self._mine("image", len(images), redo)
        batches = [rows[i : i + size] for _, rows in todo for i in range(0, len(rows), size)]
        loader = torch.utils.data.DataLoader(
            _Decoded(source, images, self.backbone.transform),
            batch_sampler=batches,
            num_workers=self.workers if len(batches) > 1 else 0,
            collate_fn=_collate,
            pin_memory=self.backbone.device.type == "cuda",
        )
        decoded = iter(loader) if batches else None
        with bar:
            for number, rows in todo:
                parts, bad = [], {}
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    pixels, failed = _next(decoded)
                    bad |= {start + i: reason for i, reason in failed.items()}
                    if failed and self.on_error == "stop":
                        i, reason = next(iter(failed.items()))
                        raise UserError(
                            f"the image {images[batch[i]].place} cannot be read ({reason}): mend or remove it, or leave"
                            " such images and their captions out with --on-error skip."
                        )
                    good = [i for i in range(len(batch)) if i not in failed]
                    parts.append(self._encoded("image", pixels, good, len(batch)))
                    bar.update(len(batch))
                marks = {"bad": np.array(list(bad), dtype=np.int64), "reason": np.array(list(bad.values()), dtype=str)}
                marks["stamp"] = np.array(_stamp(images[rows.start : rows.stop]))
                self.blocks.write("image", number, **_joined(parts), **marks)

    def texts(self, kind, texts):
        """Encode strings, each that is repeated once, in batches of about equal length."""
        todo, bar = self._mine(kind, len(texts))
        with bar:
            for number, rows in todo:
                block = texts[rows.start : rows.stop]
                times = collections.Counter(block)
                different = sorted(times, key=len)
                parts = []
                for cut in _cut(len(different), self.backbone.config.batch_size):
                    batch = different[cut.start : cut.stop]
                    parts.append(self._encoded("text", self.backbone.tokenize(batch), range(len(batch)), len(batch)))
                    bar.update(sum(times[text] for text in batch))
                place = {text: row for row, text in enumerate(different)}
                back = [place[text] for text in block]
                found = _joined(parts)
                found |= {name: found[name][back] for name in ("embedding", "pooled") if name in found}
                # A token holds a byte at the least, so that only long captions can have been cut.
                long = sum(len(text.encode()) > 60 and not self.backbone.reads_whole(text) for text in block)
                self.blocks.write(kind, number, **found, cut=np.array(long))

    def _encoded(self, side, given, rows, count):
        """Encode pixels or tokens as float16 arrays of `count` rows, of which only `rows` are given."""
        whole, pool = (
            (self.backbone.encode_images, self.backbone.pooled_images)
            if side == "image"
            else (self.backbone.encode_tokens, self.backbone.pooled_tokens)
        )
        found = {"error": np.array(0.0)}
        if given is None:
            found["embedding"] = np.zeros((count, self.backbone.dim), dtype=np.float16)
            if self.pooled:
                width = self.backbone.projection[side].weight.shape[1]
                found["pooled"] = np.zeros((count, width), dtype=np.float16)
            return found
        if self.pooled:
            if side not in self.proved:
                self._prove(side, whole, pool, given)
            features = pool(given)
            found["error"] = np.array(self._error(side, features, TOLERANCE[self.backbone.precision]))
            kept = {"embedding": features.embedding, "pooled": features.pooled}
        else:
            kept = {"embedding": whole(given)}
        for name, values in kept.items():
            found[name] = np.zeros((count, values.shape[1]), dtype=np.float16)
            found[name][list(rows)] = _half(values)
        return found

    def _prove(self, side, whole, pool, given):
        """Hold pooled features against the ordinary way to encode, once, and in float32, whatever comes after."""
        precision, self.backbone.precision = self.backbone.precision, "float32"
        try:
            features = pool(given[:PROOF])._replace(embedding=whole(given[:PROOF]))
        finally:
            self.backbone.precision = precision
        self._error(side, features, TOLERANCE["float32"])
        self.proved.add(side)

    def _error(self, side, features, allowed):
        """Give the error of the reconstruction; raises UserError where it is no rounding."""
        error = self.backbone.reconstruction_error(side, features)
        if not error <= allowed:
            raise UserError(
                f"the pooled {side} features of {self.backbone.config.model} do not give its embeddings (relative error"
                f" {error:.1e}, allowed {allowed:.0e}): cache it with --features final, which has no need of them."
            )
        return error


def _joined(parts):
    """Join the arrays of several batches; of their errors the largest counts."""
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "error"}
    return found | {"error": np.array(max(float(part["error"]) for part in parts))}


def _half(encoded):
    """Turn embeddings into the float16 of the cache; raises UserError where that cannot hold them."""
    encoded = encoded.half().cpu().numpy()
    if not np.isfinite(encoded).all():
        raise UserError(
            "the backbone gives embeddings that are not finite in float16: are its weights whole? On a GPU, try"
            " --set encoder.precision=bfloat16."
        )
    return encoded
