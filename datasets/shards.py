"""WebDataset shards: plain .tar files whose members 000001.jpg, 000001.txt, ... (one key, one sample) stand together.

A shard is listed once, by its headers; an image is then read from where it lies in the tar, by any worker.
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
    """Images and captions in shards, in the order of their names and members; one caption per image.

    root: a folder, or without `splits` also shards as a pattern, 'folder/cc3m-train-{0000..0575}.tar'. splits: pattern
    of each split's shards in that folder, with {a,b}, {0..9}, * and ?; without, samples are put into random parts: all,
    train and test, train0 and test0, ... caption_key: the key of .json that holds the caption; by default it is .txt,
    and where that is absent 'caption' of .json. folds, seed: of the random parts.
    """

    def __init__(self, root, splits=None, caption_key="", folds=5, seed=0):
        check_folds(folds, seed)
        if not isinstance(splits, dict | None):
            raise ValueError("splits must give a pattern of shards for each split")
        self.root, self.splits, self.caption_key = str(root), splits or {}, caption_key
        self.folds, self.seed = folds, seed
        for pattern in (self.root, *self.splits.values()):
            if re.match(r"[a-z][a-z0-9+.-]+:", pattern):
                raise UserError(f"the shards {pattern} are not on this computer: download them, and name their folder.")
        self.folder, self.pattern = Path(self.root), "*.tar"
        if not self.splits and not self.folder.is_dir():
            parts = self.folder.parts
            fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?{[]", part)), len(parts) - 1)
            self.folder, self.pattern = Path(*parts[:fixed]), str(Path(*parts[fixed:]))
        self.places = {}  # of images: {shard: sorted ids (N,), their first byte and size (N, 2)}

    def images(self, split):
        """List the images of `split`; raises UserError for an unknown split and for shards absent or broken."""
        return self._chosen(split)[0]

    def captions(self, split):
        """List the captions of `split`, "" of a sample without one, with ids of images; raises what `images` raises."""
        return self._chosen(split)[1]

    def open(self, image):
        """Open an image that `images` has listed, here or before this source was sent to a worker."""
        ids, places = self.places[image.path]
        start, size = places[np.searchsorted(ids, image.id)].tolist()
        with image.path.open("rb") as file:
            file.seek(start)
            return PIL.Image.open(io.BytesIO(file.read(size)))

    def id_space(self, split):
        """A sample is known by its shard and key."""
        return "shards"

    def _chosen(self, split):
        known = self.splits or fold_splits(len(self._samples(self.pattern)[0]), self.folds, self.seed, self.root)
        if split not in known:
            raise UserError(f"{self.root} has no split '{split}'; it has {', '.join(known)}.")
        if self.splits:
            return self._samples(self.splits[split])
        images, captions = self._samples(self.pattern)
        return list(compress(images, known[split])), list(compress(captions, known[split]))

    @lru_cache  # noqa: B019  (a source lives as long as its script)
    def _samples(self, pattern):
        """List images and captions of the shards that `pattern` names."""
        shards = self._shards(pattern)
        bar = tqdm(shards, desc="list shards", unit="shard", disable=None if len(shards) > 20 else True)
        samples = [sample for shard in bar for sample in self._listed(shard)]
        if not samples:
            raise UserError(f"{self.folder / pattern} holds no samples: name other shards.")
        if not any(text for _, text in samples):
            where = f"'{self.caption_key or 'caption'}' of any .json" + " nor any .txt" * (not self.caption_key)
            way = "name the key with --set data.options.caption_key=KEY"
            raise UserError(f"{self.folder / pattern} holds no caption in {where}: {way}.")
        return [image for image, _ in samples], [Caption(image.id, image.id, text) for image, text in samples]

    def _shards(self, pattern):
        """Names of the shards under the folder that `pattern` stands for."""
        expand = _webdataset("shardlists").expand_urls
        try:
            patterns = expand(pattern)
        except ValueError as error:
            raise UserError(f"the pattern {pattern} cannot be read ({error}): close its braces.") from None
        found = {}
        for one in patterns:
            names = sorted(Path(name).as_posix() for name in glob.glob(one, root_dir=self.folder, recursive=True))
            if not names:
                way = self.get or "name the folder of shards with --root"
                raise UserError(f"there is no shard {self.folder / one}: {way}.")
            found |= dict.fromkeys(names)
        return list(found)

    def _listed(self, shard):
        """List the samples of a shard, (image, caption), and note where its images lie."""
        path = self.folder / shard
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise UserError(f"{path} is compressed, so that nothing can be read from its middle: gunzip it.")
        samples, places = [], {}
        try:
            with tarfile.open(path, "r:") as tar:
                for sample in _webdataset("tariterators").group_by_keys(_members(tar, path), handler=_twice(path)):
                    key = sample["__key__"]
                    kind = next((kind for kind in IMAGES if kind in sample), None)
                    if kind is None:
                        has = ", ".join(f".{kind}" for kind in sample if not kind.startswith("__"))
                        way = "take the sample out of the shard"
                        raise UserError(f"the sample '{key}' of {path} has no .{', .'.join(IMAGES)} but {has}: {way}.")
                    image = Image(name_id(f"{path.resolve()}/{key}"), path, f"{shard}/{key}.{kind}")
                    if image.id in places:
                        raise UserError(f"{path} has two samples of the key '{key}': make the shard again.")
                    places[image.id] = sample[kind]
                    samples.append((image, self._caption(tar, sample, f"{path}: {key}")))
                # tarfile takes a header that it cannot read for the end, and with it all that follows.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it has no member at byte {tar.offset:,}, and does not end there")
        except tarfile.TarError as error:
            raise UserError(f"{path} is no whole tar ({error}): download or make it again.") from None
        ids = np.array(sorted(places), dtype=np.int64)
        self.places[path] = ids, np.array([places[id] for id in ids.tolist()], dtype=np.int64).reshape(-1, 2)
        return samples

    def _caption(self, tar, sample, where):
        """Read the caption of a sample, "" where it has none."""
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
            what = "UTF-8" if kind == "txt" else "an object of JSON with the caption as a string"
            raise UserError(f"{where}.{kind} is not {what} ({error}): make the shard again.") from None


def _webdataset(module):
    """Import one of webdataset's modules, whose naming rules hold; only who has shards needs it."""
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ImportError:
        way = "run `pip install -r requirements-extra.txt`"
        raise UserError(f"shards are read with webdataset, which is not installed: {way}.") from None
    return getattr(webdataset, module)


def _members(tar, path):
    """Yield the files of a tar as webdataset's `tar_file_iterator` does, with where they lie for what they hold."""
    for member in tar:
        tar.members = []  # else a list of all headers stays in memory
        if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": str(path)}


def _twice(path):
    def handler(error):
        name = str(error.args[0]).split(": duplicate")[0]
        raise UserError(f"{path} has the file {name} twice: make the shard again.") from None

    return handler
