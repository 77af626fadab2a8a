"""The table "Where to add" of CONTRIBUTING.md against the code: its files are there, and hold what they are said to."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path
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
        ("rloo", ("an offline algorithm", "an online algorithm", "a stage")),
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


def test_every_algorithm_is_named_and_built_over_a_model():
    """Each is named in `algorithms/__init__.py` and in `stages/objectives.py`; an online stage has one of its own."""
    given = {name: getattr(algorithms, name) for name in algorithms.__all__}
    contracts = (algorithms.Objective, algorithms.OnlineAlgorithm)
    bases = {name: set(one.__mro__[1:]) & {*contracts} for name, one in given.items() if inspect.isclass(one)}
    named = {name for name, found in bases.items() if found and given[name] not in contracts}
    built = {node.id for node in ast.walk(tree_of(PACKAGE / "stages" / "objectives.py")) if isinstance(node, ast.Name)}
    assert {"Dpo", "LanguageModelling", "RewardModelling"} <= named <= built
    for name in (facts.name for facts in STAGES if facts.online):
        assert algorithms.OnlineAlgorithm in bases[name.capitalize()]
        assert given[name.capitalize()].__module__ == f"rlhfjax.algorithms.{name}"


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
