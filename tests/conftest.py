"""Fixtures that several tests share: a small cached world, the real files of the workplace, refusals."""

import contextlib
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

# One thread for each of the workers that share the cores, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Files of tests in memory, if that is large and may hold programs: the system takes half the time for them.
with contextlib.suppress(OSError, AttributeError):  # Windows has neither
    memory = os.statvfs("/dev/shm")
    fit = memory.f_bavail * memory.f_frsize > 4e9 and not memory.f_flag & os.ST_NOEXEC
    if fit and os.access("/dev/shm", os.W_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import filelock
import pytest

# What takes seconds to import is imported where it is used: pytest-xdist's first process, which runs no test, needs
# this file before it starts the others.
gc.disable()  # until all is imported: it takes a quarter of the time that collecting tests takes


def pytest_collection_modifyitems(items):
    """Long tests go first: at the end, one core would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 100)  # a full collection takes a tenth of a second
    gc.enable()
    import torch

    torch.set_num_threads(1)  # small widths: threads only wait for one another
    if "open_clip" in sys.modules:  # CLIP's vocabulary takes a quarter of a second to read: once for all backbones
        factory = sys.modules["open_clip"].factory
        factory.SimpleTokenizer = functools.cache(factory.SimpleTokenizer)


SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
POOLED = ["--features", "pooled", "--quiet", "--device", "cpu", "--workers", "1"]


def write_classes(folder, splits=("",)):
    """Copy val images of the small `shapes` into folders by shape, alternating between the splits."""
    from check_method import SMALL

    from datasets.shapes import VALUES, Shapes

    source = Shapes("data/shapes", **SMALL)
    for number, (image, scene) in enumerate(zip(source.images("val"), source.scenes("val"), strict=True)):
        of_shape = folder / splits[number % len(splits)] / VALUES[0][scene[0]]
        of_shape.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.path, of_shape)


def put(tree, path, value):
    """Replace the value at a path of keys in nested dicts and lists; returns the tree."""
    part = tree
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return tree


def homogeneous(phi):
    """Append to phi (N, P - 1) the 1 that multiplies a bias, (N, P)."""
    import torch

    return torch.nn.functional.pad(phi, (0, 1), value=1.0)


@pytest.fixture
def shared():
    """A folder of real files and golden figures beside the repository; the project does not depend on it."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent here")
    return SHARED


def forked_ranks(world, main, *arguments):
    """Call `main` in forked processes with what torchrun sets: (exit code, stdout, stderr) of each rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}

    def run(rank):
        os.environ.update({name: str(value) for name, value in (address | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        with (
            open(f"{rank}.out", "w") as out, contextlib.redirect_stdout(out),
            open(f"{rank}.err", "w") as err, contextlib.redirect_stderr(err),
        ):  # fmt: skip
            main(*arguments)

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    texts = [[Path(f"{rank}.{end}").read_text() for end in ("out", "err")] for rank in range(world)]
    return [(process.exitcode, *text) for process, text in zip(processes, texts)]


def forked(main, argv, errors=os.devnull):
    """Start a script's `main` as a shell does, in a session of its own, but forked: without seconds of imports.

    errors: the file of its stderr.
    """

    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [f"{main.__module__}.py"]
        with open(errors, "w") as file, open(os.devnull, "w") as nowhere:
            sys.stdout, sys.stderr = nowhere, file
            main(argv)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@contextlib.contextmanager
def handlers_kept(*numbers):
    """Put the handlers of these signals back after the block."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def made_once(tmp_path_factory, name, make):
    """Call `make` in a folder of its own, once for all workers of pytest-xdist; returns the folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                make()
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A folder with a small `shapes`, cached with the built-in backbone."""
    from check_method import SMALL_WORLD

    import cache_embeddings

    cache = ["--dataset", "shapes", "--quiet", "--device", "cpu", "--set", *SMALL_WORLD]
    return made_once(tmp_path_factory, "small_world", lambda: cache_embeddings.main(cache))


@pytest.fixture(scope="session")
def pooled_world(small_world, tmp_path_factory):
    """A folder with the small `shapes`, cached with pooled features."""

    def make():
        from check_method import SMALL_WORLD

        import cache_embeddings

        Path("data").symlink_to(small_world / "data")
        cache_embeddings.main(["--dataset", "shapes", *POOLED, "--set", *SMALL_WORLD])

    return made_once(tmp_path_factory, "pooled_world", make)


def share_pooled(pooled_world):
    """Link the pooled `shapes` into the working folder, beside what is cached there."""
    Path("data").symlink_to(pooled_world / "data")
    Path("embeddings").mkdir()
    Path("embeddings/shapes").symlink_to(pooled_world / "embeddings/shapes")


@pytest.fixture
def world(small_world, tmp_path, monkeypatch):
    """A new working folder with links to the cached small world."""
    for name in ("embeddings", "data"):
        (tmp_path / name).symlink_to(small_world / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(capsys):
    """Call a script's main, assert that it ends with exit code 2 and one sentence, and return that."""

    def call(main, *argv):
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert error.count("\n") == 1, error
        return error

    return call


@pytest.fixture
def one_figure(monkeypatch):
    """Let reports draw a single figure, in tests of anything else."""
    draw_one_figure(monkeypatch)


def draw_one_figure(patch):
    from reporting.figures import style  # matplotlib, which few tests need

    one = {task: drawings[:1] for task, drawings in style.REGISTERED.items() if task == "hierarchy"}
    patch.setattr(style, "REGISTERED", one)


@pytest.fixture
def blank_figures(monkeypatch):
    """Let reports draw every figure blank, in tests of the files and not of what they show."""
    from matplotlib.figure import Figure

    from reporting.figures import style

    blank = {
        task: [drawing._replace(draw=lambda part, looks, width: Figure((1, 1))) for drawing in drawings]
        for task, drawings in style.REGISTERED.items()
    }
    monkeypatch.setattr(style, "REGISTERED", blank)


@pytest.fixture
def problem():
    import decided

    return decided.problem()


@pytest.fixture(scope="session")
def pairs_once(tmp_path_factory):
    import decided

    return made_once(tmp_path_factory, "decisions", decided.cache_pairs)


@pytest.fixture
def pairs(pairs_once, tmp_path, monkeypatch):
    """A new working folder with 300 cached pairs, of which some captions fit several images, and `clip`."""
    return working_copy(pairs_once, ["embeddings"], ["checkpoints"], tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def classes_once(tmp_path_factory):
    import decided

    return made_once(tmp_path_factory, "classes", decided.cache_classes)


@pytest.fixture
def classes(classes_once, tmp_path, monkeypatch):
    """A new working folder with 300 embeddings of images in six classes, and `clip`."""
    return working_copy(classes_once, ["embeddings"], ["checkpoints"], tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def searched_once(small_world, tmp_path_factory):
    import decided

    return made_once(tmp_path_factory, "searched", lambda: decided.learn_from(small_world))


@pytest.fixture
def searched(searched_once, tmp_path, monkeypatch):
    """A new working folder with the small `shapes`, `clip`, and what its captions teach about decisions."""
    return working_copy(searched_once, ["embeddings", "data"], ["checkpoints", "results"], tmp_path, monkeypatch)


def working_copy(folder, linked, copied, tmp_path, monkeypatch):
    """Change to a new folder with links to some folders and copies of others."""
    for name in linked:
        (tmp_path / name).symlink_to(folder / name)
    for name in copied:
        shutil.copytree(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
