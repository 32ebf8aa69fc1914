"""Devices and cores to compute on."""

import os

from utils.errors import UserError


def pick_device(name="auto", number=0):
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a torch.device; raises UserError if it does not exist.

    number: of this process on its machine; with `auto` or `cuda`, processes with different numbers share out the GPUs.
    """
    import torch  # takes two seconds, and not all that count cores need it

    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        name = accelerators[number % len(accelerators)] if accelerators else "cpu"
    if name not in ("cpu", *accelerators):
        raise UserError(f"device '{name}' does not exist here; there is {', '.join(['cpu', *accelerators])}.")
    return torch.device(name)


def usable_cores():
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
