"""The table "Where to add" of CONTRIBUTING.md against the code: its files are there, and hold what they are said to."""

import ast
import inspect
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import get_args

import pytest

from rlhfjax import algorithms
from rlhfjax.config.model import Family
from rlhfjax.config.recipe import NAMES, STAGES, TOKENIZER
from rlhfjax.config.rewards import KINDS, CalledTerm, HostTerm
from rlhfjax.config.schema import Stages
from rlhfjax.config.shape import _STYLES
from rlhfjax.evaluation.results import Evaluation
from rlhfjax.interop.architectures import ARCHITECTURES
from rlhfjax.interop.later_architectures import LATER
from rlhfjax.interop.mixtures import MIXTURES
from rlhfjax.models.decoder import FAMILIES
from rlhfjax.models.transformer_2017 import FAMILY as ENCODER_DECODER
from rlhfjax.rewards.example import Example
from rlhfjax.rewards.rules import rule_of
from rlhfjax.stages.evaluate import MEASURES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhfjax"
ROWS = dict(re.findall(r"^\| (an? [^|]*) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE))
FOLDERS = (PACKAGE, ROOT)


def place_of(name):
    """A file or folder that the table names; one of the package where nothing else is said."""
    return next((folder / name for folder in FOLDERS if (folder / name).exists()), None)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path):
    """The names that a file gives at its top."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id


def test_the_table_has_a_row_for_each_of_these():
    assert {"an offline algorithm", "an online algorithm", "a stage", "a measure", "a reward", "a model family"} <= set(
        ROWS
    )


@pytest.mark.parametrize("row", ROWS)
def test_every_place_that_a_row_names_is_there(row):
    names = re.findall(r"`([\w/]+(?:\.py|/))`", ROWS[row])
    assert [name for name in names if not place_of(name.replace("/NAME.py", "/"))] == []


@pytest.mark.parametrize(
    ("name", "file"), [pair for row in ROWS.values() for pair in re.findall(r"`(\w+)` in `([\w/]+\.py)`", row)]
)
def test_a_table_or_class_stands_in_the_file_that_it_is_said_to(name, file):
    if "NAME" not in file:
        assert name in defined(place_of(file))


@pytest.mark.parametrize(
    ("word", "rows"),
    [
        ("rloo", ("an online algorithm", "a stage")),
        ("numeric_match", ("a reward",)),
        ("heldout_losses", ("a measure",)),
        ("smollm3", ("a model family",)),
        ("olmo3", ("a model family",)),
    ],
)
def test_rows_name_each_file_that_knows_what_was_added(word, rows):
    """Of equations and tensors the names in docstrings apart, which say who published or shares them."""
    named = {name.replace("NAME", word) for row in rows for name in re.findall(r"`([\w/]+\.py)`", ROWS[row])}
    knows = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if word in said(path)]
    assert knows
    assert {path.as_posix() for path in knows if path.parts[0] != "functional"} <= named


def said(path):
    """The code of a file in lower case, without its docstrings."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree).lower()


# Rows one by one -----------------------------------------------------------------------------------------------------


def test_every_stage_has_its_section_its_key_and_its_function():
    assert list(Stages.model_fields) == [name for name in NAMES if name != TOKENIZER]
    keys = [facts.key for facts in STAGES]
    assert sorted(keys) == list(range(len(keys)))  # the next key is that of the next stage: none is taken twice
    for facts in STAGES:
        assert facts.name in defined(PACKAGE / "stages" / f"{facts.module}.py")


def test_every_algorithm_is_in_a_module_of_its_own_and_built_over_a_model():
    """Offline ones are named in `stages/objectives.py`, that of an online stage in the stage, and in no list."""
    loaded = [import_module(f"rlhfjax.algorithms.{module.name}") for module in iter_modules(algorithms.__path__)]
    classes = {name: one for module in loaded for name, one in vars(module).items() if inspect.isclass(one)}
    contracts = {algorithms.Objective, algorithms.OnlineAlgorithm}
    found = {name: one for name, one in classes.items() if contracts & {*one.__mro__[1:]} and one not in contracts}
    online = {facts.name.capitalize(): facts.name for facts in STAGES if facts.online}
    assert {"Dpo", "LanguageModelling", "RewardModelling"} | online.keys() <= found.keys()
    for name, one in found.items():
        file = f"{online[name]}.py" if name in online else "objectives.py"
        assert name in {node.id for node in ast.walk(tree_of(PACKAGE / "stages" / file)) if isinstance(node, ast.Name)}
        if name in online:
            assert algorithms.OnlineAlgorithm in one.__mro__
            assert one.__module__ == f"rlhfjax.algorithms.{online[name]}"


def test_an_online_algorithm_is_six_files_of_the_package():
    """Of the last that was added, its equation with its name among them."""
    words = ("rloo", "leaveoneout", "leave_one_out")
    knows = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if any(word in said(path) for word in words)]
    assert sorted(path.as_posix() for path in knows) == [
        *("algorithms/rloo.py", "config/online_stages.py", "config/recipe.py"),
        *("functional/__init__.py", "functional/returns.py", "stages/rloo.py"),
    ]


def test_every_measure_has_a_field_and_is_in_the_report():
    about = {"seed", "date", "hardware", "stage_seconds"}  # of the evaluation itself
    assert MEASURES.keys() | about == {field.name for field in fields(Evaluation)}
    report = tree_of(PACKAGE / "evaluation" / "report" / "sections.py")
    read = {node.attr for node in ast.walk(report) if isinstance(node, ast.Attribute)}
    assert MEASURES.keys() <= read


def test_every_file_of_measures_is_used_by_a_stage_or_another_measure():
    files = {path.stem for path in (PACKAGE / "stages" / "measures").glob("*.py")} - {"__init__"}
    imports = [
        node.module
        for path in (PACKAGE / "stages").rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom)
    ]
    assert [name for name in files if f"rlhfjax.stages.measures.{name}" not in imports] == []


SETTINGS = {
    "length": {"target": 4},
    "repetition": {"ngram": 1},
    "exact_match": {"field": "answer"},
    "numeric_match": {"field": "answer"},
    "forbidden": {"words": ["so"]},
}


def test_every_rule_has_a_section_and_a_case():
    """Each gives the number that follows from its section: a rule without a case would read another's settings."""
    rules = {name for name, kind in KINDS.items() if issubclass(kind, HostTerm) and not issubclass(kind, CalledTerm)}
    assert rules == SETTINGS.keys()
    example = Example(prompt="?", response="so 7", response_ids=(5, 5, 2), record={"answer": "7"})
    terms = {name: KINDS[name].model_validate({name: given}) for name, given in SETTINGS.items()}
    found = {name: rule_of(name, getattr(term, name))(example) for name, term in terms.items()}
    expected = {"length": -0.25, "repetition": -1 / 3, "exact_match": 0.0, "numeric_match": 1.0, "forbidden": -1.0}
    assert found == pytest.approx(expected)


def test_every_family_is_a_decoder_a_shape_and_an_architecture_of_transformers():
    decoders = set(get_args(Family)) - {ENCODER_DECODER}
    assert decoders == FAMILIES.keys() == _STYLES.keys() - {ENCODER_DECODER}
    assert decoders == ARCHITECTURES.keys() | LATER.keys() | MIXTURES.keys()
