"""WebDataset shards: plain .tar files in which the members of a sample, 000001.jpg, 000001.txt, ..., are adjacent.

The headers of a shard are read once; any worker then reads an image from its position in the tar.
"""

import glob
import io
import json
import re
import tarfile
from functools import lru_cache
from itertools import compress
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

from datasets import Caption, Image, Source, check_folds, fold_splits, name_id
from utils.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")


class Shards(Source):
    """Images and captions in shards, in the order of shard names and members; one caption per image.

    root: a folder, or without `splits` also a pattern of shards, 'folder/cc3m-train-{0000..0575}.tar'. splits: pattern
    of each split's shards in that folder, with {a,b}, {0..9}, * and ?; without it, samples are split at random by
    `fold_splits`. caption_key: the key of .json that holds the caption; by default the caption is .txt, or 'caption' of
    .json if .txt is absent. folds, seed: of the random split.
    """

    def __init__(self, root, splits=None, caption_key="", folds=5, seed=0):
        check_folds(folds, seed)
        if not isinstance(splits, dict | None):
            raise ValueError("splits must give a pattern of shards for each split")
        self.root, self.splits, self.caption_key = str(root), splits or {}, caption_key
        self.folds, self.seed = folds, seed
        for pattern in (self.root, *self.splits.values()):
            if re.match(r"[a-z][a-z0-9+.-]+:", pattern):
                raise UserError(f"the shards {pattern} are not on this computer: download them, and give their folder.")
        self.folder, self.pattern = Path(self.root), "*.tar"
        if not self.splits and not self.folder.is_dir():
            parts = self.folder.parts
            first = next((i for i, part in enumerate(parts) if re.search(r"[*?{[]", part)), len(parts) - 1)
            self.folder, self.pattern = Path(*parts[:first]), str(Path(*parts[first:]))
        self.places = {}  # of images in shards: {path: (sorted ids (N,), their first byte and size (N, 2))}

    def images(self, split):
        """List the images of `split`; raises UserError for an unknown split and for absent or broken shards."""
        return self._pairs(split)[0]

    def captions(self, split):
        """List the captions of `split`, "" if a sample has none, with ids of images; raises what `images` raises."""
        return self._pairs(split)[1]

    def open(self, image):
        """Open an image that `images` has listed, here or before this source was sent to a worker."""
        ids, places = self.places[image.path]
        start, size = places[np.searchsorted(ids, image.id)].tolist()
        with image.path.open("rb") as file:
            file.seek(start)
            return PIL.Image.open(io.BytesIO(file.read(size)))

    def id_space(self, split):
        """Return "shards": an id is a hash of the shard's path and the sample's key."""
        return "shards"

    def _pairs(self, split):
        """List the images and the captions of `split`."""
        if self.splits:
            self._check_split(split, self.splits)
            return self._samples(self.splits[split])
        images, captions = self._samples(self.pattern)
        masks = fold_splits(len(images), self.folds, self.seed, self.root)
        self._check_split(split, masks)
        return list(compress(images, masks[split])), list(compress(captions, masks[split]))

    def _check_split(self, split, splits):
        if split not in splits:
            raise UserError(f"{self.root} has no split '{split}'; it has {', '.join(splits)}.")

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _samples(self, pattern):
        """List images and captions of the shards that match `pattern`."""
        shards = self._shards(pattern)
        bar = tqdm(shards, desc="list shards", unit="shard", disable=None if len(shards) > 20 else True)
        samples = [sample for shard in bar for sample in self._listed(shard)]
        if not samples:
            raise UserError(f"{self.folder / pattern} holds no samples: give other shards.")
        if not any(text for _, text in samples):
            where = f"'{self.caption_key}' of any .json" if self.caption_key else "'caption' of any .json nor any .txt"
            hint = "set the key with --set data.options.caption_key=KEY"
            raise UserError(f"{self.folder / pattern} holds no caption in {where}: {hint}.")
        return [image for image, _ in samples], [Caption(image.id, image.id, text) for image, text in samples]

    def _shards(self, pattern):
        """List the names of the shards in the folder that match `pattern`."""
        expand = _webdataset("shardlists").expand_urls
        try:
            patterns = expand(pattern)
        except ValueError as error:
            raise UserError(f"the pattern {pattern} cannot be read ({error}): close its braces.") from None
        shards = {}  # a dict keeps the order
        for one in patterns:
            names = sorted(Path(name).as_posix() for name in glob.glob(one, root_dir=self.folder, recursive=True))
            if not names:
                hint = self.get or "point --root to the folder of shards"
                raise UserError(f"there is no shard {self.folder / one}: {hint}.")
            shards |= dict.fromkeys(names)
        return list(shards)

    def _listed(self, shard):
        """List the samples of a shard, (image, text), and record the places of its images."""
        path = self.folder / shard
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(f"{path} is compressed, which rules out random access: gunzip it.")
        samples, places = [], {}
        try:
            with tarfile.open(path, "r:") as tar:
                group_by_keys = _webdataset("tariterators").group_by_keys
                for sample in group_by_keys(_members(tar, path), handler=_refuse_repeats(path)):
                    key = sample["__key__"]
                    kind = next((kind for kind in IMAGES if kind in sample), None)
                    if kind is None:
                        kinds = ", ".join(f".{kind}" for kind in sample if not kind.startswith("__"))
                        hint = "remove the sample from the shard"
                        raise UserError(f"{path}: sample '{key}' has no .{', .'.join(IMAGES)} but {kinds}: {hint}.")
                    image = Image(name_id(f"{path.resolve()}/{key}"), path, f"{shard}/{key}.{kind}")
                    if image.id in places:
                        raise UserError(f"{path} has two samples with the key '{key}': make the shard again.")
                    places[image.id] = sample[kind]
                    samples.append((image, self._caption(tar, sample, f"{path}: {key}")))
                # tarfile takes an unreadable header for the end of the archive, and skips everything after it.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it has no member at byte {tar.offset:,} and does not end there")
        except tarfile.TarError as error:
            raise UserError(f"{path} is not a complete .tar ({error}): download or make it again.") from None
        ids = np.array(sorted(places), dtype=np.int64)
        self.places[path] = ids, np.array([places[id] for id in ids.tolist()], dtype=np.int64).reshape(-1, 2)
        return samples

    def _caption(self, tar, sample, where):
        """Read the caption of a sample, "" if it has none."""
        kind = "txt" if "txt" in sample and not self.caption_key else "json"
        if kind not in sample:
            return ""
        start, size = sample[kind]
        tar.fileobj.seek(start)
        try:
            text = tar.fileobj.read(size).decode("utf-8")
            if kind == "json":
                text = json.loads(text).get(self.caption_key or "caption") or ""
            return " ".join(text.split())
        except (ValueError, AttributeError, RecursionError) as error:
            expected = "UTF-8" if kind == "txt" else "a JSON object with the caption as a string"
            raise UserError(f"{where}.{kind} is not {expected} ({error}): make the shard again.") from None


def _webdataset(module):
    """Import a module of webdataset, whose naming rules this source follows; only shards need it."""
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ImportError:
        hint = "run `pip install -r requirements-extra.txt`"
        raise UserError(f"shards are read with webdataset, which is not installed: {hint}.") from None
    return getattr(webdataset, module)


def _members(tar, path):
    """Yield the files of a tar as webdataset's `tar_file_iterator` does, with (first byte, size) for content."""
    for member in tar:
        tar.members = []  # otherwise the list of all headers stays in memory
        if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(path)}


def _refuse_repeats(path):
    """Return a handler of webdataset's error for a file that occurs twice."""

    def handler(error):
        name = str(error.args[0]).split(": duplicate")[0]
        raise UserError(f"{path} has the file {name} twice: make the shard again.") from None

    return handler
