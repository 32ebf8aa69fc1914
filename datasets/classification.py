"""Images in classes, as torchvision.datasets reads them: one wrapper, whose YAML says what it wraps."""

import inspect
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torchvision

from datasets import Classes, Image, Source
from utils.errors import UserError

RULES = ("own", "folders", "imagenet")
IMAGENET_TEMPLATES = ("openai", "simple")
NOT_OPTIONS = ("root", "download", "loader", "transform", "target_transform", "transforms")


class Classification(Source):
    """A class of torchvision.datasets, ImageFolder among them, for zero-shot classification; nothing is downloaded.

    dataset: name of the class. splits: for each split, the keyword arguments of that class, and `folder`, where the
    split lies in a folder of its own inside `root`. classes: their names, in the order of the labels, or a rule: `own`,
    as the data set calls them; `folders`, the same with _ and / as blanks; `imagenet`, the names that CLIP's authors
    gave to what folders call by WordNet id, or by number as in ImageNet-V2. templates: prompts with {} where the name
    stands, or the 80 for ImageNet of CLIP's authors, `openai`, or the 7 best of them, `simple`. human: a file in
    `root` with the shares of human answers, (N, C), in the order of the images. Raises ValueError for an option that
    cannot be.
    """

    def __init__(self, root, dataset, splits, classes="folders", templates=("a photo of a {}.",), human=None):
        self.root, self.dataset, self.splits, self.human = Path(root), dataset, splits, human
        self.names, self.templates = classes, templates
        wrapped = getattr(torchvision.datasets, str(dataset), None)
        if not inspect.isclass(wrapped):
            raise ValueError(f"torchvision.datasets has no class '{dataset}'")
        if not (isinstance(splits, dict) and splits and all(isinstance(options, dict) for options in splits.values())):
            raise ValueError("splits must hold the keyword arguments of each split, as in {test: {train: false}}")
        takes = [name for name in inspect.signature(wrapped).parameters if name not in NOT_OPTIONS] + ["folder"]
        for split, options in splits.items():
            if unknown := [name for name in options if name not in takes]:
                raise ValueError(f"splits: {split} has no key '{unknown[0]}'; of {dataset} it has {', '.join(takes)}")
        listed = isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
        if not listed and classes not in RULES:
            raise ValueError(f"classes must list their names in quotes, or be {', '.join(RULES)}")
        if templates not in IMAGENET_TEMPLATES:
            self.templates = list(templates)
            wrong = [template for template in self.templates if str(template).count("{}") != 1]
            if wrong or isinstance(templates, str) or not self.templates:
                kinds = " or ".join(IMAGENET_TEMPLATES)
                raise ValueError(f"templates must be {kinds}, or list prompts with one {{}} each, not {templates!r}")

    def images(self, split):
        """List the images of `split`; raises UserError for an unknown split, and where its files are not to be read."""
        _, files, labels = self._read(split)
        if files is None:
            return [Image(row, name=f"{self.dataset} {split} {row}") for row in range(len(labels))]
        return [Image(row, Path(file)) for row, file in enumerate(files)]

    def captions(self, split):
        """List none: classes describe the images."""
        return []

    def open(self, image):
        """Open an image from its file, or from the data set where it has none; raises what the reader raises."""
        if image.path is not None:
            return super().open(image)
        split = image.name.removeprefix(f"{self.dataset} ").rsplit(" ", 1)[0]
        return self._read(split)[0][image.id][0]

    def id_space(self, split):
        """Name the images by data set and split, whatever its YAML is called; those of folders by their folder."""
        folder, options = self._place(split)
        if self.dataset == "ImageFolder":
            return f"{self.dataset} {folder.resolve()}"
        return " ".join([self.dataset, *(f"{name}={value}" for name, value in sorted(options.items()))])

    def classes(self, split):
        """Give the classes of `split`; raises UserError where names, images and human answers do not fit together."""
        data, _, labels = self._read(split)
        own = list(getattr(data, "classes", ()))
        count = len(own) or int(labels.max()) + 1  # some releases of torchvision do not name the flowers
        names = self._named(own)
        if len(names) != count:
            raise UserError(
                f"{self.dataset} in {self.root} has {count} classes, but data.options.classes names {len(names)}: name"
                " every class once, in the order of the labels."
            )
        return Classes(names, self._prompts(), labels, self._shares(len(labels), count))

    def _place(self, split):
        """Folder of a split, and keyword arguments of the class that reads it."""
        if split not in self.splits:
            raise UserError(f"{self.dataset} in {self.root} has no split '{split}'; it has {', '.join(self.splits)}.")
        options = dict(self.splits[split])
        return self.root / options.pop("folder", ""), options

    @lru_cache  # noqa: B019  (a source lives as long as its script, or as the worker that it was sent to)
    def _read(self, split):
        """Read what torchvision lists: the data set, the images' files (N,) or None, and their labels (N,)."""
        folder, options = self._place(split)
        self._must_be_one_split(split, folder)
        try:
            if self.dataset == "ImageFolder":
                # Every file is listed, so that one that is no image is named, and a class may have none.
                options |= {"is_valid_file": _visible, "allow_empty": True}
            data = getattr(torchvision.datasets, self.dataset)(str(folder), **options)
            files, labels = _listed(data)
        except Exception as error:  # torchvision raises what its readers raise: of pickles, JSON, .mat and text files
            said = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
            if not folder.is_dir():
                said = "it is no folder" if folder.exists() else "there is no such folder"
            raise self._error(f"{self.dataset} cannot be read from {folder} ({said})") from None
        if not len(labels):
            raise self._error(f"{self.dataset} in {folder} lists no images")
        labels = np.asarray(labels, dtype=np.int64)
        if self.dataset == "SUN397":  # listed as the file system has it, in another order on another computer
            order = sorted(range(len(files)), key=files.__getitem__)
            files, labels = [files[row] for row in order], labels[order]
        return data, files, labels

    def _error(self, said):
        return UserError(f"{said}: {self.get or 'name the folder that holds it with --root'}.")

    def _must_be_one_split(self, split, folder):
        """Raise a UserError where `root` is to be one split, but holds others, whose folders would pass for classes."""
        if folder != self.root or self.dataset != "ImageFolder":
            return
        inside = {name: self._place(name)[0] for name in self.splits if name != split}
        found = [name for name, place in inside.items() if place.is_dir() and any(p.is_dir() for p in place.iterdir())]
        if found:
            raise UserError(
                f"{self.root} is laid out in the splits {', '.join(found)}: choose with --splits {' '.join(found)}, or"
                " name one of their folders with --root."
            )

    def _named(self, own):
        """Name the classes that the data set calls `own`."""
        if isinstance(self.names, list):
            return self.names
        if self.names == "folders":
            return [" ".join(name.replace("_", " ").replace("/", " ").split()) for name in own]
        if self.names == "own":
            return own
        from timm.data import ImageNetInfo  # comes with open_clip; knows which WordNet id has which number

        number = {id: row for row, id in enumerate(ImageNetInfo().label_names())}
        number |= {str(row): row for row in range(len(number))}
        unknown = [name for name in own if name not in number]
        if unknown:
            raise UserError(
                f"the folder '{unknown[0]}' in {self.root} is no class of ImageNet-1k: call folders by WordNet id, such"
                " as n01440764, or take them for the classes' names with --dataset folder."
            )
        return [_zero_shot().IMAGENET_CLASSNAMES[number[name]] for name in own]

    def _prompts(self):
        if self.templates not in IMAGENET_TEMPLATES:
            return self.templates
        said = getattr(_zero_shot(), f"{self.templates.upper()}_IMAGENET_TEMPLATES")
        return [template("{}") for template in said]

    def _shares(self, images, classes):
        """Read the shares of human answers, (N, C), or None; raises UserError for a file that holds something else."""
        if self.human is None:
            return None
        file = self.root / self.human
        try:
            shares = np.load(file, allow_pickle=False)
            shape, kind = shares.shape, shares.dtype.kind
        except (OSError, ValueError, EOFError, AttributeError) as error:
            raise self._error(f"the human answers {file} cannot be read ({' '.join(str(error).split())})") from None
        if shape != (images, classes) or kind != "f":
            found = f"not {shares.dtype} of the shape {shape}"
            raise self._error(f"{file} must hold floats of the shape ({images}, {classes}), {found}")
        sums = shares.sum(axis=1)
        wrong = ~((shares >= 0).all(axis=1) & (abs(sums - 1) < 1e-3))  # so that NaN is wrong
        if wrong.any():
            row = wrong.argmax()
            raise self._error(f"row {row} of {file} must hold shares that sum to 1, not to {sums[row]:.4g}")
        return shares


def _zero_shot():
    # Lazily, as the package takes seconds; only names and prompts are read.
    import open_clip.zero_shot_metadata

    return open_clip.zero_shot_metadata


def _visible(file):
    return not os.path.basename(file).startswith(".")


def _listed(data):
    """Files (N,), or None where images are no files of their own, and labels (N,), without decoding an image."""
    samples = getattr(data, "samples", None) or getattr(data, "_samples", None)
    if samples:
        return [file for file, _ in samples], [label for _, label in samples]
    files = getattr(data, "_image_files", None) or getattr(data, "_images", None)
    for name in ("_labels", "targets", "labels"):
        if hasattr(data, name):
            return files, getattr(data, name)
    return files, [int(label) for _, label in data]
