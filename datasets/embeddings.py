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

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
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

FLUSH = 1024  # images, or four times as many captions, between two records of progress
WORKING = "unfinished"  # folder inside the split's folder that holds what a killed run had done


def cache_folder(dataset, backbone, split):
    return Path("embeddings", dataset, backbone, split)


def encoder_fingerprint(encoder):
    """Identify a backbone by architecture and weights, without loading it: 16 hex digits."""
    digest = hashlib.sha256(encoder.model.encode())
    for name in (encoder.architecture, encoder.pretrained):
        path = HOME / (name or "")
        digest.update(path.read_bytes() if path.is_file() else str(name).encode())
    return digest.hexdigest()[:16]


def listing_fingerprint(images, captions):
    """Identify what a split lists: ids, file names and captions, not the folder they lie in."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.id}\t{image.path.name}\n".encode())
    for caption in captions:
        digest.update(f"{caption.id}\t{caption.image_id}\t{caption.text}\n".encode())
    return digest.hexdigest()[:16]


class Pairs:
    """An opened cache: memory-mapped embeddings of N images and M captions, and what is known of them.

    Raises UserError where the cache is missing or unfinished.
    """

    def __init__(self, dataset, backbone, split):
        self.folder = cache_folder(dataset, backbone, split)
        command = f"python cache_embeddings.py --dataset {dataset} --backbone {backbone}"
        if not (self.folder / "meta.json").is_file():
            state = "unfinished" if (self.folder / WORKING).is_dir() else "missing"
            raise UserError(f"the cache {self.folder} is {state}: run `{command}`{' again' * (state != 'missing')}.")
        self.meta = read_json(self.folder / "meta.json")
        self.image, self.text = self._array("image"), self._array("text")
        self.image_of_text = np.asarray(self._array("image_of_text"))
        shapes = (self.meta["images"], self.meta["dim"]), (self.meta["captions"], self.meta["dim"])
        if (self.image.shape, self.text.shape) != shapes or len(self.image_of_text) != len(self.text):
            raise UserError(
                f"the cache {self.folder} holds other sizes than its meta.json says: run `{command} --overwrite`."
            )

    def _array(self, name):
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): cache the split again with --overwrite.") from None

    @property
    def dim(self):
        return self.meta["dim"]

    @property
    def identity(self):
        """What an adaptor trained on these embeddings depends on."""
        return {name: self.meta[name] for name in ("dim", "encoder_fingerprint", "fingerprint")}

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
        path = self.folder / "matches.npz"
        return sparse.load_npz(path).tocsc() if path.is_file() else None

    @cached_property
    def chains(self):
        """Prompts from general to specific: dict of text (K, D), chain (K,), depth (K,), or None."""
        path = self.folder / "chains.npz"
        return dict(np.load(path)) if path.is_file() else None

    @cached_property
    def items(self):
        """Image paths and captions in row order: {"image": [...], "text": [...]}."""
        items = {"image": [], "text": []}
        with open(self.folder / "items.jsonl", encoding="utf-8") as lines:
            for line in lines:
                item = json.loads(line)
                if item["kind"] in items:
                    items[item["kind"]].append(item["value"])
        return items

    def to(self, device):
        """Put the pairs on `device`: float16 image (N, D) and text (M, D), int64 image_of_text (M,)."""
        arrays = (self.image, self.text, self.image_of_text)
        return tuple(torch.from_numpy(np.array(array)).to(device) for array in arrays)


def write_cache(folder, identity, split, backbone, on_error="stop", quiet=False):
    """Encode a split into `folder`, going on from where an earlier call was killed.

    identity: dict that says what the cache is; its `fingerprint` must equal the one of work found unfinished.
    split: dict of images, captions, matches, chains and skipped. backbone: encodes. on_error: `stop` raises a UserError
    at an image that cannot be read; `skip` leaves it and its captions out.
    """
    images, captions = split["images"], split["captions"]
    work = folder / WORKING
    progress_file = work / "progress.json"
    progress = read_json(progress_file) if progress_file.is_file() else None
    if progress is None or progress["fingerprint"] != identity["fingerprint"]:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        progress = {"fingerprint": identity["fingerprint"], "image": 0, "text": 0, "unreadable": {}}

    def store(name, rows):
        """Open the array of what is encoded so far, and the bar that shows it."""
        new = {"mode": "w+", "dtype": np.float16, "shape": (rows, backbone.dim)}
        array = np.lib.format.open_memmap(work / f"{name}.npy", **({"mode": "r+"} if progress[name] else new))
        return array, tqdm(total=rows, initial=progress[name], desc=name, unit=name, disable=quiet or None)

    def record(array, bar, name, done):
        array.flush()
        bar.update(done - progress[name])
        progress[name] = done
        write_json(progress_file, progress)

    image, bar = store("image", len(images))
    with bar:
        for start, encoded, unreadable in _encoded_images(images, progress["image"], backbone):
            done = start + len(encoded)
            image[start:done] = encoded
            progress["unreadable"].update(unreadable)
            if on_error == "stop" and progress["unreadable"]:
                break
            if done // FLUSH > start // FLUSH or done == len(images):
                record(image, bar, "image", done)
    if on_error == "stop" and progress["unreadable"]:
        row, reason = next(iter(progress["unreadable"].items()))
        raise UserError(
            f"the image {images[int(row)].path} cannot be read ({reason}): mend or remove it, or leave such images and"
            " their captions out with --on-error skip."
        )
    text, bar = store("text", len(captions))
    with bar:
        for start in range(progress["text"], len(captions), 4 * FLUSH):
            block = [caption.text for caption in captions[start : start + 4 * FLUSH]]
            text[start : start + len(block)] = _encoded_texts(block, backbone)
            record(text, bar, "text", start + len(block))
    _finish(folder, identity, split, backbone, image, text, progress["unreadable"])
    shutil.rmtree(work)


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
            encoded[good] = backbone.encode_images(torch.stack([batch[i] for i in good])).half().cpu().numpy()
        yield start, encoded, unreadable


def _encoded_texts(texts, backbone):
    """Encode strings, shortest first so that a batch is cut to about its own length; float16 (n, D) in given order."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    encoded = np.empty((len(texts), backbone.dim), dtype=np.float16)
    for rows in np.array_split(order, max(1, len(order) // (4 * backbone.config.batch_size))):
        if len(rows):
            encoded[rows] = backbone.encode_texts([texts[row] for row in rows]).half().cpu().numpy()
    return encoded


def _finish(folder, identity, split, backbone, image, text, unreadable):
    """Write the cache's files from all that is encoded, less the rows that could not be read; meta.json comes last."""
    images, captions = split["images"], split["captions"]
    keep_image = np.array([str(row) not in unreadable for row in range(len(images))])
    row_of_id = {item.id: row for row, item in enumerate(images)}
    image_of_text = np.array([row_of_id[caption.image_id] for caption in captions])
    keep_text = keep_image[image_of_text]
    if not keep_text.any():
        raise UserError(f"nothing is left to cache in {folder}: no image of the split could be read.")
    save_array(folder / "image.npy", image[keep_image])
    save_array(folder / "text.npy", text[keep_text])
    save_array(folder / "image_of_text.npy", (np.cumsum(keep_image) - 1)[image_of_text][keep_text])
    save_array(folder / "image_id.npy", np.array([item.id for item in images])[keep_image])
    save_array(folder / "text_id.npy", np.array([caption.id for caption in captions])[keep_text])
    items = [("image", str(item.path)) for item, keep in zip(images, keep_image) if keep]
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
        "dim": backbone.dim,
        "images": int(keep_image.sum()),
        "captions": int(keep_text.sum()),
        "skipped": len(skipped),
        "logit_scale": backbone.logit_scale,
        "logit_bias": backbone.logit_bias,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "pillow")},
        "complete": True,
    }
    write_json(folder / "meta.json", identity | about)


def identity(config, split, images, captions):
    """Say what a cache is before it is written: names, the backbone's and the listing's fingerprint, and one of all."""
    said = {
        "dataset": config.dataset,
        "split": split,
        "backbone": config.backbone,
        "encoder": dataclasses.asdict(config.encoder),
        "encoder_fingerprint": encoder_fingerprint(config.encoder),
        "listing_fingerprint": listing_fingerprint(images, captions),
    }
    digest = hashlib.sha256(f"{said['encoder_fingerprint']} {said['listing_fingerprint']} {split}".encode())
    return said | {"fingerprint": digest.hexdigest()[:16]}
