"""The house: which room may import which, no circle, and the words that names must not be."""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

from utils.config import HOME, _Loader

# A room may import the rooms named here, and itself; scripts are the files at the top.
MAY_IMPORT = {
    "utils": set(),
    "metrics": set(),
    "models": {"utils"},
    "datasets": {"models", "utils"},
    "tasks": {"datasets", "metrics", "models", "utils"},
    "labeling": {"datasets", "metrics", "models", "utils"},
    "reporting": {"metrics", "utils"},
    "grid": {"utils"},
    "scripts": {"datasets", "grid", "labeling", "metrics", "models", "reporting", "tasks", "utils"},
    "benchmarks": {"scripts", "datasets", "grid", "labeling", "metrics", "models", "reporting", "tasks", "utils"},
}
# What a folder's files may import of the libraries that take seconds to load.
HEAVY = {"matplotlib": "reporting/figures", "open_clip": "models/backbones", "transformers": "models/backbones"}
EXCEPTIONS = {  # names and templates of ImageNet's classes; the figures of studies
    ("datasets.classification", "open_clip.zero_shot_metadata"),
    ("benchmarks.few_pairs", "matplotlib.figure"),
    ("benchmarks.cost", "matplotlib.figure"),
    ("benchmarks.densities", "matplotlib.figure"),
    ("benchmarks.scale", "matplotlib.figure"),
}


def modules():
    """Every module of the suite outside of tests and docs: {dotted name: its file}."""
    files = [path for path in HOME.glob("*.py")]
    files += [path for room in MAY_IMPORT for path in (HOME / room).glob("**/*.py")]
    names = {}
    for path in files:
        parts = path.relative_to(HOME).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


@functools.cache
def nodes(path):
    """The nodes of a file's syntax tree, read once."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def imports(path):
    """The dotted names that a file imports, wherever in it, also by importlib with a literal name."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import: name the module in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Call) and "import_module" in (getattr(node.func, key, "") for key in ("id", "attr")):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def room(module):
    """The room of a module, or `scripts`; None for a library's."""
    first = module.partition(".")[0]
    if module not in MODULES:
        return None
    return first if first in MAY_IMPORT else "scripts"


@pytest.fixture(scope="module")
def graph():
    """The modules that each module imports."""
    return {module: {other for other in imports(path) if other in MODULES} for module, path in MODULES.items()}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_lower_rooms_alone(name, graph):
    for module, others in graph.items():
        if room(module) == name:
            above = {other for other in others if room(other) not in MAY_IMPORT[name] | {name}}
            assert not above, f"{module} imports {', '.join(sorted(above))}"


def test_no_two_modules_import_each_other(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_the_table_of_rooms_is_of_the_folders_that_there_are():
    folders = {path.parent.name for path in HOME.glob("*/__init__.py")} - {"tests"}
    assert folders <= set(MAY_IMPORT)


def test_nothing_that_runs_what_it_reads():
    """No pickle, no object array, no YAML but the safe loader's, no code of a hub, no archive that writes files."""
    unsafe = r"pickle\.loads?\b|allow_pickle=True|weights_only=False|trust_remote_code=True|extractall"
    unsafe += r"|(?<!\.)\beval\(|\bexec\(|yaml\.(unsafe|full)_load|yaml\.load\((?!.*, _Loader\))"
    unsafe += r"|shell=True|os\.system|joblib|marshal|shelve"
    for module, path in MODULES.items():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(unsafe, line)]
        assert not lines, f"{module}: {lines[0]}"
    assert issubclass(_Loader, yaml.SafeLoader | getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def test_heavy_libraries_stay_in_their_rooms():
    for module, path in MODULES.items():
        for name in imports(path):
            place = HEAVY.get(name.partition(".")[0])
            allowed = place is None or path.is_relative_to(HOME / place) or (module, name) in EXCEPTIONS
            assert allowed, f"{module} imports {name}, which belongs in {place}"


def test_imports_by_importlib_count(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(
        "import importlib\ndef f(name): importlib.import_module(name), importlib.import_module('torch.nn')\n"
    )
    assert list(imports(path)) == ["importlib", "torch.nn"]


def test_metrics_and_distributions_have_examples():
    """Every public function of metrics/, and every public class and function of models/distributions/."""
    kinds = {"metrics": ast.FunctionDef, "models/distributions": ast.FunctionDef | ast.ClassDef}
    for folder, kind in kinds.items():
        for path in (HOME / folder).glob("*.py"):
            for node in nodes(path)[0].body:
                if isinstance(node, kind) and not node.name.startswith("_"):
                    assert ">>> " in (ast.get_docstring(node) or ""), f"{path.name}: {node.name} has no example"


def test_names_say_what_they_hold():
    """No variable or parameter is one of the catch-alls that could hold anything."""
    catch_alls = {"found", "said", "doubt", "doubts", "about", "own", "held", "told", "given", "way"}
    places = []
    for path in [*MODULES.values(), *Path(HOME / "tests").glob("*.py")]:
        for node in nodes(path):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
            if name in catch_alls:
                places.append(f"{path.relative_to(HOME)}:{node.lineno} {name}")
    assert not places, "\n".join(dict.fromkeys(places))
