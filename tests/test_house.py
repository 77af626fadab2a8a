"""The house: sizes of files and functions, what `stages/` holds, and imports without a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

from rlhfjax.config.recipe import STAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhfjax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HALLS = {
    "job": "what a stage is given",
    "models": "the models that stages make",
    "starts": "what they start from",
    "building": "their programs, apart from running them",
    "batches": "their data",
    "chat_settings": "how their conversations are written",
    "objectives": "algorithms over a model",
    "compilation": "their programs, compiled ahead",
    "learning": "what both halls share",
    "offline": "the hall of stages that learn from data",
    "online": "the hall of stages that sample while they learn",
    "online_programs": "its programs",
    "packed_rows": "its rows",
    "rewards": "its scores",
    "work": "what their programs have to compute",
    "contract": "the plan that their programs are compared with",
}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions():
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def parameters(node):
    given = node.args
    several = [one for one in (given.vararg, given.kwarg) if one]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *several]


def test_files_have_at_most_320_lines():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > 320} == {}


def test_functions_have_at_most_60_lines():
    """From `def` to the end, the docstring included."""
    long = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def test_functions_have_at_most_10_parameters():
    """`self` included; what is given as *rest or **rest counts as one."""
    many = {name: len(parameters(node)) for name, node in functions()}
    assert {name: count for name, count in many.items() if count > 10} == {}


def test_no_file_is_for_whatever_is_left_over():
    left_over = {"utils", "common", "helpers", "misc", "trainer"}
    assert [str(path) for path in SOURCES if left_over & {path.stem, *path.relative_to(PACKAGE).parts}] == []


def test_stages_holds_stages_and_their_halls_alone():
    """Each module is one that the table of stages names, or a hall named above; what is measured has its own folder."""
    there = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    stages = {facts.module for facts in STAGES}
    assert stages <= there
    assert there - stages == HALLS.keys()
    folders = {path.name for path in (PACKAGE / "stages").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {"measures"}


# Imports -------------------------------------------------------------------------------------------------------------


def imported(path, modules):
    """The modules that a file imports anywhere in it: inside functions, and for types alone, too.

    `from package import module` is an import of the module, and of the package only where that has no such module.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in modules or node.module in modules:
                    yield module if module in modules else node.module


def circle_of(package):
    """The modules of one import circle of a package, the first again at the end; nothing where there is none."""
    parts = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    names = {path: ".".join(each).removesuffix(".__init__") for path, each in parts.items()}
    graph = {name: {*imported(path, set(names.values()))} - {name} for path, name in names.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_imports_go_in_a_circle():
    """Not even where one half stands in a function or under TYPE_CHECKING, where lint-imports does not look."""
    assert circle_of(PACKAGE) == []


@pytest.mark.parametrize(
    "second",
    [
        "from rlhfjax.a import one",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlhfjax.a import one",
        "def later():\n    from rlhfjax import a",
        "import rlhfjax.a",
    ],
)
def test_a_circle_is_found_wherever_it_hides(second, tmp_path):
    package = tmp_path / "rlhfjax"
    package.mkdir()
    files = {"__init__": "", "a": "from rlhfjax import b", "b": "import os", "c": "from rlhfjax.a import one"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    assert circle_of(package) == []
    (package / "b.py").write_text(second, encoding="utf-8")
    assert set(circle_of(package)) == {"rlhfjax.a", "rlhfjax.b"}
