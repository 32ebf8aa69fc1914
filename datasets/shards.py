"""WebDataset shards: plain .tar files of samples, each of which has files of one key: 000001.jpg, 000001.txt, ...

The headers of a shard are read once; any worker then reads an image from its position in the tar.
"""

import contextlib
import glob
import io
import json
import posixpath
import re
import tarfile
from functools import lru_cache
from itertools import compress
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import tqdm

from datasets import Caption, Described, Image, check_folds, fold_splits, name_id, visible
from datasets.captions import captions_in, folded, spelled_list
from utils.errors import UserError
from utils.files import UNREADABLE, reason

IMAGES = ("jpg", "jpeg", "png", "webp", "jfif", "bmp", "gif", "tif", "tiff", "avif", "ppm")


class Shards(Described):
    """Images and captions in shards, in the order of shard names and members.

    root: a folder, or without `splits` also a pattern of shards, 'folder/cc3m-train-{0000..0575}.tar'. splits: pattern
    of each split's shards in that folder, with {a,b}, {0..9}, * and ?; without it, samples are split at random by
    `fold_splits`. caption_key: the key of .json that holds the caption; by default the caption is .txt, or 'caption' of
    .json if .txt is absent. lines: whether each line of a .txt is a caption, as in the shards of CLIP_benchmark. folds,
    seed: of the random split.
    """

    def __init__(self, root, splits=None, caption_key="", lines=False, folds=5, seed=0):
        check_folds(folds, seed)
        if not isinstance(splits, dict | None):
            raise ValueError("splits must give a pattern of shards for each split")
        self.root, self.splits, self.caption_key = str(root), splits or {}, caption_key
        self.lines, self.folds, self.seed = lines, folds, seed
        for pattern in (self.root, *self.splits.values()):
            if re.match(r"[a-z][a-z0-9+.-]+:", pattern):
                raise UserError(f"the shards {pattern} are not on this computer: download them, and give their folder.")
        self.folder, self.pattern = Path(self.root), "*.tar"
        if not self.splits and not self.folder.is_dir():
            parts = self.folder.parts
            is_pattern = lambda i: re.search(r"[*?{[]", parts[i]) and not Path(*parts[: i + 1]).is_dir()  # noqa: E731
            first = next(filter(is_pattern, range(len(parts))), len(parts) - 1)
            self.folder, self.pattern = Path(*parts[:first]), str(Path(*parts[first:]))
        self.places = {}  # of images in shards: {path: (sorted ids (N,), their first byte and size (N, 2))}

    def pairs(self, split):
        """List images with their captions, "" if a sample has none; raises UserError if shards are absent or broken."""
        if self.splits:
            self._check_split(split, self.splits)
            return self._samples(self.splits[split])
        samples = self._samples(self.pattern)
        masks = fold_splits(len(samples), self.folds, self.seed, self.root)
        self._check_split(split, masks)
        return list(compress(samples, masks[split]))

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

    def _check_split(self, split, splits):
        if split not in splits:
            raise UserError(f"{self.root} has no split '{split}'; it has {', '.join(splits)}.")

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _samples(self, pattern):
        """List the samples of the shards that match `pattern`, (image, captions)."""
        shards = self._shards(pattern)
        bar = tqdm(shards, desc="list shards", unit="shard", disable=None if len(shards) > 20 else True)
        samples = [sample for shard in bar for sample in self._listed(shard)]
        if not samples:
            raise UserError(f"{self.folder / pattern} holds no samples: give other shards.")
        if not any(caption.text for _, captions in samples for caption in captions):
            where = f"'{self.caption_key}' of any .json" if self.caption_key else "'caption' of any .json nor any .txt"
            hint = "set the key with --set data.options.caption_key=KEY"
            raise UserError(f"{self.folder / pattern} holds no caption in {where}: {hint}.")
        return samples

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
        """List the samples of a shard, (image, captions), and record the places of its images."""
        path = self.folder / shard
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(f"{path} is compressed, which rules out random access: gunzip it.")
        try:
            with tarfile.open(path, "r:") as tar:
                members = _members(tar, path)
                # tarfile takes an unreadable header for the end of the archive, and skips everything after it.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it has no member at byte {tar.offset:,} and does not end there")
                if _goes_on(tar.fileobj):
                    hint = "unpack it with tar --ignore-zeros, and make one shard of it"
                    raise UserError(f"{path} holds another archive after its end: {hint}.")
        except (tarfile.TarError, *UNREADABLE) as error:
            why = reason(error, path)
            raise UserError(f"{path} is not a complete .tar ({why}): download or make it again.") from None
        samples, places = [], {}
        with path.open("rb") as file:
            grouped = _grouped(members, path)
            for key, sample in grouped.items():
                kind = _kind(path, key, sample, IMAGES)
                texts = self._captions(file, sample, path, key)
                image = Image(name_id(f"{path.resolve()}/{key}"), path, f"{shard}/{key}.{kind}")
                if kind is not None:
                    places[image.id] = sample[kind]
                elif any(texts):
                    image = image._replace(path=path / key, name=f"{shard}/{key}")  # absent
                else:
                    continue  # a file beside the samples
                # The first caption has the id of its image.
                ids = [image.id, *(name_id(f"{image.id} {number}") for number in range(1, len(texts)))]
                samples.append((image, [Caption(id, image.id, text) for id, text in zip(ids, texts)]))
        if samples and not places:
            kinds = sorted({kind for sample in grouped.values() for kind in sample})
            hint = f"make it again with images named .{', .'.join(IMAGES)}"
            raise UserError(f"no sample of {path} has an image, but .{', .'.join(kinds[:5])}: {hint}.")
        ids = np.array(sorted(places), dtype=np.int64)
        self.places[path] = ids, np.array([places[id] for id in ids.tolist()], dtype=np.int64).reshape(-1, 2)
        return samples

    def _captions(self, file, sample, path, key):
        """Read the captions of a sample, [""] if it has none."""
        kind = None if self.caption_key else _kind(path, key, sample, ["txt"])
        kind = kind or _kind(path, key, sample, ["json"])
        if kind is None:
            return [""]
        start, size = sample[kind]
        file.seek(start)
        # A caption that is not UTF-8 must not spoil the others: datasets/listing.py names it.
        text = file.read(size).decode("utf-8-sig", "surrogateescape")
        if kind.endswith("json"):
            try:
                text = json.loads(text).get(self.caption_key or "caption") or ""
            except (ValueError, AttributeError, RecursionError) as error:
                hint = "make the shard again"
                raise UserError(f"{path}: {key}.{kind} is not a JSON object ({error}): {hint}.") from None
        in_lines = self.lines and kind.endswith("txt") and not spelled_list(text)
        texts = list(filter(str.strip, text.split("\n"))) if in_lines else captions_in(text)
        return [folded(text) for text in texts] or [""]


def _goes_on(file):
    """Whether the next bytes of a file that are not zero begin another archive, as after `cat a.tar b.tar`."""
    blocks = iter(lambda: file.read(tarfile.BLOCKSIZE), b"")
    block = next((block for block in blocks if block.strip(b"\0")), b"")
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        return True
    return False


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
    """List the files of a tar, {name: (first byte, size) of its content}, without those that webdataset skips."""
    files, content = {}, {}
    for member in tar:
        tar.members = []  # otherwise the list of all headers stays in memory
        name = posixpath.normpath(member.name)
        if not visible(name) or re.match(r"__[^/]*__($|/)", name):
            continue
        if member.name in files:
            raise UserError(f"{path} has the file {name} twice: make the shard again.")
        if member.issparse():
            raise UserError(f"{path}: {name} is stored without its zeros: make the shard without tar --sparse.")
        if member.isreg():
            files[member.name] = content[name] = member.offset_data, member.size
        elif member.islnk():
            files[member.name] = posixpath.normpath(member.linkname)
        elif member.issym():
            files[member.name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    for name, place in files.items():
        if isinstance(place, str):  # a link
            if place not in content:
                hint = "make the shard again with tar --dereference --hard-dereference"
                raise UserError(f"{path}: {name} is a link to {place}, which is no file of the shard: {hint}.")
            files[name] = content[place]
    return files


def _grouped(members, path):
    """Group the files of a shard by webdataset's keys, in which they need not be adjacent: {key: {suffix: place}}."""
    split, samples = _webdataset("tariterators").base_plus_ext, {}
    for name, place in members.items():
        key, kind = split(name)
        if key is None:
            continue  # without a suffix
        sample = samples.setdefault(key, {})
        if kind.lower() in sample:
            raise UserError(f"{path} has the file {name} twice: make the shard again.")
        sample[kind.lower()] = place
    return samples


def _kind(path, key, sample, kinds):
    """Return the suffix of a sample's file of one of `kinds`: jpg, or else the only one like input.jpg; or None."""
    longer = [kind for kind in sample if kind.rpartition(".")[2] in kinds]
    exact = next((kind for kind in kinds if kind in sample), None)
    if exact is None and len(longer) > 1:
        hint = "a key ends at the first dot of a name, so rename them, or keep one"
        raise UserError(f"{path}: sample '{key}' has .{' and .'.join(longer[:3])}: {hint}.")
    return exact or next(iter(longer), None)
