"""What to compute on: devices and cores."""

import os

import torch

from utils.errors import UserError


def pick_device(name="auto", number=0):
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a torch.device; raises UserError where it does not exist.

    number: of this process on its machine, by which several processes take several devices of `auto` or `cuda`.
    """
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        name = found[number % len(found)] if found else "cpu"
    if name not in ("cpu", *found):
        raise UserError(f"device '{name}' does not exist here; there is {', '.join(['cpu', *found])}.")
    return torch.device(name)


def usable_cores():
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
