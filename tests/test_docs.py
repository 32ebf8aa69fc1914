"""README and docs: size, links, the generated map, and every command that they print, run on small built-in data."""

import csv
import importlib
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from check_method import SMALL, SMALL_WORLD
from conftest import write_classes
from pages import DOCS, FENCE, README, blocks

import train
from datasets.shapes import Shapes
from reporting.figures import style
from utils.config import HOME

PAGES = [README, *DOCS, HOME / "benchmarks" / "RESULTS.md", HOME / "configs" / "methods" / "README.md"]
INLINE = re.compile(r"`((?:make|python|\w+\.py) [^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CLASSES = "data.options.images={train: 40, val: 40, test: 40, shifted-train: 40, shifted-val: 40, shifted-test: 40}"
# What makes a printed command small: flags, and settings for its --set, by script and then by data set.
SMALLER = {
    "cache_embeddings": ["--device", "cpu", "--workers", "0", "--quiet"],
    "train": ["--device", "cpu", "--quiet"],
    "eval": ["--device", "cpu", "--quiet"],
    "uncertainty": ["--device", "cpu"],
    "report": ["--quiet"],
    "reproduce": ["--dry-run"],  # tests/test_reproduce.py runs a grid
    "active_learning": [
        *("--budgets", "4", "--seeds", "0", "--epochs", "2", "--draws", "5", "--epig-pool", "20"),
        *("--epig-targets", "10", "--device", "cpu", "--quiet"),
    ],
    "benchmarks.factor_trace": ["--trials", "1", "--batches", "1", "--device", "cpu"],
}
SETTINGS = {
    ("cache_embeddings", "shapes"): SMALL_WORLD,
    ("cache_embeddings", "shapes-objects"): [CLASSES],
    ("cache_embeddings", "shapes-colors"): [CLASSES],
}
DRAWN = "overview"  # of all figures; tests/test_page.py draws the others
DOWNLOADED = ("pairs", "notes")  # data sets whose own backbone would be downloaded


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert len(text.split()) <= 1300


def test_pictures_are_small():
    for path in (HOME / "docs").glob("*.png"):
        assert path.stat().st_size < 200_000, path


def test_the_map_is_fresh():
    written = (HOME / "docs" / "map.md").read_text(encoding="utf-8")
    fresh = runpy.run_path(str(HOME / "docs" / "make_map.py"))["text"]()
    assert written == fresh, "docs/map.md is stale: run `python docs/make_map.py`"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(HOME).as_posix())
def test_links_point_at_something(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_flags_are_those_of_the_scripts(capsys):
    """docs/flags.md lists every flag of every script's --help under its heading, and no other."""
    sections = re.split(r"^## ", (HOME / "docs" / "flags.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(section.split("\n", 1) for section in sections[1:])
    scripts = {heading.removesuffix(".py"): text for heading, text in sections.items() if heading.endswith(".py")}
    assert len(scripts) == 7
    for script, text in scripts.items():
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        usage = capsys.readouterr().out.split("options:")[1]
        flags = {flag for line in usage.splitlines() for flag in re.findall(r"^  (?:-\w, )?(--.*?)(?:  |$)", line)}
        flags = {word for line in flags for word in re.findall(r"--[\w-]+", line)}
        listed = {
            flag for row in re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE) for flag in re.findall(r"--[\w-]+", row)
        }
        assert listed == flags - {"--help"}, script


def test_every_block_says_what_it_is():
    """Commands stand in blocks that the next test reads, and README has the one example that tests of methods read."""
    for path in [README, *DOCS]:
        for block in blocks(path):
            assert block.info in ("bash", "console", "python", "yaml", "csv", ""), block.place
            assert block.info or not re.search(r"^(\$ )?(python|make|torchrun) ", block.text, re.MULTILINE), block.place
    for info, first in (("python", "# models/mine.py\n"), ("yaml", "# configs/methods/mine.yaml\n")):
        assert len([block for block in blocks(README) if block.info == info and block.text.startswith(first)]) == 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(HOME).as_posix())
def test_commands_in_running_text_exist(path, capsys):
    """Their targets, scripts and flags exist; SCRIPT.py and NAME are placeholders."""
    for command in INLINE.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        program, *words = command.removeprefix("python ").removeprefix("-m ").split()
        if program == "make":
            assert words[0] in targets(), command
        elif program != "SCRIPT.py":
            module = program.removesuffix(".py").replace("/", ".")
            assert (HOME / module.replace(".", "/")).with_suffix(".py").is_file(), command
            flags = set(re.findall(r"--[\w-]+", command))
            if flags:
                with pytest.raises(SystemExit):
                    importlib.import_module(module).main(["--help"])
                options = capsys.readouterr().out.split("options:")[1]
                assert flags <= set(re.findall(r"--[\w-]+", options)), command


def targets():
    """List the targets of the Makefile."""
    return re.findall(r"^([\w-]+):", (HOME / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def desk(small_world, pooled_world, tmp_path_factory):
    """A working folder with everything that the pages take for granted, and a copy of configs that examples go to."""
    folder, home = tmp_path_factory.mktemp("desk"), tmp_path_factory.mktemp("home")
    shutil.copytree(HOME / "configs", home / "configs", copy_function=os.symlink)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("utils.config.HOME", home)
        patch.setattr(style, "REGISTERED", {"retrieval": [d for d in style.REGISTERED["retrieval"] if d.name == DRAWN]})
        (folder / "data").mkdir()
        (folder / "data" / "shapes").symlink_to(small_world / "data" / "shapes")
        write_pairs(folder)
        write_classes(folder / "images")
        cached = small_world / "embeddings" / "shapes" / "shapes-tiny" / "val"
        arrays = {name: np.load(cached / f"{name}.npy") for name in ("image", "text", "image_of_text")}
        np.savez("pairs.npz", **arrays)
        examples = [block for path in [README, *DOCS] for block in blocks(path) if block.file]
        modules = [write_example(block, home, patch) for block in examples]
        shutil.copytree(pooled_world / "embeddings", "embeddings")
        run(train, ["--dataset", "shapes", "--method", "asymvlm-psd"])  # as `make demo` does
        yield folder
        for name in filter(None, modules):
            del sys.modules[name]


def write_pairs(folder):
    """Write the images of the small `shapes` as pairs in mine.csv, and as the notes of docs/extending.md."""
    source = Shapes("data/shapes", **SMALL)
    captions = {}
    for caption in source.captions("val"):
        captions.setdefault(caption.image_id, []).append(caption.text)
    with open("mine.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number, image in enumerate(source.images("val")):
            rows.writerows([image.path, text] for text in captions[image.id])
            split = folder / "notes" / ("test" if number % 5 == 0 else "train")
            split.mkdir(parents=True, exist_ok=True)
            shutil.copy(image.path, split / f"{number:04}.png")
            (split / f"{number:04}.txt").write_text("\n".join(captions[image.id]))


def write_example(block, home, patch):
    """Write an example into the copy of the repository and import it; returns the module's name, None of a YAML."""
    path = block.write(home)
    if path.suffix == ".yaml":
        assert isinstance(yaml.safe_load(block.text), dict), block.place
        return None
    package = importlib.import_module(".".join(Path(block.file).parent.parts))
    if str(path.parent) not in package.__path__:
        patch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    name = ".".join(Path(block.file).with_suffix("").parts)
    importlib.import_module(name)
    return name


def run(script, words):
    """Run a script's main on words that are made small; raises AssertionError if it ends on a mistake."""
    data = words[words.index("--dataset") + 1] if "--dataset" in words else ""
    words = [*words, *SMALLER.get(script.__name__, [])]
    settings = [*SETTINGS.get((script.__name__, data), [])]
    if script.__name__ == "train":
        settings.append("train.epochs=1")
    if data in DOWNLOADED and "--backbone" not in words:
        words += ["--backbone", "shapes-tiny"]
    if settings and "--set" in words:
        words[words.index("--set") + 1 : words.index("--set") + 1] = settings
    elif settings:
        words += ["--set", *settings]
    code = script.main(words)
    assert not code, words


def check_names(script, words):
    """Parse the flags of a command that cannot be run here, which resolves the names in them."""
    script.parse(words)


def follow(words, needs):
    """Do what a printed command says, or check its flags and names if it needs data from elsewhere."""
    if words[0] == "make":
        assert words[1] in targets()
        return
    if words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
        return
    if needs and (words[0] in ("python3", "ruff") or (words[:2] == ["python", "-m"] and words[2] in ("pip", "pytest"))):
        return  # of the environment: tests/test_machines.py compares them with the Makefile
    if words[0] == "torchrun":
        assert needs
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    assert words[0] == "python"
    name, words = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    script = importlib.import_module(name)
    (check_names if needs else run)(script, words)


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_every_command_runs(path, desk, tmp_path, monkeypatch):
    """In order, on small built-in data; only flags and names of the blocks that say `# needs ...`.

    Pages share caches, but no runs and no results.
    """
    for item in desk.iterdir():
        if item.name == "checkpoints":
            shutil.copytree(item, tmp_path / item.name)
        else:
            (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    for block in blocks(path):
        if block.info in ("bash", "console"):
            for words in block.commands:
                try:
                    follow(words, block.needs)
                except SystemExit as stop:  # it has said why
                    if stop.code:
                        pytest.fail(f"{block.place}: {shlex.join(words)} ends with exit code {stop.code}")
