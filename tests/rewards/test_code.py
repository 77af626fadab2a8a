"""What a run knows of the code of its rewards, and that a stage goes on with the same alone."""

import hashlib
import sys

import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.rewards import digests_of, facts_of, refuse_other_code
from tests.rewards.conftest import terms_of


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def exact(examples): ...\n")
    (tmp_path / "grade.py").write_text("print(1)\n")
    return tmp_path


def entries(**more):
    return [
        {"model": "reward"},
        {"function": "mine.py:exact", "weight": 0.5, **more},
        {"command": [sys.executable, "grade.py", "--fast"], "name": "grade"},
        {"repetition": {}},
    ]


def test_facts_name_code_with_its_digest(files):
    facts = facts_of(terms_of(*entries()))
    assert facts["model"] == {"kind": "model", "weight": 1.0}
    assert facts["exact"] == {
        "kind": "function",
        "weight": 0.5,
        "function": "mine.py:exact",
        "sha256": {"mine.py": sha256(files / "mine.py")},
    }
    assert facts["grade"]["argv"] == [sys.executable, "grade.py", "--fast"]
    assert facts["grade"]["sha256"]["grade.py"] == sha256(files / "grade.py")
    assert set(digests_of(facts)) == {"mine.py", "grade.py", sys.executable}


def test_a_stage_goes_on_with_the_code_that_it_began_with(files):
    then = facts_of(terms_of(*entries()))
    refuse_other_code("grpo", [{}, then], facts_of(terms_of(*entries(name="other"))))
    (files / "grade.py").write_text("print(2)\n")
    now = facts_of(terms_of(*entries()))
    with pytest.raises(DataError, match=r"stages.grpo.rewards: grade.py has changed .* --from grpo"):
        refuse_other_code("grpo", [then], now)
    refuse_other_code("grpo", [then, now], now)
    refuse_other_code("grpo", [], now)


def test_code_that_cannot_be_read_is_named(files):
    (files / "mine.py").unlink()
    with pytest.raises(ConfigError, match=r"rewards: mine.py: expected a readable file, got No such file"):
        facts_of(terms_of(*entries()))
