"""Which device to compute on."""

import torch

from utils.errors import UserError


def pick_device(name="auto", number=0):
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a torch.device; raises UserError where it does not exist.

    number: of this process on its machine, by which several processes take several devices.
    """
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        name = found[number % len(found)] if found else "cpu"
    if name not in ("cpu", *found, *(["cuda"] if torch.cuda.is_available() else [])):
        raise UserError(f"device '{name}' does not exist here; there is {', '.join(['cpu', *found])}.")
    return torch.device(name)
