"""The check of ledgers, on ledgers made by hand: the right ones pass, and of a wrong one the first step is named."""

import hashlib
import json
import shutil

import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.errors import IntegrityError
from rlhfjax.runs.ledger import require_right

# Two batches of two and one that reaches into the second epoch, of three rows of `a` without row 1, and two of `b`.
HEADING = {
    "step": 0, "format": 1, "place": 0, "epoch": 4,
    "sources": [{"name": "a", "count": 3, "kept": [[0, 1], [2, 3]]}, {"name": "b", "count": 2, "kept": [[0, 2]]}],
}  # fmt: skip
RIGHT = [
    HEADING,
    {"step": 1, "first": 0, "rows": [2, 3]},
    {"step": 2, "first": 2, "rows": [0, 4, 4]},
    {"step": 3, "first": 5, "rows": [2, 0, 3]},
]
PLACES = [
    {"step": 0, "format": 1, "place": 0, "epoch": 10},
    {"step": 1, "first": 0, "count": 8},
    {"step": 2, "first": 8, "count": 8},
]


@pytest.fixture
def stage(tmp_path):
    """Writes the folder of a stage: ledger, metrics, newest checkpoint and whether it is done."""

    def write(ledger, steps=None, *, rollbacks=(), saved=None, complete=True, rest="", told=None):
        text = "".join(json.dumps(line) + "\n" for line in ledger) + rest
        (tmp_path / "ledger.jsonl").write_text(text, encoding="utf-8")
        steps = [line["step"] for line in ledger[1:]] if steps is None else steps
        counts = {step: sum(at <= step for at in rollbacks) for step in steps}
        rows = [json.dumps({"step": step, "guard/rollbacks": float(count)}) for step, count in counts.items()]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        if complete:
            (tmp_path / "complete.json").write_text(json.dumps(told or {"step": 1}), encoding="utf-8")
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        if saved:
            (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
        return tmp_path

    return write


def changed(step, ledger=RIGHT, **fields):
    return [line | (fields if line["step"] == step else {}) for line in ledger]


def without(*steps, ledger=RIGHT):
    return [line for line in ledger if line["step"] not in steps]


def test_a_right_ledger(stage):
    found = require_right(stage(RIGHT))
    assert "3 steps, 8 rows; each row once an epoch: a 2.00 of 2, b 2.00 of 2" in found
    assert "2 steps, 16 rows; an epoch has 10, each place of the order was read once" in require_right(stage(PLACES))


def test_what_a_rollback_left_out_counts_as_seen(stage):
    ledger = changed(2, without(3), left_out=[0, 4], first=4, rows=[2, 0])
    assert "2 steps, 4 rows, 2 more left out by rollbacks" in require_right(stage(ledger, rollbacks=[2]))
    places = changed(2, PLACES, left_out=8, first=16)
    assert "2 steps, 16 rows, 8 more left out by rollbacks" in require_right(stage(places, rollbacks=[2]))


@pytest.mark.parametrize(
    ("ledger", "expected"),
    [
        (changed(3, rows=[2, 2, 3]), "step 3: row 2 of a comes a second time in epoch 2 of its rows, after step 3"),
        (changed(2, rows=[2, 4, 4]), "step 2: row 2 of a comes a second time in epoch 1 of its rows, after step 1"),
        (changed(3, rows=[2, 0, 4]), "step 3: row 1 of b comes a second time in epoch 2 of its rows, after step 2"),
        (changed(1, rows=[1, 3]), "step 1: row 1 of a is none of the 2 that the stage reads"),
        (changed(1, rows=[2, 5]), "step 1: expected a row below 5, got 5"),
        (changed(1, rows=[2, -1]), "step 1: expected a row below 5, got -1"),
        (changed(2, rows=[0, 4]), "step 3: expected it to begin at place 4, got 5"),
        (changed(3, rows=[]), "step 3: expected rows that it read, got 0"),
        (changed(3, rows="2 0 3"), "step 3: expected what it read, got a line without"),
        (changed(3, first=4), "step 3: expected it to begin at place 5, got 4"),
        (changed(2, PLACES, first=9), "step 2: expected it to begin at place 8, got 9"),
        (changed(2, PLACES, count=None), "step 2: expected what it read, got a line without"),
        (without(2), "step 2: expected it, got step 3"),
        (without(0), "expected a heading in its first line, got something else"),
        (changed(0, sources=[{"name": "a", "count": 3, "kept": []}]), "expected a heading in its first line"),
        ([], "expected a heading in its first line, got none"),
    ],
)  # fmt: skip
def test_the_first_step_that_does_not_fit_is_named(stage, ledger, expected):
    with pytest.raises(IntegrityError) as error:
        require_right(stage(ledger, [1, 2, 3] if ledger[:1] == [HEADING] else [1, 2]))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1, 2, 3, 4], "step 4: it is not there, and metrics.jsonl has step 4"),
        ([1, 2], "step 3: it is there, and metrics.jsonl has no such step"),
        ([1, 3], "step 2: it is there, and metrics.jsonl has 3"),
    ],
)
def test_it_agrees_with_the_metrics(stage, steps, expected):
    with pytest.raises(IntegrityError, match=expected):
        require_right(stage(RIGHT, steps))


@pytest.mark.parametrize(
    ("ledger", "rollbacks", "expected"),
    [
        (changed(2, without(3), left_out=[0, 4], first=4, rows=[2, 0]), [], "2 rows are left out, .* none is noted"),
        (RIGHT, [2], "step 2: 0 rows are left out, .* one is noted"),
    ],
)
def test_nothing_is_left_out_without_a_rollback(stage, ledger, rollbacks, expected):
    with pytest.raises(IntegrityError, match=expected):
        require_right(stage(ledger, rollbacks=rollbacks))


def test_a_stage_that_is_under_way_answers_for_what_it_saved(stage):
    """Killed between two writes, it has a step in one file that is not in the other, or half a line."""
    assert "3 steps" in require_right(stage(RIGHT, [1, 2, 3, 4], saved=3, complete=False))
    assert "2 steps" in require_right(stage(RIGHT, [1, 2], saved=2, complete=False))
    assert "3 steps" in require_right(stage(RIGHT, [1, 2, 3, 4], complete=False, rest='{"step":4,"ro'))
    with pytest.raises(IntegrityError, match="step 3: it is there"):
        require_right(stage(RIGHT, [1, 2], saved=3, complete=False))


def test_a_stage_that_an_older_version_began(stage):
    sources = [source | {"passed": passed} for source, passed in zip(HEADING["sources"], (1, 1), strict=True)]
    late = [HEADING | {"step": 1, "place": 2, "sources": sources}, *RIGHT[2:]]
    assert "2 steps, 6 rows" in require_right(stage(late, [1, 2, 3]))


def test_the_file_is_the_one_that_the_stage_left(stage):
    folder = stage(RIGHT)
    digest = hashlib.sha256((folder / "ledger.jsonl").read_bytes()).hexdigest()
    (folder / "complete.json").write_text(json.dumps({"ledger_sha256": digest}), encoding="utf-8")
    assert "3 steps" in require_right(folder)
    path = folder / "ledger.jsonl"
    path.write_text(path.read_text().replace('"first": 0', '"first":  0'), encoding="utf-8")
    with pytest.raises(IntegrityError, match="expected SHA-256"):
        require_right(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"ledger\.jsonl: expected it, as complete\.json says, got nothing"):
        require_right(folder)


@pytest.mark.parametrize(("ledger", "code"), [(RIGHT, 0), (without(2), 4)])
def test_verify_checks_it(stage, ledger, code):
    folder = stage(ledger, [1, 2, 3])
    result = CliRunner().invoke(app, ["verify", str(folder)], prog_name="rlhfjax")
    assert result.exit_code == code, result.output
    assert ("step 2: expected it, got step 3" in result.stdout) == bool(code)
