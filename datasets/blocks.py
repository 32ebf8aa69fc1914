"""Encode a split block by block, in one process or several, which may be killed and restarted at any time.

Encoded blocks are stored in `unfinished/` inside the split's folder, one file per block of rows, complete or absent. A
block is always encoded in the same batches, so its bytes depend neither on the process nor on earlier runs.
"""

import collections
import contextlib
import hashlib
import math
import shutil
import warnings

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from datasets.embeddings import WORKING
from models.backbones.pixels import ended, lenient
from utils.errors import UserError
from utils.files import UNREADABLE, atomic, not_downloaded, read_json, write_json
from utils.interrupt import end_with_parent

BLOCK = 256  # images per block, rounded up to whole batches
PROOF = 16  # images or captions on which pooled features are checked against the ordinary encoding
TEXTS = 4096  # captions per block, sorted by length so that a batch is hardly longer than its captions
PLAN = "plan.json"
PATIENCE = 1800  # seconds that a worker gets to decode a batch
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}  # relative error of embeddings from pooled features


class Blocks:
    """The blocks of a split that are encoded so far, in its folder."""

    def __init__(self, folder):
        self.folder = folder / WORKING

    def begin(self, plan):
        """Delete the blocks that were encoded for another plan."""
        with contextlib.suppress(*UNREADABLE):
            if read_json(self.folder / PLAN) == plan:
                return
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(self.folder / PLAN, plan)

    def _file(self, kind, number):
        return self.folder / f"{kind}-{number:08d}.npz"

    def read(self, kind, number, rows):
        """Read a block as a dict of arrays, or None if it is absent, damaged or does not have `rows` rows."""
        with contextlib.suppress(*UNREADABLE), np.load(self._file(kind, number)) as file:
            block = dict(file)
            if len(block["embedding"]) == rows:
                return block

    def write(self, kind, number, **arrays):
        with atomic(self._file(kind, number)) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def parts(self, kind, size, count, chosen=slice(None)):
        """Yield the blocks of `count` rows in order, (rows, dict of arrays); raises UserError if one is missing.

        chosen: which of them.
        """
        for number, rows in list(enumerate(_cut(count, size)))[chosen]:
            block = self.read(kind, number, len(rows))
            if block is None:
                raise UserError(
                    f"{self._file(kind, number)} is missing: give all processes the same folder, and run the same"
                    " command again, which goes on from the other blocks."
                )
            yield rows, block


def _cut(count, size):
    """Cut `count` rows into ranges of at most `size` rows."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class _Decoded(torch.utils.data.Dataset):
    """Transformed images; an image that cannot be read is replaced by the reason, a string."""

    def __init__(self, source, images, transform):
        self.source, self.images, self.transform = source, images, transform

    def __getitem__(self, row):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's warnings about odd metadata are useless here
                try:
                    with self._open(row) as image:
                        if image.format != "PNG":
                            return self.transform(image)
                        image.verify()  # only PNG has checksums, and decoding ignores them
                    with self._open(row) as image:
                        return self.transform(image)
                except (OSError, SyntaxError):  # by which Pillow reports what is cut off
                    whole = None
                    with contextlib.suppress(Exception), self._open(row) as image:
                        whole = ended(image)
                    if whole is None:
                        raise
                    return self.transform(whole)
        except PIL.UnidentifiedImageError:
            return not_downloaded(self.images[row].path or "") or "it is not an image that Pillow can read"
        except Exception as error:  # Pillow raises a dozen types on broken files
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

    def _open(self, row):
        with lenient():
            return self.source.open(self.images[row])


def _collate(items):
    """Return the images that could be read, stacked (or None), their hashes, and {place: reason} of the others.

    NumPy's arrays are sent from a worker as they are. A tensor needs room in /dev/shm, of which containers have little,
    and a socket in TMPDIR; where these lack, torch prints an error, drops the batch and waits for ever.
    """
    good = [item.numpy() for item in items if not isinstance(item, str)]
    hashes = [int.from_bytes(hashlib.blake2b(item.tobytes(), digest_size=8).digest(), "big") for item in good]
    failed = {place: item for place, item in enumerate(items) if isinstance(item, str)}
    return np.stack(good) if good else None, np.array(hashes, dtype=np.uint64), failed


def _stamp(images):
    """Hash sizes and times of the images' files, so that a fixed or replaced file is noticed: 16 hex digits."""
    digest = hashlib.sha256()
    for image in images:
        with contextlib.suppress(OSError, AttributeError):  # no file, or none that can be read
            stat = image.path.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _decoded(loader):
    """Yield the batches of a DataLoader; raises UserError if a worker does not start, is killed or does not answer."""
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        hint = "free memory, or decode in the script itself with --workers 0"
        raise UserError(f"a process that decodes images does not answer ({message}): {hint}.") from None


class BlockEncoder:
    """Encodes this process's blocks of a split.

    blocks: a Blocks. ranks: a Ranks. pooled: also keep the input of the last projections. on_error: stop, or skip an
    image that cannot be read. workers: processes that decode images.
    """

    def __init__(self, blocks, backbone, ranks, pooled=False, on_error="stop", workers=0, quiet=False):
        self.blocks, self.backbone, self.ranks = blocks, backbone, ranks
        self.pooled, self.on_error, self.workers, self.quiet = pooled, on_error, workers, quiet
        self.verified = set()  # sides whose pooled features were checked against the ordinary encoding
        batch = backbone.config.batch_size
        # Rows per block.
        self.sizes = {"image": math.ceil(BLOCK / batch) * batch, "text": TEXTS, "prompt": TEXTS}

    def _todo(self, kind, count, redo=lambda rows, block: False):
        """List this process's blocks that remain to be encoded; with it, returns a progress bar over all its blocks."""
        mine = list(enumerate(_cut(count, self.sizes[kind])))[self.ranks.rank :: self.ranks.world]
        todo = []
        for number, rows in mine:
            block = self.blocks.read(kind, number, len(rows))
            if block is None or redo(rows, block):
                todo.append((number, rows))
        total = sum(len(rows) for _, rows in mine)
        left = sum(len(rows) for _, rows in todo)
        title = f"{kind} ({self.ranks.rank + 1} of {self.ranks.world})" if self.ranks.world > 1 else kind
        hidden = True if self.quiet or not self.ranks.first else None
        return todo, tqdm(total=total, initial=total - left, desc=title, unit=kind, disable=hidden)

    def parts(self, kind, count, chosen=slice(None)):
        """Yield the blocks of all ranks in order, as `Blocks.parts`."""
        return self.blocks.parts(kind, self.sizes[kind], count, chosen)

    def images(self, source, images):
        """Encode images that `source` opens; with on_error="stop", raises UserError at one that cannot be read."""

        def redo(rows, block):
            """Whether a file has changed since, or unreadable images were left out that must now stop the run."""
            left_out = self.on_error == "stop" and len(block["bad"])
            return left_out or "hashes" not in block or block["stamp"].item() != _stamp(images[rows.start : rows.stop])

        size = self.backbone.config.batch_size
        todo, bar = self._todo("image", len(images), redo)
        batches = [rows[i : i + size] for _, rows in todo for i in range(0, len(rows), size)]
        workers = self.workers if len(batches) > 1 else 0
        loader = torch.utils.data.DataLoader(
            _Decoded(source, images, self.backbone.transform),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=end_with_parent,  # it would wait for ever for its batch to be taken
            timeout=PATIENCE if workers else 0,
        )
        decoded = _decoded(loader)
        with bar:
            for number, rows in todo:
                parts, hashes, bad = [], [], {}
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    pixels, of_pixels, failed = next(decoded)
                    hashes.append(of_pixels)
                    bad |= {start + i: reason for i, reason in failed.items()}
                    if failed and self.on_error == "stop":
                        i, reason = next(iter(failed.items()))
                        raise UserError(
                            f"the image {images[batch[i]].place} cannot be read ({reason}): fix or remove it, or leave"
                            " such images and their captions out with --on-error skip."
                        )
                    good = [i for i in range(len(batch)) if i not in failed]
                    pixels = None if pixels is None else torch.from_numpy(pixels)
                    parts.append(self._encoded("image", pixels, good, len(batch)))
                    bar.update(len(batch))
                bad_rows, reasons = np.array(list(bad), dtype=np.int64), np.array(list(bad.values()), dtype=str)
                stamp = np.array(_stamp(images[rows.start : rows.stop]))
                others = {"reason": reasons, "stamp": stamp, "hashes": np.concatenate(hashes)}
                self.blocks.write("image", number, **_joined(parts), bad=bad_rows, **others)

    def texts(self, kind, texts):
        """Encode strings in batches of about equal length; repeated strings are encoded once."""
        todo, bar = self._todo(kind, len(texts))
        with bar:
            for number, rows in todo:
                block = texts[rows.start : rows.stop]
                counts = collections.Counter(block)
                unique = sorted(counts, key=len)
                parts = []
                for span in _cut(len(unique), self.backbone.config.batch_size):
                    batch = unique[span.start : span.stop]
                    parts.append(self._encoded("text", self.backbone.tokenize(batch), range(len(batch)), len(batch)))
                    bar.update(sum(counts[text] for text in batch))
                row_of = {text: row for row, text in enumerate(unique)}
                repeated = [row_of[text] for text in block]
                arrays = _joined(parts)
                for name in ("embedding", "pooled"):
                    if name in arrays:
                        arrays[name] = arrays[name][repeated]
                # A token holds at least one byte, so only long captions can have been cut.
                long = (text for text in unique if len(text.encode()) > 60)
                cut = sum(counts[text] for text in long if not self.backbone.reads_whole(text))
                self.blocks.write(kind, number, **arrays, cut=np.array(cut))

    def _encoded(self, side, batch, rows, count):
        """Encode `batch` (pixels, tokens or None) into `rows` of float16 arrays of `count` rows; other rows are 0."""
        if side == "image":
            encode, pool = self.backbone.encode_images, self.backbone.pooled_images
        else:
            encode, pool = self.backbone.encode_tokens, self.backbone.pooled_tokens
        arrays = {"error": np.array(0.0)}
        if batch is None:
            arrays["embedding"] = np.zeros((count, self.backbone.dim), dtype=np.float16)
            if self.pooled:
                width = self.backbone.projection[side].weight.shape[1]
                arrays["pooled"] = np.zeros((count, width), dtype=np.float16)
            return arrays
        if self.pooled:
            if side not in self.verified:
                self._verify(side, encode, pool, batch)
            features = pool(batch)
            arrays["error"] = np.array(self._error(side, features, TOLERANCE[self.backbone.precision]))
            encoded = {"embedding": features.embedding, "pooled": features.pooled}
        else:
            encoded = {"embedding": encode(batch)}
        for name, values in encoded.items():
            arrays[name] = np.zeros((count, values.shape[1]), dtype=np.float16)
            arrays[name][list(rows)] = _half(values)
        return arrays

    def _verify(self, side, encode, pool, batch):
        """Check pooled features against the ordinary encoding, once per side and always in float32."""
        precision, self.backbone.precision = self.backbone.precision, "float32"
        try:
            features = pool(batch[:PROOF])._replace(embedding=encode(batch[:PROOF]))
        finally:
            self.backbone.precision = precision
        self._error(side, features, TOLERANCE["float32"])
        self.verified.add(side)

    def _error(self, side, features, allowed):
        """Return the relative error of the reconstructed embeddings; raises UserError if it exceeds `allowed`."""
        error = self.backbone.reconstruction_error(side, features)
        if not error <= allowed:
            raise UserError(
                f"the pooled {side} features of {self.backbone.config.model} do not give its embeddings (relative error"
                f" {error:.1e}, allowed {allowed:.0e}): cache it with --features final, which does not need them."
            )
        return error


def _joined(parts):
    """Concatenate the arrays of several batches; the error is the largest of theirs."""
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "error"}
    return arrays | {"error": np.array(max(float(part["error"]) for part in parts))}


def _half(encoded):
    """Convert embeddings to the float16 of the cache; raises UserError if they are not finite in it."""
    encoded = encoded.half().cpu().numpy()
    if not np.isfinite(encoded).all():
        raise UserError(
            "the backbone gives embeddings that are not finite in float16: check that its weights are complete, or on a"
            " GPU try --set encoder.precision=bfloat16."
        )
    return encoded
