"""The cache of frozen embeddings: write it (resumable, whole or absent), open it (memory-mapped), take it to a device.

One folder per split, `embeddings/<dataset>/<backbone>/<split>/`:

    image.npy (N, D), text.npy (M, D)   float16, not normalized
    image_of_text.npy (M,)              the row of image.npy that each caption describes
    image_id.npy (N,), text_id.npy (M,) the source's own ids
    items.jsonl                         image paths, captions and prompts of chains, in row order
    matches.npz                         sparse (N, M): which images each caption is true of, where the source knows it
    chains.npz                          text (K, D), chain (K,), depth (K,): prompts from general to specific
    skipped.jsonl                       what --on-error skip left out, and why
    meta.json                           what the cache is; written last, so that its presence means the rest is whole
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from scipy import sparse
from tqdm import tqdm

from utils.config import HOME
from utils.errors import UserError
from utils.files import atomic, read_json, save_array, save_arrays, write_json, write_lines

FLUSH = 256  # images, or four times as many captions, between two records of progress
WORKING = "unfinished"  # folder inside the split's folder that holds what a killed run had done
META, PROGRESS = "meta.json", "progress.json"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def read_meta(folder):
    """Read what a cache says of itself; raises UserError where meta.json is damaged."""
    try:
        meta = read_json(folder / META)
        if meta["complete"] is True:
            return meta
    except UNREADABLE:
        pass
    raise UserError(f"{folder / META} is damaged: delete {folder} and cache the split again.")


def cache_folder(dataset, backbone, split):
    return Path("embeddings", dataset, backbone, split)


def encoder_fingerprint(encoder):
    """Identify a backbone by architecture and weights, without loading it: 16 hex digits."""
    digest = hashlib.sha256(f"{encoder.model} {encoder.pretrained is None}".encode())
    if encoder.architecture:
        digest.update((HOME / encoder.architecture).read_bytes())
    if encoder.pretrained:
        file = encoder.weights_file
        digest.update(file.read_bytes() if file else encoder.pretrained.encode())
    return digest.hexdigest()[:16]


def listing_fingerprint(source, images, captions):
    """Identify what a split lists: ids, file names, captions and the source's version, not the folder they lie in."""
    digest = hashlib.sha256(f"{type(source).__name__} {source.version}\n".encode())
    for image in images:
        digest.update(f"{image.id}\t{Path(image.place).name}\n".encode())
    for caption in captions:
        digest.update(f"{caption.id}\t{caption.image_id}\t{caption.text}\n".encode())
    return digest.hexdigest()[:16]


class Pairs:
    """An opened cache: memory-mapped embeddings of N images and M captions, and what is known of them.

    Raises UserError where the cache is missing or unfinished.
    """

    def __init__(self, dataset, backbone, split):
        self.folder = cache_folder(dataset, backbone, split)
        self.command = f"python cache_embeddings.py --dataset {dataset} --backbone {backbone} --splits {split}"
        if not (self.folder / META).is_file():
            state = "unfinished" if (self.folder / WORKING).is_dir() else "missing"
            again = " again" * (state == "unfinished")
            raise UserError(f"the cache {self.folder.absolute()} is {state}: run `{self.command}`{again}.")
        self.meta = read_meta(self.folder)
        self.image, self.text = self._array("image"), self._array("text")
        self.image_of_text = np.asarray(self._array("image_of_text"))
        shapes = (self.meta["images"], self.meta["dim"]), (self.meta["captions"], self.meta["dim"])
        if (self.image.shape, self.text.shape) != shapes or len(self.image_of_text) != len(self.text):
            raise UserError(
                f"the cache {self.folder} holds other sizes than its {META} says: delete it and run `{self.command}`."
            )

    def _read(self, name, read):
        """Read one of the cache's files; one that meta.json lists must be there, another gives None."""
        if name not in self.meta["files"]:
            return None
        try:
            return read(self.folder / name)
        except UNREADABLE as error:
            raise UserError(
                f"{self.folder / name} cannot be read ({error}): delete {self.folder} and run `{self.command}`."
            ) from None

    def _array(self, name):
        return self._read(f"{name}.npy", lambda path: np.load(path, mmap_mode="r"))

    @property
    def dim(self):
        return self.meta["dim"]

    @property
    def identity(self):
        """What an adaptor trained on these embeddings depends on."""
        return {name: self.meta[name] for name in ("dim", "encoder", "encoder_fingerprint", "fingerprint")}

    def must_fit(self, identity, checkpoint):
        """Raise a UserError unless an adaptor trained on embeddings of `identity` can be applied to these."""
        if self.dim != identity["dim"]:
            kind = f"embeddings of size {identity['dim']}, but {self.folder} holds size {self.dim}"
        elif self.meta["encoder_fingerprint"] != identity["encoder_fingerprint"]:
            kind = f"another backbone than {self.folder} was cached with"
        else:
            return
        raise UserError(f"{checkpoint} was trained on {kind}: cache and train with the same backbone.")

    @cached_property
    def matches(self):
        """Which images each caption is true of, sparse (N, M), or None where the source does not know."""
        return self._read("matches.npz", lambda path: sparse.load_npz(path).tocsc())

    @cached_property
    def chains(self):
        """Prompts from general to specific: dict of text (K, D), chain (K,), depth (K,), or None."""
        return self._read("chains.npz", lambda path: dict(np.load(path)))

    @cached_property
    def items(self):
        """Image paths and captions in row order: {"image": [...], "text": [...], "prompt": [...]}."""

        def read(path):
            items = {"image": [], "text": [], "prompt": []}
            for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):  # captions may hold other line ends
                item = json.loads(line)
                items[item["kind"]].append(item["value"])
            return items

        return self._read("items.jsonl", read)

    def to(self, device):
        """Put the pairs on `device`: float16 image (N, D) and text (M, D), int64 image_of_text (M,)."""
        arrays = (self.image, self.text, self.image_of_text)
        return tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)


def hold_out(image_of_text, fraction, seed, block=1024, most=5):
    """Split captions by their images: rows to train on, and a list of blocks of held-out rows, no image twice in one.

    image_of_text: (M,). fraction: of the images that is held out; none gives no block. most: blocks that are given. Two
    captions of an image in one block would each be a wrong answer to the other's image. Raises UserError where fewer
    than two images would be left of either part.
    """
    captions = np.bincount(image_of_text)
    held = round(fraction * len(captions))
    rows = torch.arange(len(image_of_text))
    if not fraction:
        return rows, []
    if not 2 <= held <= len(captions) - 2:
        raise UserError(
            f"--val-fraction {fraction} holds out {held} of {len(captions)} images: leave two or more on either side,"
            " or hold out none with --val-fraction 0."
        )
    out = np.isin(image_of_text, np.random.default_rng(seed).permutation(len(captions))[:held])
    order, starts = np.argsort(image_of_text, kind="stable"), np.cumsum(captions) - captions
    number = np.empty(len(order), dtype=np.int64)  # of each caption among its image's
    number[order] = np.arange(len(order)) - np.repeat(starts, captions)
    blocks = [rows[out & (number == k)].split(block) for k in range(number[out].max() + 1)]
    # A block of one pair has no wrong answer to learn from.
    return rows[~out], [part for parts in blocks for part in parts if len(part) > 1][:most]


def write_cache(folder, identity, split, backbone, on_error="stop", quiet=False):
    """Encode a split into `folder`, going on from where an earlier call was killed; the caller holds the folder's lock.

    identity: dict that says what the cache is; work found unfinished is gone on with if its `fingerprint` is equal.
    split: dict of images, captions, matches, chains and skipped. backbone: encodes. on_error: `stop` raises a UserError
    at an image that cannot be read; `skip` leaves it and its captions out.
    """
    images, captions = split["images"], split["captions"]
    work = folder / WORKING
    (folder / META).unlink(missing_ok=True)
    progress = _progress(work, identity["fingerprint"])

    def store(name, rows):
        """Open the array of what is encoded so far, and the bar that shows it."""
        new = {"mode": "w+", "dtype": np.float16, "shape": (rows, backbone.dim)}
        array = np.lib.format.open_memmap(work / f"{name}.npy", **({"mode": "r+"} if progress[name] else new))
        return array, tqdm(total=rows, initial=progress[name], desc=name, unit=name, disable=quiet or None)

    def record(array, bar, name, done):
        array.flush()
        bar.update(done - progress[name])
        progress[name] = done
        write_json(work / PROGRESS, progress)

    if on_error == "stop" and progress["unreadable"]:  # left by a run that skipped, and perhaps mended since
        first = min(map(int, progress["unreadable"]))
        progress |= {"image": first - first % backbone.config.batch_size, "unreadable": {}}
    image, bar = store("image", len(images))
    with bar:
        for start, encoded, unreadable in _encoded_images(images, progress["image"], backbone):
            if unreadable and on_error == "stop":
                row, reason = next(iter(unreadable.items()))
                raise UserError(
                    f"the image {images[int(row)].path} cannot be read ({reason}): mend or remove it, or leave such"
                    " images and their captions out with --on-error skip."
                )
            done = start + len(encoded)
            image[start:done] = encoded
            progress["unreadable"].update(unreadable)
            if done // FLUSH > start // FLUSH or done == len(images):
                record(image, bar, "image", done)
    text, bar = store("text", len(captions))
    with bar:
        for start in range(progress["text"], len(captions), 4 * FLUSH):
            block = [caption.text for caption in captions[start : start + 4 * FLUSH]]
            text[start : start + len(block)] = _encoded_texts(block, backbone)
            record(text, bar, "text", start + len(block))
    _finish(folder, identity, split, backbone, image, text, progress["unreadable"])
    shutil.rmtree(work)


def write_given(folder, identity, split, source):
    """Write a split whose source gives its embeddings into `folder`; the caller holds the folder's lock.

    identity, split: as for `write_cache`, split with embeddings. source: has their model's logit_scale and logit_bias.
    """
    (folder / META).unlink(missing_ok=True)
    _finish(folder, identity, split, source, *split["embeddings"], unreadable={})


def _progress(work, fingerprint):
    """Read how far a killed run with the same fingerprint came, and what it could not read; or begin anew."""
    file = work / PROGRESS
    with contextlib.suppress(*UNREADABLE):
        progress = read_json(file)
        if progress["fingerprint"] == fingerprint:
            return progress
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return {"fingerprint": fingerprint, "image": 0, "text": 0, "unreadable": {}}


class _Decoded(torch.utils.data.Dataset):
    """Image files as the transform sees them, with the reason in place of those that cannot be read."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            with PIL.Image.open(self.images[index].path) as image:
                return self.transform(image)
        except Exception as error:  # Pillow raises a dozen kinds on a broken file
            return f"{type(error).__name__}: {error}"


def _encoded_images(images, first, backbone):
    """Yield (first row, float16 (n, D), {row as a string: reason}) batch by batch, from row `first` on."""
    remaining = images[first:]
    size = backbone.config.batch_size
    workers = min(8, os.cpu_count() or 1) if len(remaining) > 4 * size else 0
    loader = torch.utils.data.DataLoader(
        _Decoded(remaining, backbone.transform), batch_size=size, num_workers=workers, collate_fn=list
    )
    for number, batch in enumerate(loader):
        start = first + number * size
        unreadable = {str(start + i): item for i, item in enumerate(batch) if isinstance(item, str)}
        good = [i for i, item in enumerate(batch) if not isinstance(item, str)]
        encoded = np.zeros((len(batch), backbone.dim), dtype=np.float16)
        if good:
            encoded[good] = _half(backbone.encode_images(torch.stack([batch[i] for i in good])))
        yield start, encoded, unreadable


def _encoded_texts(texts, backbone):
    """Encode strings, shortest first so that a batch is cut to about its own length; float16 (n, D) in given order."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    encoded = np.empty((len(texts), backbone.dim), dtype=np.float16)
    for rows in np.array_split(order, max(1, len(order) // (4 * backbone.config.batch_size))):
        if len(rows):
            encoded[rows] = _half(backbone.encode_texts([texts[row] for row in rows]))
    return encoded


def _half(encoded):
    """Turn embeddings into the float16 of the cache; raises UserError where that cannot hold them."""
    encoded = encoded.half().cpu().numpy()
    if not np.isfinite(encoded).all():
        raise UserError("the backbone gives embeddings that are not finite in float16: are its weights whole?")
    return encoded


def _finish(folder, identity, split, backbone, image, text, unreadable):
    """Write the cache's files from all that is encoded, less the rows that could not be read; meta.json comes last.

    backbone: what encoded, or the source that gave the embeddings.
    """
    images, captions = split["images"], split["captions"]
    keep_image = np.array([str(row) not in unreadable for row in range(len(images))])
    row_of_id = {item.id: row for row, item in enumerate(images)}
    image_of_text = np.array([row_of_id[caption.image_id] for caption in captions])
    keep_text = keep_image[image_of_text]
    if not keep_text.any():
        raise UserError(f"nothing is left to cache in {folder}: no image of the split could be read.")
    for name in ("matches.npz", "chains.npz"):  # a cache that is replaced may have had them where this one has none
        (folder / name).unlink(missing_ok=True)
    save_array(folder / "image.npy", image[keep_image])
    save_array(folder / "text.npy", text[keep_text])
    save_array(folder / "image_of_text.npy", (np.cumsum(keep_image) - 1)[image_of_text][keep_text])
    save_array(folder / "image_id.npy", np.array([item.id for item in images])[keep_image])
    save_array(folder / "text_id.npy", np.array([caption.id for caption in captions])[keep_text])
    items = [("image", item.place) for item, keep in zip(images, keep_image) if keep]
    items += [("text", caption.text) for caption, keep in zip(captions, keep_text) if keep]
    prompts = [(i, depth, prompt) for i, chain in enumerate(split["chains"]) for depth, prompt in enumerate(chain)]
    items += [("prompt", prompt) for _, _, prompt in prompts]
    write_lines(folder / "items.jsonl", [{"kind": kind, "value": value} for kind, value in items])
    if split["matches"] is not None:
        with atomic(folder / "matches.npz") as partial, open(partial, "wb") as file:
            sparse.save_npz(file, split["matches"][keep_image][:, keep_text])
    if prompts:
        chain, depth, texts = zip(*prompts)
        save_arrays(folder / "chains.npz", text=_encoded_texts(texts, backbone), chain=chain, depth=depth)
    skipped = split["skipped"] + [
        {"image_id": images[int(row)].id, "path": str(images[int(row)].path), "reason": reason}
        for row, reason in unreadable.items()
    ]
    write_lines(folder / "skipped.jsonl", skipped)
    about = {
        "dim": image.shape[1],
        "images": int(keep_image.sum()),
        "captions": int(keep_text.sum()),
        "skipped": len(skipped),
        "logit_scale": backbone.logit_scale,
        "logit_bias": backbone.logit_bias,
        "files": sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".npz", ".jsonl")),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "pillow")},
        "complete": True,
    }
    write_json(folder / META, identity | about)


def identity(config, split, source, images, captions):
    """Say what a cache is before it is written: names, the backbone's and the listing's fingerprint, and one of all."""
    said = {
        "dataset": config.dataset,
        "split": split,
        "backbone": config.backbone,
        "encoder": dataclasses.asdict(config.encoder),
        "encoder_fingerprint": encoder_fingerprint(config.encoder),
        "listing_fingerprint": listing_fingerprint(source, images, captions),
    }
    digest = hashlib.sha256(f"{said['encoder_fingerprint']} {said['listing_fingerprint']} {split}".encode())
    return said | {"fingerprint": digest.hexdigest()[:16]}
