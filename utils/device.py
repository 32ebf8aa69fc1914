"""Which device to compute on."""

import torch

from utils.errors import UserError


def pick_device(name="auto"):
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a torch.device; raises UserError where it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        found += ["mps"] if torch.backends.mps.is_available() else []
        raise UserError(f"device '{name}' does not exist here; there is {', '.join(found)}.") from None
    return device
