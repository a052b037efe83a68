"""Imports of experiments run one way, and each file is where it belongs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
COMMANDS = {
    "benchmark",
    "compare_gradients",
    "double_descent",
    "find_mislabeled",
    "grokking",
    "leave_one_out",
    "private",
    "sweep",
    "train",
    "trainability",
}
# A module imports from its own folder, except for commands, and from lower layers.
LAYERS = {
    "command": {"suites", "gradient_checks", "support"},
    "suites": {"suites", "support"},
    "gradient_checks": {"gradient_checks", "support"},
    "support": {"support"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(EXPERIMENTS.rglob("*.py"))
    if path.name != "__init__.py"
}


def layer(module):
    """The layer of a module of experiments, by its full name."""
    _, *folders, name = module.split(".")
    if not folders:
        return "command" if name in COMMANDS else name
    return folders[0]


def imported_modules(source):
    """Full names of the modules of this project that a source imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("experiments", "tests")}


def imports_of(path):
    """Modules of experiments that a file imports."""
    names = imported_modules(path.read_text(encoding="utf-8"))
    assert not any(name.split(".")[0] == "tests" for name in names)
    return names & MODULES.keys()


def cycle(graph):
    """Modules of a graph that are on a cycle or lead to one."""
    graph = dict(graph)
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {
            name: targets - leaves
            for name, targets in graph.items()
            if name not in leaves
        }
    return set(graph)


def test_the_folder_has_the_commands_and_nothing_else():
    entries = [
        path
        for path in EXPERIMENTS.iterdir()
        if path.name != "__pycache__" and not path.name.startswith(".")
    ]
    files = {path.name for path in entries if path.is_file()}
    required = {f"{name}.py" for name in COMMANDS} | {"__init__.py"}
    pages = {"README.md", "BENCHMARKS.md", "derivation.ipynb"}
    assert required <= files <= required | pages
    folders = {path.name for path in entries if path.is_dir()}
    assert folders == LAYERS.keys() - {"command"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_layers_alone(module):
    imports = imports_of(MODULES[module])
    assert {layer(name) for name in imports} <= LAYERS[layer(module)]


def test_imports_have_no_cycle():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(graph)
    assert cycle(graph) == set()


def test_jaxbce_imports_nothing_of_experiments_or_tests():
    for path in (ROOT / "jaxbce").rglob("*.py"):
        assert imported_modules(path.read_text(encoding="utf-8")) == set(), path


def test_imports_and_cycles_are_found():
    source = """
import experiments.support.cli, os
def f():
    from experiments.suites import case as c, report
"""
    assert imported_modules(source) == {
        "experiments.support.cli",
        "experiments.suites",
        "experiments.suites.case",
        "experiments.suites.report",
    }
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}
