"""Random seeds."""

import random

import numpy as np
import torch


def seed_everything(seed):
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state(device):
    """The state of torch's generators, on the CPU and on `device`, for `set_random_state`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state):
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    for name in state.keys() - {"cpu"}:
        getattr(torch, name).set_rng_state(state[name])
