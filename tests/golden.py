"""The float64 problem on which outputs of the public AsymVLM suite were recorded, and methods set to it."""

import json
from pathlib import Path

import numpy as np
import torch

from utils.config import load_config, make_adaptor

SEED, DIM = 7, 512


def recorded(name):
    """Read the outputs of tests/data/reference_<name>.json."""
    return json.loads((Path(__file__).parent / "data" / f"reference_{name}.json").read_text())


def problem():
    """Six matched images and captions (6, 512)."""
    rng = np.random.RandomState(1000 * SEED + 900)
    a, n = rng.standard_normal((6, DIM)), rng.standard_normal((6, DIM))
    scale = 10 / np.sqrt(DIM)
    return torch.tensor(a * scale), torch.tensor((0.6 * a + 0.8 * n) * scale)


def reference(method, last_layer=1.0):
    """The method's reference preset with the problem's parameters; the last layer multiplied by `last_layer`."""
    adaptor = make_adaptor(load_config("coco", method, preset="reference"), DIM).double().eval()
    tensors = [p for p in adaptor.parameters() if p.numel() > 1]
    with torch.no_grad():
        for k, parameter in enumerate(tensors):
            g = np.random.RandomState(1000 * SEED + k).standard_normal(parameter.numel()).reshape(parameter.shape)
            parameter.copy_(torch.tensor(g / np.sqrt(g.shape[1]) if g.ndim == 2 else 0.1 * g))
        for parameter in tensors[-2:]:
            parameter.mul_(last_layer)
    return adaptor
