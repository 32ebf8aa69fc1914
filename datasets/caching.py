"""Write the cache of frozen embeddings: its identity, and its files from encoded blocks or a source's embeddings."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import math
import shutil

import numpy as np
from scipy import sparse

from datasets import listing as listings
from datasets.blocks import BlockEncoder, Blocks
from datasets.embeddings import LAYOUT, META, encoder_fingerprint, stamp_of
from datasets.parts import PART, Parts
from utils.errors import UserError
from utils.files import atomic, save_array, save_arrays, write_json, write_lines

GIVEN = "given"  # the precision of embeddings that were computed elsewhere


def identity(config, split, source, listing, features):
    """Describe a cache before it is written: names, fingerprints of backbone and listing, and one of them all."""
    identity = {
        "layout": LAYOUT,
        "dataset": config.dataset,
        "split": split,
        "backbone": config.backbone,
        "encoder": dataclasses.asdict(config.encoder),
        "features": features,
        "id_space": listing.id_space,
        "encoder_fingerprint": encoder_fingerprint(config.encoder),
        "listing_fingerprint": listings.fingerprint(source, listing),
        "files_fingerprint": listings.files_fingerprint(listing),
    }
    names = [name for name in identity if name in ("layout", "split") or name.endswith("fingerprint")]
    digest = hashlib.sha256(" ".join(str(identity[name]) for name in names).encode())
    return identity | {"fingerprint": digest.hexdigest()[:16]}


def mismatch(existing, wanted):
    """Compare the identities of an existing and the wanted cache; returns how the existing one differs, or ""."""
    if existing.get("layout") != wanted["layout"]:
        return "by another version of this suite"
    if existing["encoder_fingerprint"] != wanted["encoder_fingerprint"]:
        return "with a different backbone than requested"
    if existing["fingerprint"] != wanted["fingerprint"]:
        return "from a different list of images and captions than requested"
    if wanted["features"] == "pooled" and existing["features"] != "pooled":
        return "without the requested pooled features"
    precision = wanted["encoder"]["precision"]
    if precision != "auto" and existing["precision"] not in (precision, GIVEN):
        return f"in {existing['precision']}, not in {precision}"
    return ""


def write_cache(folder, identity, source, listing, backbone, ranks, **options):
    """Encode a split into `folder` together with the other ranks; the first rank holds the folder's lock.

    identity: as `identity` returns it. source, listing: what to encode. options: passed to BlockEncoder. Raises
    UserError if something cannot be read or encoded; the finished blocks are kept, and the next call goes on from them.
    """
    pooled = identity["features"] == "pooled"
    identity = identity | {"precision": backbone.precision}
    plan = {"batch_size": backbone.config.batch_size} | {
        name: identity[name] for name in ("encoder_fingerprint", "listing_fingerprint", "precision", "features")
    }
    # The plan excludes the content of files: if one image is fixed, the blocks of the others remain valid.
    job = plan | {"files_fingerprint": identity["files_fingerprint"]}
    if ranks.broadcast(job) != job:
        raise UserError(
            f"process {ranks.rank} of {ranks.world} lists other images and captions than the first, or computes in"
            " another precision: give all the same files, and devices of one kind or --set encoder.precision."
        )
    blocks = Blocks(folder)
    if ranks.first:
        blocks.begin(plan)
    ranks.broadcast(None)
    encoder = BlockEncoder(blocks, backbone, ranks, pooled, **options)
    prompts = [prompt for chain in listing.chains for prompt in chain]
    # Texts come first: they take less time, and a missing tokenizer stops the run before hours of images.
    encoder.texts("text", [caption.text for caption in listing.captions])
    encoder.texts("prompt", prompts)
    encoder.images(source, listing.images)
    ranks.broadcast(None)
    _join(folder, identity, listing, backbone, encoder, prompts, ranks)
    if ranks.first:
        shutil.rmtree(blocks.folder)
    ranks.broadcast(None)


def _join(folder, identity, listing, backbone, encoder, prompts, ranks):
    """Write the cache from all blocks, without the images that could not be read and their captions.

    Embeddings of more than PART rows become several files, of which every rank writes some; the first writes the rest.
    """
    counts = {"image": len(listing.images), "text": len(listing.captions), "prompt": len(prompts)}

    def gathered():
        """The largest error of each side, and counts: captions cut, pictures repeated; reasons of unreadable rows."""
        error, cut, hashes, unreadable = {"image": 0.0, "text": 0.0}, 0, [], {}
        for kind in counts:
            for rows, block in encoder.parts(kind, counts[kind]):
                side = "image" if kind == "image" else "text"
                error[side] = max(error[side], float(block["error"]))
                if kind == "image":
                    bad = zip(block["bad"], block["reason"], strict=True)
                    unreadable |= {rows[i]: str(reason) for i, reason in bad}
                    hashes.append(block["hashes"])
                elif kind == "text":
                    cut += int(block["cut"])
        hashes = np.concatenate(hashes)
        return error, cut, len(hashes) - len(np.unique(hashes)), unreadable

    error, cut, repeated, unreadable = ranks.from_first(gathered)  # it reads every block whole
    keep_image, keep_text = _kept(listing, unreadable)
    keep = {"image": keep_image, "text": keep_text, "prompt": np.full(len(prompts), True)}

    def arrays(kind, name, chosen=slice(None)):
        blocks = encoder.parts(kind, counts[kind], chosen)
        return (block[name][keep[kind][rows.start : rows.stop]] for rows, block in blocks)

    written = {}

    def write(kind, name, stem):
        """Copy the kept rows of all blocks into .npy files, block by block, as they may not fit into memory."""
        size = encoder.sizes[kind]
        each = max(1, PART // size)  # blocks of a file
        starts = range(0, math.ceil(counts[kind] / size), each)
        for number, start in enumerate(starts):
            file = f"{stem}-{number:05d}.npy" if len(starts) > 1 else f"{stem}.npy"
            kept = int(keep[kind][start * size : (start + each) * size].sum())
            if kept:
                written.setdefault(stem, []).append((file, kept))
            if not kept or number % ranks.world != ranks.rank:
                continue
            blocks = arrays(kind, name, slice(start, start + each))
            first = next(blocks)
            header = {"descr": "<f2", "fortran_order": False, "shape": (kept, first.shape[1])}
            with atomic(folder / file) as partial, open(partial, "wb") as npy:
                np.lib.format.write_array_header_1_0(npy, header)
                for block in itertools.chain([first], blocks):
                    npy.write(block.astype("<f2").tobytes())

    if ranks.first:
        _clear(folder)
    ranks.broadcast(None)
    for name, stem in [("embedding", "{}"), ("pooled", "{}_pooled")][: 1 + (identity["features"] == "pooled")]:
        for kind in ("image", "text"):
            write(kind, name, stem.format(kind))
    ranks.broadcast(None)
    if not ranks.first:
        return
    in_parts = {  # without the time, which a copy of the folder may change
        stem: [[file, kept, stamp_of(folder / file)[:1]] for file, kept in files]
        for stem, files in written.items()
        if files[0][0] != f"{stem}.npy"
    }
    identity = identity | ({"parts": in_parts} if in_parts else {})
    encoded_prompts = {}
    if identity["features"] == "pooled":
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
    counted = {"captions_cut": cut, "images_repeated": repeated, "unreadable": len(unreadable)}
    identity = identity | {"dim": backbone.dim} | counted
    _finish(folder, identity, listing, backbone, keep_image, keep_text, encoded_prompts, skipped)


def write_given(folder, identity, source, listing):
    """Write a split into `folder` whose source already has the embeddings; the caller holds the folder's lock.

    source: has the logit_scale and logit_bias of the model that made them.
    """
    _clear(folder)
    in_place = {}
    for name, array in zip(("image", "text"), listing.embeddings, strict=True):
        if not isinstance(array, Parts):
            save_array(folder / f"{name}.npy", array)
            continue
        lengths = np.diff(array.ends, prepend=0).tolist()
        listed = zip(array.parts, lengths, array.stamps, strict=True)
        in_place[name] = [[str(path), rows, stamp] for path, rows, stamp in listed]
        if array.rows is not None:
            save_array(folder / f"{name}_rows.npy", array.rows)
    identity = identity | ({"parts": in_place} if in_place else {})
    dim = listing.embeddings[0].shape[1]
    identity = identity | {"precision": GIVEN, "dim": dim, "captions_cut": 0, "unreadable": 0}
    keep_image, keep_text = _kept(listing, {})
    _finish(folder, identity, listing, source, keep_image, keep_text, {}, [])


def _clear(folder):
    """Delete the files of a cache that is about to be replaced: it may have arrays that the new one lacks."""
    (folder / META).unlink(missing_ok=True)
    for path in folder.glob("*.np[yz]"):
        path.unlink()


def _kept(listing, unreadable):
    """Return masks of the images (N,) and captions (M,) to keep; raises UserError if none are left."""
    keep_image = np.array([row not in unreadable for row in range(len(listing.images))])
    if not keep_image.any():
        raise UserError("nothing is left to cache: none of the split's images could be read.")
    if listing.classes is not None:
        return keep_image, np.full(len(listing.captions), True)
    return keep_image, keep_image[_image_of_text(listing)]


def _image_of_text(listing):
    row_of_id = {item.id: row for row, item in enumerate(listing.images)}
    return np.array([row_of_id[caption.image_id] for caption in listing.captions])


def _finish(folder, identity, listing, model, keep_image, keep_text, prompts, unreadable):
    """Write all files of a cache except its embeddings, meta.json last.

    model: the backbone, or the source that had the embeddings. prompts: arrays of the chains' prompts.
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
        names, labels = list(listing.classes.names), set(listing.classes.label[keep_image].tolist())
        identity = identity | {"classes": names, "templates": list(listing.classes.templates)}
        identity["classes_without_images"] = [name for number, name in enumerate(names) if number not in labels]
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
    if identity["encoder"]["library"] == "transformers":
        libraries.append("transformers")
    write_lines(folder / "skipped.jsonl", skipped)
    metadata = {
        "images": len(images),
        "captions": len(captions),
        "skipped": len(skipped),
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
        "files": sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".npz", ".jsonl")),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "complete": True,
    }
    write_json(folder / META, identity | metadata)
