"""Write the cache of frozen embeddings: block by block, by one process or several, killed and started again at will.

What is encoded lies in `unfinished/` inside the split's folder, one file per block of rows, each whole or absent. A
block is always encoded in the same batches, so its bytes depend neither on who encodes it nor on what was done before.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import shutil
import warnings

import numpy as np
import PIL.Image
import torch
from scipy import sparse
from tqdm import tqdm

from datasets import listing as listings
from datasets.embeddings import LAYOUT, META, UNREADABLE, WORKING, encoder_fingerprint
from utils.errors import UserError
from utils.files import atomic, read_json, save_array, save_arrays, write_json, write_lines

BLOCK = 256  # images of a block, or a whole batch if that is more
PROOF = 16  # images or captions on which pooled features are held against the ordinary encoding
TEXTS = 4096  # captions of a block: sorted by length, they are cut to about their own
PLAN = "plan.json"
GIVEN = "given"  # the precision of embeddings that were computed elsewhere
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}  # of the reconstruction of pooled features


def identity(config, split, source, listing, features):
    """Say what a cache is before it is written: names, the backbone's and the listing's fingerprint, and one of all."""
    said = {
        "layout": LAYOUT,
        "dataset": config.dataset,
        "split": split,
        "backbone": config.backbone,
        "encoder": dataclasses.asdict(config.encoder),
        "features": features,
        "id_space": listing.id_space,
        "encoder_fingerprint": encoder_fingerprint(config.encoder),
        "listing_fingerprint": listings.fingerprint(source, listing),
    }
    parts = [str(said[name]) for name in ("layout", "encoder_fingerprint", "listing_fingerprint", "split")]
    digest = hashlib.sha256(" ".join(parts).encode())
    return said | {"fingerprint": digest.hexdigest()[:16]}


def mismatch(held, wanted):
    """Say how a finished cache was made, if not as asked for, by the identities of both; nothing if it was."""
    if held.get("layout") != wanted["layout"]:
        return "by another version of this suite"
    if held["encoder_fingerprint"] != wanted["encoder_fingerprint"]:
        return "with another backbone than asked for"
    if held["fingerprint"] != wanted["fingerprint"]:
        return "of another list of images and captions than asked for"
    if wanted["features"] == "pooled" and held["features"] != "pooled":
        return "without the pooled features that are asked for"
    precision = wanted["encoder"]["precision"]
    if precision != "auto" and held["precision"] not in (precision, GIVEN):
        return f"in {held['precision']}, not in {precision}"
    return ""


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


def _stamp(image):
    """What changes when somebody mends an image's file."""
    try:
        found = image.path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    except (OSError, AttributeError):
        return ""


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
        self.image_block = -(-BLOCK // batch) * batch

    def _mine(self, kind, size, count, redo=lambda rows, block: False):
        """List this process's blocks that are still to be done, and a progress bar that knows of the others."""
        numbered = list(enumerate(_cut(count, size)))[self.ranks.rank :: self.ranks.world]
        todo = []
        for number, rows in numbered:
            block = self.blocks.read(kind, number, len(rows))
            if block is None or redo(rows, block):
                todo.append((number, rows))
        total, left = (sum(len(rows) for _, rows in which) for which in (numbered, todo))
        share = f" ({self.ranks.rank + 1} of {self.ranks.world})" * (self.ranks.world > 1)
        hidden = True if self.quiet or not self.ranks.first else None
        return todo, tqdm(total=total, initial=total - left, desc=kind + share, unit=kind, disable=hidden)

    def images(self, source, images):
        """Encode images that `source` opens; raises UserError at one that cannot be read, if told to stop there."""

        def redo(rows, block):
            """Whether an image that could not be read was mended since, or must not be left out any more."""
            stamps = [_stamp(images[rows[i]]) for i in block["bad"]]
            return bool(stamps) and (self.on_error == "stop" or stamps != block["stamp"].tolist())

        size = self.backbone.config.batch_size
        todo, bar = self._mine("image", self.image_block, len(images), redo)
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
                stamps = [_stamp(images[rows[i]]) for i in bad]
                marks = {"bad": np.array(list(bad), dtype=np.int64), "reason": np.array(list(bad.values()), dtype=str)}
                self.blocks.write("image", number, **_joined(parts), **marks, stamp=np.array(stamps, dtype=str))

    def texts(self, kind, texts):
        """Encode strings, each that is repeated once, in batches of about equal length."""
        todo, bar = self._mine(kind, TEXTS, len(texts))
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


def write_cache(folder, identity, source, listing, backbone, ranks, **options):
    """Encode a split into `folder` together with the other ranks, of which the first holds the folder's lock.

    identity: what the cache is. source, listing: what to encode. backbone: what with. options: those of BlockEncoder.
    Raises UserError at what cannot be read or encoded; what is done by then is kept, and gone on from.
    """
    pooled = identity["features"] == "pooled"
    identity = identity | {"precision": backbone.precision}
    plan = {name: identity[name] for name in ("fingerprint", "precision", "features")}
    plan["batch_size"] = backbone.config.batch_size
    if ranks.told(plan) != plan:
        raise UserError(
            f"process {ranks.rank} of {ranks.world} lists other images and captions than the first, or computes in"
            " another precision: all must see the same files, on devices of one kind or with --set encoder.precision."
        )
    blocks = Blocks(folder)
    if ranks.first:
        blocks.begin(plan)
    ranks.told(None)
    encoder = BlockEncoder(blocks, backbone, ranks, pooled, **options)
    prompts = [prompt for chain in listing.chains for prompt in chain]
    # Texts come first: they take less time, and a tokenizer that is missing ends the run before the images do.
    encoder.texts("text", [caption.text for caption in listing.captions])
    encoder.texts("prompt", prompts)
    encoder.images(source, listing.images)
    ranks.told(None)
    if ranks.first:
        _join(folder, identity, listing, backbone, encoder, prompts)
        shutil.rmtree(blocks.folder)
    ranks.told(None)


def _join(folder, identity, listing, backbone, encoder, prompts):
    """Make a cache of all blocks, less the rows of images that could not be read."""
    blocks, sizes = encoder.blocks, {"image": encoder.image_block, "text": TEXTS, "prompt": TEXTS}
    counts = {"image": len(listing.images), "text": len(listing.captions), "prompt": len(prompts)}
    error, cut, unreadable = {"image": 0.0, "text": 0.0}, 0, {}
    for kind in counts:
        for rows, block in blocks.parts(kind, sizes[kind], counts[kind]):
            side = "image" if kind == "image" else "text"
            error[side] = max(error[side], float(block["error"]))
            if kind == "image":
                unreadable |= {rows[i]: str(reason) for i, reason in zip(block["bad"], block["reason"], strict=True)}
            elif kind == "text":
                cut += int(block["cut"])
    keep_image, keep_text = _kept(listing, unreadable)
    keep = {"image": keep_image, "text": keep_text, "prompt": np.full(len(prompts), True)}

    def arrays(kind, name):
        return (
            block[name][keep[kind][rows.start : rows.stop]]
            for rows, block in blocks.parts(kind, sizes[kind], counts[kind])
        )

    def stored(kind, name, file):
        """Copy the kept rows of all blocks into one .npy, block by block: they may be more than the memory holds."""
        parts = arrays(kind, name)
        first = next(parts)
        header = {"descr": "<f2", "fortran_order": False, "shape": (int(keep[kind].sum()), first.shape[1])}
        with atomic(folder / file) as partial, open(partial, "wb") as written:
            np.lib.format.write_array_header_1_0(written, header)
            for part in itertools.chain([first], parts):
                written.write(part.astype("<f2").tobytes())

    _clear(folder)
    stored("image", "embedding", "image.npy")
    stored("text", "embedding", "text.npy")
    encoded_prompts = {}
    if identity["features"] == "pooled":
        stored("image", "pooled", "image_pooled.npy")
        stored("text", "pooled", "text_pooled.npy")
        projection = {
            f"{side}_{name}": value.cpu().numpy()
            for side in ("image", "text")
            for name, value in backbone.projection[side]._asdict().items()
            if value is not None
        }
        save_arrays(folder / "projection.npz", **projection)
        identity = identity | {"reconstruction_error": error}
        if prompts:
            encoded_prompts["pooled"] = np.concatenate(list(arrays("prompt", "pooled")))
    if prompts:
        encoded_prompts["text"] = np.concatenate(list(arrays("prompt", "embedding")))
    skipped = [
        {"image_id": listing.images[row].id, "path": listing.images[row].place, "reason": reason}
        for row, reason in unreadable.items()
    ]
    about = {"dim": backbone.dim, "captions_cut": cut, "unreadable": len(unreadable)}
    _finish(folder, identity | about, listing, backbone, keep_image, keep_text, encoded_prompts, skipped)


def write_given(folder, identity, source, listing):
    """Write a split whose source gives its embeddings into `folder`; the caller holds the folder's lock.

    source: has their model's logit_scale and logit_bias.
    """
    _clear(folder)
    for name, rows in zip(("image", "text"), listing.embeddings, strict=True):
        save_array(folder / f"{name}.npy", rows)
    about = {"precision": GIVEN, "dim": listing.embeddings[0].shape[1], "captions_cut": 0, "unreadable": 0}
    _finish(folder, identity | about, listing, source, *_kept(listing, {}), {}, [])


def _clear(folder):
    """Remove a cache that is about to be replaced, its arrays too: it may have had some that this one has not."""
    (folder / META).unlink(missing_ok=True)
    for path in folder.glob("*.np[yz]"):
        path.unlink()


def _kept(listing, unreadable):
    """Which images and captions stay, (N,) and (M,); raises UserError where none do."""
    keep_image = np.array([row not in unreadable for row in range(len(listing.images))])
    if not keep_image.any():
        raise UserError("nothing is left to cache: not one image of the split could be read.")
    if listing.classes is not None:
        return keep_image, np.full(len(listing.captions), True)
    return keep_image, keep_image[_image_of_text(listing)]


def _image_of_text(listing):
    row_of_id = {item.id: row for row, item in enumerate(listing.images)}
    return np.array([row_of_id[caption.image_id] for caption in listing.captions])


def _finish(folder, identity, listing, model, keep_image, keep_text, prompts, unreadable):
    """Write all files of a cache but its embeddings; meta.json comes last.

    model: what encoded, or the source that gave the embeddings. prompts: arrays of the chains' prompts.
    """
    images = [image for image, keep in zip(listing.images, keep_image) if keep]
    captions = [caption for caption, keep in zip(listing.captions, keep_text) if keep]
    if listing.classes is None:
        save_array(folder / "image_of_text.npy", (np.cumsum(keep_image) - 1)[_image_of_text(listing)][keep_text])
    else:
        save_array(folder / "class_of_text.npy", np.array([caption.image_id for caption in captions]))
        save_array(folder / "label.npy", np.asarray(listing.classes.label, dtype=np.int64)[keep_image])
        if listing.classes.human is not None:
            save_array(folder / "human.npy", np.asarray(listing.classes.human)[keep_image])
        identity = identity | {"classes": list(listing.classes.names), "templates": list(listing.classes.templates)}
    save_array(folder / "image_id.npy", np.array([image.id for image in images]))
    save_array(folder / "text_id.npy", np.array([caption.id for caption in captions]))
    steps = [(i, depth, prompt) for i, chain in enumerate(listing.chains) for depth, prompt in enumerate(chain)]
    items = [("image", image.place) for image in images] + [("text", caption.text) for caption in captions]
    items += [("prompt", prompt) for _, _, prompt in steps]
    write_lines(folder / "items.jsonl", [{"kind": kind, "value": value} for kind, value in items])
    if listing.matches is not None:
        with atomic(folder / "matches.npz") as partial, open(partial, "wb") as file:
            sparse.save_npz(file, listing.matches[keep_image][:, keep_text])
    if prompts:
        chain, depth, _ = zip(*steps)
        save_arrays(folder / "chains.npz", **prompts, chain=chain, depth=depth)
    skipped = listing.skipped + unreadable
    libraries = ["torch", "open_clip_torch", "pillow"]
    libraries += ["transformers"] * (identity["encoder"]["library"] == "transformers")
    write_lines(folder / "skipped.jsonl", skipped)
    about = {
        "images": len(images),
        "captions": len(captions),
        "skipped": len(skipped),
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
        "files": sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".npz", ".jsonl")),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "complete": True,
    }
    write_json(folder / META, identity | about)
