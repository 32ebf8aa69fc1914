"""A run's folder: config.yaml (resolved), state.pt during training, adaptor.pt and log.csv after it."""

import dataclasses
import hashlib
import io
from pathlib import Path

import torch

from utils.config import Config, difference, make_adaptor
from utils.errors import UserError
from utils.files import UNREADABLE, write_bytes


class Run:
    """The folder of one training run.

    To train: `claim` the folder, `resume` from a saved state, `save_state` now and then, `finish`. To use: `load`.
    """

    def __init__(self, config):
        self.config, self.folder = config, config.checkpoint
        self.adaptor_file, self.state_file = self.folder / "adaptor.pt", self.folder / "state.pt"

    @property
    def done(self):
        """Whether the training is finished."""
        return self.adaptor_file.is_file()

    def claim(self, identity, overwrite=False):
        """Reserve the folder; raises UserError if it holds a run with another configuration or other embeddings.

        identity: dict that identifies the training embeddings, saved with the weights. overwrite: replace such a run.
        """
        self.identity = identity
        changed = self.changed(identity)
        if changed and not overwrite:
            raise UserError(
                f"{self.folder} holds a run with another {', '.join(changed)}: give this run another name with"
                " --tag NAME, or replace that one with --overwrite."
            )
        if changed:
            self.adaptor_file.unlink(missing_ok=True)
            self.state_file.unlink(missing_ok=True)
        if self.done:
            self.state_file.unlink(missing_ok=True)  # a kill may have left it
        else:
            self.config.save(self.folder / "config.yaml")

    def changed(self, identity):
        """List what differs between the run in the folder and this one on embeddings of `identity`.

        Raises UserError if the weights in the folder are damaged.
        """
        files = [file for file in (self.adaptor_file, self.state_file) if file.is_file()]
        if not files:
            return []
        try:
            saved = dataclasses.asdict(Config.load(self.folder / "config.yaml"))
        except UserError:
            return ["configuration (its config.yaml is missing or damaged)"]
        changed = difference(saved, dataclasses.asdict(self.config))
        if any(read_run(file)["identity"] != identity for file in files):
            changed.append("cache of embeddings")
        return changed

    def resume(self):
        """Read the last saved state of a killed run, or None."""
        return read_run(self.state_file) if self.state_file.is_file() else None

    def save_state(self, **state):
        """Save the state from which a killed run resumes."""
        _save(self.state_file, state | {"identity": self.identity})

    def finish(self, adaptor, seen, bank, **choices):
        """Save the trained weights. seen: which images they were trained on (`Pairs.seen`).

        bank: NamedTuple of training queries. choices: what is true of the run and mostly is not: `start_kept`, whether
        held-out pairs chose the start; `untrained`, whether its uncertainty is that of random weights, then;
        `from_disk`, whether embeddings stayed there, which changes the order of the pairs.
        """
        state = {name: value.detach().cpu() for name, value in adaptor.state_dict().items()}
        saved = {"state_dict": state, "identity": self.identity, "seen": seen, "bank": bank._asdict()}
        _save(self.adaptor_file, saved | {name: True for name, holds in choices.items() if holds})
        self.state_file.unlink(missing_ok=True)

    def load(self, device):
        """Read the trained adaptor, its configuration and identity; raises UserError if missing or damaged.

        Sets `seen`, which images it was trained on, `bank`, the fields of its bank or None if it was trained before
        there were banks, and `untrained`, `start_kept` and `from_disk`, see `finish`.
        """
        if not self.done:
            state = "its training is unfinished" if self.state_file.is_file() else "it is not trained yet"
            raise UserError(
                f"there is no checkpoint in {self.folder.absolute()} ({state}): run `{self.config.command}`."
            )
        saved = read_run(self.adaptor_file)
        trained = Config.load(self.folder / "config.yaml")
        if trained.checkpoint != self.folder:  # results would go there, wherever that is
            raise UserError(f"{self.folder / 'config.yaml'} is of the run {trained.checkpoint}: train again.")
        adaptor = make_adaptor(trained, saved["identity"]["dim"])
        try:
            self.seen, self.bank, self.untrained = saved["seen"], saved.get("bank"), saved.get("untrained", False)
            self.start_kept = saved.get("start_kept", self.untrained)
            self.from_disk = saved.get("from_disk", False)
            adaptor.load_state_dict(saved["state_dict"])
        except UNREADABLE as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.adaptor_file} does not fit its config.yaml ({reason}): train again.") from None
        return adaptor.to(device).eval(), trained, saved["identity"]

    def weights_hash(self):
        """Hash of the trained weights, 16 hex digits, which every result made with them records."""
        return hashlib.sha256(self.adaptor_file.read_bytes()).hexdigest()[:16]


def _save(path, value):
    content = io.BytesIO()  # given a path, torch.save writes its name into the file, and its errors hide a full disk's
    torch.save(value, content)
    write_bytes(path, content.getbuffer())


def read_run(path):
    """Read a file that `Run` saved; raises UserError if it is damaged or was saved by something else."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        if any(name not in value["identity"] for name in ("dim", "encoder", "encoder_fingerprint")):
            raise KeyError("identity")
        if "seen" in value and not {"id_space", "image_id"} <= set(value["seen"]):
            raise KeyError("seen")
        return value
    except UNREADABLE:
        raise UserError(f"{path} is damaged or truncated: delete {Path(path).parent} and train again.") from None
