"""Random seeds."""

import random

import numpy as np
import torch


def seed_everything(seed):
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
