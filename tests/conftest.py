import os
from pathlib import Path

import pytest
import torch

import cache_embeddings

torch.set_num_threads(1)  # small widths: threads only wait for one another
os.environ["HF_HUB_OFFLINE"] = "1"

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
SMALL_WORLD = ["data.options.train_images=300", "data.options.val_images=100"]


@pytest.fixture
def shared():
    """The workplace's folder of real files and golden figures; the project does not depend on it."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent here")
    return SHARED


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A folder in which a small `shapes` is cached with the built-in backbone."""
    folder = tmp_path_factory.mktemp("world")
    here = os.getcwd()
    os.chdir(folder)
    try:
        cache_embeddings.main(["--dataset", "shapes", "--quiet", "--device", "cpu", "--set", *SMALL_WORLD])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def world(small_world, tmp_path, monkeypatch):
    """A fresh working folder that sees the cached small world."""
    for name in ("embeddings", "data"):
        (tmp_path / name).symlink_to(small_world / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(capsys):
    """Call a script's main and give the one sentence it ends on with exit code 2."""

    def call(main, *argv):
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert error.count("\n") == 1, error
        return error

    return call
