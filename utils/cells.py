"""A cell of a grid: one training run and its evaluations, what is left to do of it, and the steps that do it."""

import dataclasses
import json
import zipfile
from pathlib import Path

from datasets.embeddings import META, Pairs, cache_folder
from utils.checkpoint import Run
from utils.config import LEVELS, difference, load_config, needs_pooled
from utils.errors import UserError
from utils.files import read_json


class Cell:
    """A run by its configuration, and the data sets that it is evaluated on.

    settings: `key=value` of its training. score, levels: as eval.py takes them. left: {data set: why there is no result
    as asked for}.
    """

    def __init__(self, config, evaluated_on, settings=(), score=None, levels=None):
        self.config, self.settings, self.score, self.levels = config, settings, score, levels
        self.name = str(Path(*config.checkpoint.parts[1:]))
        # eval.py takes the split from the data set's YAML, whatever the settings of the training are.
        self.splits = {name: load_config(name, backbone=config.backbone).data.eval_split for name in evaluated_on}
        self.left = {name: why for name in evaluated_on if (why := self._why(name))}

    def _why(self, dataset):
        """Say why the run is to be evaluated on a data set, or nothing where that is done."""
        config, run = self.config, Run(self.config)
        if self._uncached(dataset):
            return "no embeddings"
        try:
            trained_on = Pairs(config.dataset, config.backbone, config.data.train_split)
            pairs = Pairs(dataset, config.backbone, self.splits[dataset])
            config.settle(len(trained_on.text))
            changed = run.changed(trained_on.identity)
        except UserError as error:
            return str(error)  # the step that meets it will end on it
        if changed or not run.done:
            return f"its run has another {', '.join(changed)}" if changed else "not trained"
        path = config.result(dataset, "retrieval" if pairs.classes is None else "classification")
        score = self.score if self.score in ("log_likelihood", "similarity") else config.score
        wanted = {"checkpoint": run.weights_hash(), "fingerprint": pairs.meta["fingerprint"]}
        wanted |= {"split": self.splits[dataset], "uncer_levels": self.levels or min(LEVELS, pairs.queries)}
        wanted |= {"levels_by": None, "drop_remainder": False}
        wanted |= {"config": dataclasses.asdict(config) | {"score": score}}
        try:
            result = read_json(path)
            changed = difference({name: result[name] for name in wanted}, json.loads(json.dumps(wanted)))
            whole = zipfile.is_zipfile(path.with_suffix(".npz"))
        except FileNotFoundError:
            return "not evaluated"
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            return "its result is damaged"
        if self.score == "both" and "other_score" not in result:
            changed.append("choice of scores")
        return f"its result has another {', '.join(changed)}" if changed else ""

    @property
    def missing(self):
        """The caches, (data set, backbone, split), that it needs and that are not there."""
        return [cache for dataset in self.left for cache in self._uncached(dataset)]

    @property
    def pooled(self):
        """Whether its caches are to be made with pooled features; those from elsewhere cannot be."""
        return needs_pooled(self.config) and self.config.encoder.pretrained != "elsewhere"

    def _uncached(self, dataset):
        needed = (self.config.dataset, self.config.data.train_split), (dataset, self.splits[dataset])
        caches = [(name, self.config.backbone, split) for name, split in needed]
        return [cache for cache in caches if not (cache_folder(*cache) / META).is_file()]

    def steps(self, overwrite=False):
        """The job of a worker: train, which ends at once where that is done, and evaluate where that is not."""
        flags = self.config.flags
        steps = [("train", [*as_words(flags), *["--overwrite"] * overwrite, *as_set(self.settings)])]
        for dataset in self.left:
            about = {"dataset": dataset, "train-dataset": self.config.dataset}
            about |= {"uncer_levels": self.levels} if self.levels else {}
            about |= {"score": self.score} if self.score else {}
            steps.append(("eval", as_words(flags | about)))
        return steps


def as_words(flags):
    """Give flags, {name: value}, as a command line has them."""
    return ["--quiet", *(f"--{name}={value}" for name, value in flags.items())]


def as_set(settings):
    """Give settings as a command line has them."""
    return ["--set", *settings] if settings else []
