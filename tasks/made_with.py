"""What a result was made with, which its file stores: versions, device, commit."""

import functools
import importlib.metadata
import platform
import subprocess

import torch

from utils.config import HOME


def made_with(device):
    """What a result was made with: versions, the device's name, the suite's commit, and whether its files are as there.

    device: a torch.device. Commit and clean are None where the suite is no repository, or git is absent.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    versions |= {"python": platform.python_version()}
    return {"versions": versions, "device": name} | _commit()


@functools.cache
def _commit():
    def git(*words):
        done = subprocess.run(["git", "-C", HOME, *words], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "clean": None}
