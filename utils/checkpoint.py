"""A run's folder: config.yaml (resolved), state.pt while it trains, adaptor.pt and log.csv when it is done."""

import dataclasses
import hashlib
import pickle
import zipfile
from pathlib import Path

import torch

from utils.config import Config, difference, make_adaptor
from utils.errors import UserError
from utils.files import atomic

BROKEN = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError, TypeError)


class Run:
    """The folder of one training run.

    `claim` takes it for a configuration; `resume`, `save_state` and `finish` bracket the training; `load` reads it.
    """

    def __init__(self, config):
        self.config, self.folder = config, config.checkpoint
        self.adaptor_file, self.state_file = self.folder / "adaptor.pt", self.folder / "state.pt"

    @property
    def done(self):
        """Whether the training is finished."""
        return self.adaptor_file.is_file()

    def claim(self, identity, overwrite=False):
        """Take the folder, or raise a UserError if it holds a run with another configuration or other embeddings.

        identity: dict of what the run is trained on, kept beside the weights. overwrite: replace such a run.
        """
        self.identity = identity
        changed = self.changed(identity)
        if changed and not overwrite:
            raise UserError(
                f"{self.folder} holds a run with another {', '.join(changed)}: give this one a name of its own with"
                " --tag NAME, or replace it with --overwrite."
            )
        if changed:
            self.adaptor_file.unlink(missing_ok=True)
            self.state_file.unlink(missing_ok=True)
        if self.done:
            self.state_file.unlink(missing_ok=True)  # a kill may have left it
        self.config.save(self.folder / "config.yaml")

    def changed(self, identity):
        """Name what differs between the weights that the folder holds and this run on embeddings of `identity`.

        Raises UserError where the weights are damaged.
        """
        files = [file for file in (self.adaptor_file, self.state_file) if file.is_file()]
        if not files:
            return []
        try:
            held = dataclasses.asdict(Config.load(self.folder / "config.yaml"))
        except UserError:
            return ["configuration, for its config.yaml is missing or damaged"]
        changed = difference(held, dataclasses.asdict(self.config))
        if any(read_run(file)["identity"] != identity for file in files):
            changed.append("cache of embeddings")
        return changed

    def resume(self):
        """Read what a killed run left, or None."""
        return read_run(self.state_file) if self.state_file.is_file() else None

    def save_state(self, **state):
        """Keep what a killed run goes on from."""
        _save(self.state_file, state | {"identity": self.identity})

    def finish(self, adaptor, seen):
        """Keep the trained weights, and which images they have seen (`Pairs.seen`)."""
        state = {name: value.detach().cpu() for name, value in adaptor.state_dict().items()}
        _save(self.adaptor_file, {"state_dict": state, "identity": self.identity, "seen": seen})
        self.state_file.unlink(missing_ok=True)

    def load(self, device):
        """Read the trained adaptor, its configuration and identity; raises UserError where missing or damaged.

        Which images it has seen is `seen` from then on.
        """
        if not self.done:
            state = "its training is unfinished" if self.state_file.is_file() else "it is not trained yet"
            raise UserError(
                f"there is no checkpoint in {self.folder.absolute()} ({state}): run `{self.config.command}`."
            )
        saved = read_run(self.adaptor_file)
        trained = Config.load(self.folder / "config.yaml")
        adaptor = make_adaptor(trained, saved["identity"]["dim"])
        try:
            self.seen = saved["seen"]
            adaptor.load_state_dict(saved["state_dict"])
        except BROKEN as error:
            said = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.adaptor_file} does not fit its config.yaml ({said}): train again.") from None
        return adaptor.to(device).eval(), trained, saved["identity"]

    def weights_hash(self):
        """Identify the trained weights: 16 hex digits, kept in every result made with them."""
        return hashlib.sha256(self.adaptor_file.read_bytes()).hexdigest()[:16]


def _save(path, value):
    with atomic(path) as partial, open(partial, "wb") as file:  # given a path, torch keeps its name in the bytes
        torch.save(value, file)


def read_run(path):
    """Read a file of a run; raises UserError where it is damaged or none of ours."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        _ = [value["identity"][name] for name in ("dim", "encoder", "encoder_fingerprint")]  # as all files of ours have
        return value
    except BROKEN:
        raise UserError(f"{path} is damaged or truncated: delete {Path(path).parent} and train again.") from None
