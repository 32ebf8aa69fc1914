"""A run's folder: config.yaml (resolved), state.pt while it trains, adaptor.pt and log.csv when it is done."""

import dataclasses
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from utils.config import Config, make_adaptor
from utils.errors import UserError
from utils.files import atomic

BROKEN = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError, TypeError)


class Run:
    """The folder of one training run.

    `claim` takes it for a configuration; `resume`, `save_state` and `finish` bracket the training; `load` reads it.
    """

    def __init__(self, config):
        self.config, self.folder = config, config.checkpoint

    @property
    def done(self):
        return (self.folder / "adaptor.pt").is_file()

    def claim(self, identity, overwrite=False):
        """Take the folder, or raise a UserError if it holds a run with another configuration or other embeddings.

        identity: dict of what the run was trained on, kept in state.pt and adaptor.pt.
        """
        self.identity = identity
        held = self.folder / "config.yaml"
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif held.is_file():
            changed = _difference(dataclasses.asdict(Config.load(held)), dataclasses.asdict(self.config))
            if changed:
                raise UserError(
                    f"{self.folder} holds a run with another {', '.join(changed)}: give this one a name of its own"
                    " with --tag NAME, or replace it with --overwrite."
                )
            for name in ("adaptor.pt", "state.pt"):
                if (self.folder / name).is_file() and _read(self.folder / name)["identity"] != identity:
                    raise UserError(
                        f"{self.folder} was trained on other embeddings than the cache holds now: give this run a name"
                        " of its own with --tag NAME, or replace it with --overwrite."
                    )
        self.config.save(held)

    def resume(self, map_location):
        """Read what a killed run left, or None."""
        path = self.folder / "state.pt"
        return _read(path, map_location) if path.is_file() else None

    def save_state(self, **state):
        _save(self.folder / "state.pt", state | {"identity": self.identity})

    def finish(self, adaptor):
        state = {name: value.detach().cpu() for name, value in adaptor.state_dict().items()}
        _save(self.folder / "adaptor.pt", {"state_dict": state, "identity": self.identity})
        (self.folder / "state.pt").unlink(missing_ok=True)

    def load(self, device):
        """Read the trained adaptor and what it was trained on; raises UserError where it is missing or damaged."""
        path = self.folder / "adaptor.pt"
        config = self.config
        command = f"python train.py --dataset {config.dataset} --method {config.method} --seed {config.seed}"
        if not path.is_file():
            state = "its training is unfinished" if (self.folder / "state.pt").is_file() else "it is not trained yet"
            raise UserError(f"there is no checkpoint in {self.folder} ({state}): run `{command}`.")
        saved = _read(path)
        trained = Config.load(self.folder / "config.yaml")
        adaptor = make_adaptor(trained, saved["identity"]["dim"])
        try:
            adaptor.load_state_dict(saved["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path} does not fit its config.yaml ({str(error).splitlines()[-1].strip()}).") from None
        return adaptor.to(device).eval(), trained, saved["identity"]


def _save(path, value):
    with atomic(path) as partial:
        torch.save(value, partial)


def _read(path, map_location="cpu"):
    try:
        value = torch.load(path, map_location=map_location, weights_only=True)
        value["identity"]
        return value
    except BROKEN:
        raise UserError(f"{path} is damaged or truncated: delete {Path(path).parent} and train again.") from None


def _difference(held, wanted, prefix=""):
    """Dotted names of the values in which two nested dicts differ."""
    names = []
    for name in dict.fromkeys([*held, *wanted]):
        a, b = held.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _difference(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(prefix + name)
    return names
