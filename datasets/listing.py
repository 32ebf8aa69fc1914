"""List the images and captions of a split before anything is encoded, without those that must be left out."""

import contextlib
import hashlib
import itertools
import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import sparse

from datasets import Caption, Classes, Image, is_id
from datasets.captions import spelled_list
from datasets.parts import choose
from utils.errors import UserError

SAMPLE = 16  # files whose content is hashed, to detect other pictures under the same names
OF_ALL = {  # what helps where no caption can be read, by what is wrong with the first
    "UTF-8": "save the file that holds them as UTF-8",
    "list of captions": "write each caption as an entry of its own",
    "not a string but [": "write each caption as an entry of its own",
    "": "name the column or key that holds them",
}


@dataclass
class Listing:
    """Images (N,) and captions (M,) of a split in row order, with the source's annotations."""

    images: list[Image]
    captions: list[Caption]  # if the images have classes: the prompts, class by class
    id_space: str
    classes: Classes | None = None
    embeddings: tuple | None = None  # (N, D) and (M, D), if the source has them
    matches: sparse.csc_array | None = None
    chains: list[list[str]] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)  # what was left out, and why
    sizes: dict = field(default_factory=dict)  # {path: bytes} of the files that hold images


def list_split(source, split, on_error="stop"):
    """List a split, and handle images without a file and captions that no tokenizer can read.

    on_error: stop raises a UserError at the first of them; skip leaves them out, with the captions of such images.
    """
    images, classes = source.images(split), source.classes(split)
    captions = source.captions(split) or ([] if classes is None else _prompts(classes))
    embeddings, matches, chains = source.embeddings(split), source.matches(split), source.chains(split)
    _check_ids(f"image of '{split}'", images, lambda image: image.place)
    _check_ids(f"caption of '{split}'", captions, lambda caption: caption.text)
    for prompt in itertools.chain(*chains):
        if fault := _fault(prompt):
            raise UserError(f"the prompt {prompt!a:.80} of a chain of '{split}' {fault}: fix it.")
    images = [image if image.path is None else image._replace(path=_on_disk(image.path)) for image in images]
    sizes = {path: _size(path) for path in dict.fromkeys(image.path for image in images if image.path is not None)}
    absent = {image.id for image in images if image.path is not None and sizes[image.path] is None}
    reasons = [_fault(caption.text) for caption in captions]
    if absent and on_error == "stop":
        first = next(image for image in images if image.id in absent)
        if re.search("[\udc80-\udcff]", first.path.name) and len(absent) == len(images):
            hint = "save the file that lists them as UTF-8"
            raise UserError(f"no image of '{split}' is there, as the name of {first.place} is not UTF-8: {hint}.")
        raise UserError(
            f"{len(absent):,} of the {len(images):,} images of '{split}' are absent from {first.path.parent} (the first"
            f" is {first.path.name}): complete the folder, or leave them and their captions out with --on-error skip."
        )
    faults = [(caption, reason) for caption, reason in zip(captions, reasons, strict=True) if reason]
    if faults and classes is not None:
        raise UserError(f"the prompt {faults[0][0].text!a} of '{split}' {faults[0][1]}: every class needs its prompts.")
    by_id = {image.id: image for image in images}
    lost = next((caption for caption in captions if classes is None and caption.image_id not in by_id), None)
    if lost is not None:
        problem = f"describes image {lost.image_id!r:.40}, which is not among the images"
        raise UserError(f"caption {lost.id} of '{split}' {problem}: list the image, or leave the caption out.")
    if faults and on_error == "stop":
        first, reason = faults[0]
        more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
        where = f" ({first.where})" if first.where else ""
        if len(faults) == len(captions) > 1:
            hint = next(hint for part, hint in OF_ALL.items() if part in reason)
            first = f"the first{where} is of {by_id[first.image_id].place}"
            raise UserError(f"no caption of '{split}' can be read, as the first {reason}: {hint}; {first}.")
        caption = f"caption {first.id} of '{split}'{where}, of {by_id[first.image_id].place},"
        raise UserError(f"{caption} {reason}{more}: fix it, or leave it out with --on-error skip.")
    skipped = [{"image_id": i.id, "path": i.place, "reason": "absent"} for i in images if i.id in absent]
    if source.distinct:
        seen = set()
        for row, caption in enumerate(captions):
            if not reasons[row]:
                reasons[row] = "is listed twice" if caption[1:3] in seen else ""
                seen.add(caption[1:3])
    left_out = [(caption, reason) for caption, reason in zip(captions, reasons) if reason]
    skipped += [{"text_id": c.id, "path": by_id[c.image_id].place, "reason": reason} for c, reason in left_out]
    if classes is None:
        kept = [c.image_id not in absent and not reason for c, reason in zip(captions, reasons, strict=True)]
        keep_text = np.array(kept, dtype=bool)
        described = {caption.image_id for caption, keep in zip(captions, keep_text) if keep}
        # An image without captions can be neither query nor answer.
        undescribed = [image for image in images if image.id not in described and image.id not in absent]
        skipped += [{"image_id": image.id, "path": image.place, "reason": "no caption"} for image in undescribed]
    else:
        keep_text, described = np.full(len(captions), True), {image.id for image in images} - absent
    keep_image = np.array([image.id in described for image in images], dtype=bool)
    if not (keep_image.any() and keep_text.any()):
        raise UserError(f"nothing is left to cache of '{split}': none of its {len(images):,} images can be used.")
    if classes is not None:
        human = None if classes.human is None else classes.human[keep_image]
        classes = classes._replace(label=np.asarray(classes.label)[keep_image], human=human)
    return Listing(
        images=[image for image, keep in zip(images, keep_image) if keep],
        captions=[caption for caption, keep in zip(captions, keep_text) if keep],
        id_space=source.id_space(split),
        classes=classes,
        embeddings=None
        if embeddings is None
        else (choose(embeddings[0], keep_image), choose(embeddings[1], keep_text)),
        matches=None if matches is None else matches[keep_image][:, keep_text],
        chains=chains,
        skipped=skipped,
        sizes=sizes,
    )


def _check_ids(kind, items, shown):
    """Raise UserError if ids of images or captions repeat or do not fit into the cache; shown: names one of them."""
    first = {}
    for item in items:
        if not is_id(item.id):
            wrong = f"the {kind} {shown(item)!r:.80} has the id {item.id!r:.40}"
            raise UserError(f"{wrong}, no integer of 64 bits: give it such an id in its source.")
        if item.id in first:
            both = f"{shown(first[item.id])!r:.80} and {shown(item)!r:.80}"
            raise UserError(f"one {kind} and another, {both}, have the same id, {item.id}: leave one of them out.")
        first[item.id] = item


def _on_disk(path):
    """Return the path of a file as the disk writes it: an accented letter has two spellings in Unicode."""
    if str(path).isascii() or _size(path) is not None or path == path.parent:
        return path
    folder = _on_disk(path.parent)
    return folder / _names(folder).get(unicodedata.normalize("NFC", path.name), path.name)


@lru_cache
def _names(folder):
    """Return the names in a folder by their composed spelling."""
    try:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder)}
    except (OSError, ValueError):  # no path holds a null byte
        return {}


def _size(path):
    """Return the size of a file in bytes, or None if there is no such file."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:  # for example, the name is too long
        return None


def _prompts(classes):
    """Fill every class name into every template."""
    prompts = []
    for number, name in enumerate(classes.names):
        for template in classes.templates:
            prompts.append(Caption(len(prompts), number, template.replace("{}", name)))
    return prompts


def _fault(text):
    """Return why no tokenizer can read a caption, or ""."""
    if text is None or text != text:  # NaN, by which some libraries write what is missing
        return "is null or missing"
    if not isinstance(text, str):
        return f"is not a string but {text!r:.40}"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode (it holds bytes that are not UTF-8, or half of a surrogate pair)"
    if spelled_list(text):
        return f"is a list of captions, {text!a:.40}, where one is expected"
    return ""


def fingerprint(source, listing):
    """Hash what a split lists: file names, captions, classes, and the source's version; 16 hex digits.

    The folder of the files is left out: moved data are the same data.
    """
    digest = hashlib.sha256(f"{type(source).__name__} {source.version}\n".encode())
    row_of_id = {}
    for row, image in enumerate(listing.images):
        row_of_id[image.id] = row
        digest.update(f"{Path(image.place).name}\n".encode())
    for caption in listing.captions:
        target = caption.image_id if listing.classes is not None else row_of_id[caption.image_id]
        digest.update(f"{caption.id}\t{target}\t{caption.text}\n".encode())
    if listing.classes is not None:
        digest.update(repr(listing.classes.names).encode())
        digest.update(np.asarray(listing.classes.label, dtype=np.int64).tobytes())
        if listing.classes.human is not None:
            digest.update(np.asarray(listing.classes.human, dtype=np.float64).tobytes())
    return digest.hexdigest()[:16]


def files_fingerprint(listing):
    """Hash the files of a split's images: all sizes, and the first bytes of about SAMPLE; 16 hex digits."""
    digest = hashlib.sha256()
    for image in listing.images:
        digest.update(f"{listing.sizes.get(image.path)}\n".encode())
    for image in listing.images[:: max(1, len(listing.images) // SAMPLE)]:
        with contextlib.suppress(OSError):  # an unreadable file raises its error when it is encoded
            if image.path is not None:
                with open(image.path, "rb") as file:
                    digest.update(file.read(2**16))
    return digest.hexdigest()[:16]
