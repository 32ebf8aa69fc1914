"""Write the cache of frozen embeddings: what it is, and all its files from what blocks hold or a source gives."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import shutil

import numpy as np
from scipy import sparse

from datasets import listing as listings
from datasets.blocks import BlockEncoder, Blocks
from datasets.embeddings import LAYOUT, META, encoder_fingerprint
from utils.errors import UserError
from utils.files import atomic, save_array, save_arrays, write_json, write_lines

GIVEN = "given"  # the precision of embeddings that were computed elsewhere


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
        "files_fingerprint": listings.files_fingerprint(listing),
    }
    parts = [str(value) for name, value in said.items() if name in ("layout", "split") or name.endswith("fingerprint")]
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


def write_cache(folder, identity, source, listing, backbone, ranks, **options):
    """Encode a split into `folder` together with the other ranks, of which the first holds the folder's lock.

    identity: what the cache is. source, listing: what to encode. backbone: what with. options: those of BlockEncoder.
    Raises UserError at what cannot be read or encoded; what is done by then is kept, and gone on from.
    """
    pooled = identity["features"] == "pooled"
    identity = identity | {"precision": backbone.precision}
    plan = {"batch_size": backbone.config.batch_size} | {
        name: identity[name] for name in ("encoder_fingerprint", "listing_fingerprint", "precision", "features")
    }
    # What the files hold is no part of the plan: blocks whose files are as they were stay when one is mended.
    mine = plan | {"files_fingerprint": identity["files_fingerprint"]}
    if ranks.told(mine) != mine:
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
    counts = {"image": len(listing.images), "text": len(listing.captions), "prompt": len(prompts)}
    error, cut, unreadable = {"image": 0.0, "text": 0.0}, 0, {}
    for kind in counts:
        for rows, block in encoder.parts(kind, counts[kind]):
            side = "image" if kind == "image" else "text"
            error[side] = max(error[side], float(block["error"]))
            if kind == "image":
                unreadable |= {rows[i]: str(reason) for i, reason in zip(block["bad"], block["reason"], strict=True)}
            elif kind == "text":
                cut += int(block["cut"])
    keep_image, keep_text = _kept(listing, unreadable)
    keep = {"image": keep_image, "text": keep_text, "prompt": np.full(len(prompts), True)}

    def arrays(kind, name):
        return (block[name][keep[kind][rows.start : rows.stop]] for rows, block in encoder.parts(kind, counts[kind]))

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
