"""Images with classes, read by torchvision.datasets: one wrapper, configured by the YAML of each data set."""

import inspect
import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import torchvision
from torchvision.datasets.folder import is_image_file

from datasets import Classes, Image, Source, visible
from utils.errors import UserError
from utils.files import UNREADABLE, reason

RULES = ("own", "folders", "imagenet")
IMAGENET_TEMPLATES = ("openai", "simple")
SPLIT = re.compile(r"(?<![a-z])(train(ing)?|val(id(ation)?)?|test(ing)?|dev)(?![a-z])", re.IGNORECASE)
NOT_OPTIONS = ("root", "download", "loader", "transform", "target_transform", "transforms")


class _Visible:
    """Mixin for readers of one folder per class, without what is hidden: torchvision would make `.git` a class."""

    def find_classes(self, directory):
        names = [name for name in super().find_classes(directory)[0] if visible(name)]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}")  # as torchvision says it
        return names, {name: number for number, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory, *args, **options):
        samples = torchvision.datasets.ImageFolder.make_dataset(directory, *args, **options)
        return [(file, label) for file, label in samples if visible(os.path.relpath(file, directory))]


class Classification(Source):
    """A class of torchvision.datasets (or ImageFolder) for zero-shot classification; nothing is downloaded.

    dataset: name of the class. splits: for each split, keyword arguments of that class, and `folder` if the split is a
    folder inside `root`. classes: their names in the order of the labels, or a rule: `own`, the data set's names;
    `folders`, the same with blanks for _ and /; `imagenet`, the names by CLIP's authors for folders called by WordNet
    id, or by class number as in ImageNet-V2. templates: prompts with {} in place of the name, or `openai` for the 80
    ImageNet prompts of CLIP's authors, or `simple` for the 7 best of them. human: a file in `root` with the shares of
    human answers, (N, C), in the order of the images. Raises ValueError for an invalid option.
    """

    def __init__(self, root, dataset, splits, classes="folders", templates=("a photo of a {}.",), human=None):
        self.root, self.dataset, self.splits, self.human = Path(root), dataset, splits, human
        self.names, self.templates = classes, templates
        wrapped = getattr(torchvision.datasets, str(dataset), None)
        if not inspect.isclass(wrapped):
            raise ValueError(f"torchvision.datasets has no class '{dataset}'")
        if not (isinstance(splits, dict) and splits and all(isinstance(options, dict) for options in splits.values())):
            raise ValueError("splits must hold the keyword arguments of each split, as in {test: {train: false}}")
        allowed = [name for name in inspect.signature(wrapped).parameters if name not in NOT_OPTIONS] + ["folder"]
        for split, options in splits.items():
            for name in options:
                if name not in allowed:
                    takes = f"{dataset} takes {', '.join(allowed)}"
                    raise ValueError(f"splits: {split} has unknown key '{name}'; {takes}")
        listed = isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
        if not listed and classes not in RULES:
            raise ValueError(f"classes must list their names in quotes, or be {', '.join(RULES[:-1])} or {RULES[-1]}")
        if templates not in IMAGENET_TEMPLATES:
            self.templates = list(templates)
            wrong = [template for template in self.templates if str(template).count("{}") != 1]
            if wrong or isinstance(templates, str) or not self.templates:
                kinds = " or ".join(IMAGENET_TEMPLATES)
                raise ValueError(f"templates must be {kinds}, or list prompts with one {{}} each, not {templates!r}")

    def images(self, split):
        """List the images of `split`; raises UserError for an unknown split, and if its files cannot be read."""
        _, files, labels = self._read(split)
        if files is None:
            return [Image(row, name=f"{self.dataset} {split} {row}") for row in range(len(labels))]
        return [Image(row, Path(file)) for row, file in enumerate(files)]

    def captions(self, split):
        """Return no captions: classes describe the images."""
        return []

    def open(self, image):
        """Open an image from its file, or from the data set if it has none; raises what the reader raises."""
        if image.path is not None:
            return super().open(image)
        split = image.name.removeprefix(f"{self.dataset} ").rsplit(" ", 1)[0]
        return self._read(split)[0][image.id][0]

    def id_space(self, split):
        """Name the id space by data set and split, independent of the YAML's name; for ImageFolder, by the folder."""
        folder, options = self._place(split)
        if self.dataset == "ImageFolder":
            return f"{self.dataset} {folder.resolve()}"
        return " ".join([self.dataset, *(f"{name}={value}" for name, value in sorted(options.items()))])

    def classes(self, split):
        """Return the classes of `split`; raises UserError if names, images and human answers do not fit together."""
        data, _, labels = self._read(split)
        listed = list(getattr(data, "classes", ()))
        names = self._names(listed)
        # Some releases of torchvision do not name the flowers, of which a part need not have all.
        count = len(listed) or max(len(names), int(labels.max()) + 1)
        if len(names) != count:
            raise UserError(
                f"{self.dataset} in {self.root} has {count} classes, but data.options.classes names {len(names)}: name"
                " every class once, in the order of the labels."
            )
        return Classes(names, self._templates(), labels, self._shares(len(labels), count))

    def _place(self, split):
        """Return the folder of a split, and the keyword arguments of the class that reads it."""
        if split not in self.splits:
            raise UserError(f"{self.dataset} in {self.root} has no split '{split}'; it has {', '.join(self.splits)}.")
        options = dict(self.splits[split])
        return self.root / options.pop("folder", ""), options

    @lru_cache  # noqa: B019  (a source lives as long as its script, or as the worker that it was sent to)
    def _read(self, split):
        """Return torchvision's data set, its image files (N,) or None, and its labels (N,)."""
        folder, options = self._place(split)
        self._refuse_nested_splits(split, folder)
        try:
            if self.dataset == "ImageFolder":
                # List every file, so that the cache reports those that are not images; a class may be empty.
                options |= {"is_valid_file": lambda file: True, "allow_empty": True}
            reader = getattr(torchvision.datasets, self.dataset)
            if issubclass(reader, torchvision.datasets.ImageFolder):
                reader = type(self.dataset, (_Visible, reader), {})
            data = reader(str(folder), **options)
            files, labels = _listed(data)
        except Exception as error:  # torchvision's readers of pickles, JSON, .mat and text files raise many types
            why = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
            if not folder.is_dir():
                why = "it is not a folder" if folder.exists() else "there is no such folder"
            raise self._error(f"{self.dataset} cannot be read from {folder} ({why})") from None
        if not len(labels):
            raise self._error(f"{self.dataset} in {folder} lists no images")
        labels = np.asarray(labels, dtype=np.int64)
        if self.dataset == "SUN397":  # torchvision lists it in the order of the file system
            order = sorted(range(len(files)), key=lambda row: files[row])
            files, labels = [files[row] for row in order], labels[order]
        return data, files, labels

    def _error(self, message):
        return UserError(f"{message}: {self.get or 'point --root to the folder that holds it'}.")

    def _refuse_nested_splits(self, split, folder):
        """Raise UserError if folders of `folder` that are called like splits hold the classes."""
        if self.dataset != "ImageFolder" or not folder.is_dir():
            return
        inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and visible(path.name)]
        places = {self._place(name)[0]: name for name in self.splits if name != split}
        called = [path for path in inside if (path in places or SPLIT.search(path.name)) and _holds_classes(path)]
        nested = [name for path, name in places.items() if path in called]
        if nested and folder == self.root and len(nested) == len(called):
            raise UserError(
                f"{self.root} is laid out in the splits {', '.join(nested)}: choose with --splits {' '.join(nested)},"
                " or point --root to one of their folders."
            )
        if len(called) > 1 or called == inside != []:  # one among others may be a class
            names = ", ".join(path.name for path in called)
            hint = "point --root to the folder that holds a folder per class"
            raise UserError(f"{folder} has folders of folders ({names}), not of pictures: {hint}.")

    def _names(self, listed):
        """Return the class names; listed: the names that torchvision lists. Raises UserError for one that repeats."""
        if isinstance(self.names, list):
            return _distinct(self.names, self.names, self.root)
        if self.names == "folders":
            names = [" ".join(name.replace("_", " ").replace("/", " ").split()) for name in listed]
            return _distinct(names, listed, self.root)
        if self.names == "own":
            return listed
        from timm.data import ImageNetInfo  # comes with open_clip; maps class numbers to WordNet ids

        number = {id: row for row, id in enumerate(ImageNetInfo().label_names())}
        number |= {str(row): row for row in range(len(number))}
        unknown = [name for name in listed if name not in number]
        if unknown:
            raise UserError(
                f"the folder '{unknown[0]}' in {self.root} is not an ImageNet-1k class: name folders by WordNet id,"
                " such as n01440764, or use their names as class names with --dataset folder."
            )
        return [_zero_shot().IMAGENET_CLASSNAMES[number[name]] for name in listed]

    def _templates(self):
        if self.templates == "openai":
            templates = _zero_shot().OPENAI_IMAGENET_TEMPLATES
        elif self.templates == "simple":
            templates = _zero_shot().SIMPLE_IMAGENET_TEMPLATES
        else:
            return self.templates
        return [template("{}") for template in templates]

    def _shares(self, images, classes):
        """Read the shares of human answers, (N, C), or None; raises UserError if the file holds something else."""
        if self.human is None:
            return None
        file = self.root / self.human
        try:
            shares = np.load(file, allow_pickle=False)
            shape, kind = shares.shape, shares.dtype.kind
        except UNREADABLE as error:
            raise self._error(f"the human answers {file} cannot be read ({reason(error, file)})") from None
        if shape != (images, classes) or kind != "f":
            actual = f"not {shares.dtype} of shape {shape}"
            raise self._error(f"{file} must hold floats of shape ({images}, {classes}), {actual}")
        sums = shares.sum(axis=1)
        wrong = ~((shares >= 0).all(axis=1) & (abs(sums - 1) < 1e-3))  # NaN is wrong, too
        if wrong.any():
            row = wrong.argmax()
            raise self._error(f"row {row} of {file} must hold shares that sum to 1, not to {sums[row]:.4g}")
        return shares


def _holds_classes(folder):
    """Whether a folder holds folders, and no picture beside them; other files, such as lists, may be there."""
    with os.scandir(folder) as entries:
        shown = {entry.name: entry.is_dir() for entry in entries if visible(entry.name)}
    return any(shown.values()) and not any(is_image_file(name) for name, is_folder in shown.items() if not is_folder)


def _zero_shot():
    # Imported late, as the package takes seconds to load; only class names and prompts are read.
    import open_clip.zero_shot_metadata

    return open_clip.zero_shot_metadata


def _distinct(names, listed, where):
    """Return the names; raises UserError, with names of `listed`, where prompts would call two classes the same."""
    first = {}
    for row, name in enumerate(names):
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold(), row)
        if other != row:
            two = f"'{listed[other]}' and '{listed[row]}'"
            raise UserError(f"the classes {two} of {where} have one name in prompts: rename one, or merge them.")
    return names


def _listed(data):
    """Return the files (N,), or None if images are not files, and the labels (N,), without decoding an image."""
    samples = getattr(data, "samples", None) or getattr(data, "_samples", None)
    if samples:
        return [file for file, _ in samples], [label for _, label in samples]
    files = getattr(data, "_image_files", None) or getattr(data, "_images", None)
    for name in ("_labels", "targets", "labels"):
        if hasattr(data, name):
            return files, getattr(data, name)
    return files, [int(label) for _, label in data]
