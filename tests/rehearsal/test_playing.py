"""How a scene is judged: by exit code, what was said, when, and by the bits of what it left."""

import json

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.rehearsal.playing import empty, judged, table
from rlhfjax.rehearsal.scenes import SCENES, cast
from rlhfjax.rehearsal.theatre import Played

LINE = "error: process {} (h, cpu:1, pid 7) says nothing since 14 s (stopped by a signal); last it was in sft step 4"


def run_with(folder, loss):
    (folder / "sft").mkdir(parents=True)
    row = {"step": 1, "loss/train": loss, "timing/step_s": loss}
    (folder / "sft" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def clean(tmp_path):
    return run_with(tmp_path / "clean", 1.5)


def resumed(clean, tmp_path, loss=1.5, starts=2, code=0):
    one = cast(SCENES["kill"], 0, 3, "sft")
    return judged(one, Played(starts, code, [], 9.0, None, None, run_with(tmp_path / "run", loss)), clean, "sft")


def test_a_resume_has_the_same_bits(clean, tmp_path):
    row = resumed(clean, tmp_path)
    assert (row.well, row.happened) == (True, "resumed, 2 starts, equal bits")


@pytest.mark.parametrize(
    ("ended", "happened"),
    [
        ({"loss": 1.5000001}, "other bits: sft step 1: loss/train expected 1.5, got 1.5000001"),
        ({"starts": 1}, "1 starts"),
        ({"code": 134}, "exit code 134"),
    ],
)
def test_other_bits_starts_and_codes_are_not_well(clean, tmp_path, ended, happened):
    row = resumed(clean, tmp_path, **ended)
    assert (row.well, row.happened) == (False, happened)


@pytest.mark.parametrize(
    ("code", "after", "who", "well"),
    [(42, 15.0, 0, True), (134, 15.0, 0, False), (42, 22.5, 0, False), (42, 15.0, 1, False)],
)
def test_a_verdict_has_its_code_its_line_and_its_bound(clean, tmp_path, code, after, who, well):
    one = cast(SCENES["stop"], 0, 9, "sft")
    line = LINE.format((one.process + who) % 9)
    row = judged(one, Played(1, code, [line], 40.0, after, 1.0, tmp_path), clean, "sft")
    assert row.well is well
    assert row.after_s == after


def test_a_lock_counts_from_when_the_line_says_that_it_is_waited_for(clean, tmp_path):
    one = cast(SCENES["lock"], 0, 9, "sft")
    line = f"error: process {one.process} (h) is waited for: it is in sft step 5, sft, reading data, for 20 s; at x"
    rows = [judged(one, Played(1, 42, [line], 90.0, 60.0, left, tmp_path), clean, "sft") for left in (2.5, 12.0)]
    assert [(row.well, row.after_s) for row in rows] == [(True, 22.5), (False, 32.0)]


def test_the_table_says_what_was_not_as_expected(clean, tmp_path):
    rows = [resumed(clean, tmp_path / "a"), resumed(clean, tmp_path / "b", code=134)]
    result = {"rows": [vars(row) for row in rows], "nodes": 3, "seconds": 61.0}
    lines = table(result).splitlines()
    assert [line.split()[0] for line in lines] == ["fault", "ok", "FAIL", "1"]
    assert lines[3] == "1 of 2 as expected; 3 processes, 61 s"


def test_nothing_of_others_is_emptied(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="expected an empty directory, or one of an earlier rehearsal"):
        empty(tmp_path)
    assert (tmp_path / "mine").exists()
    empty(tmp_path / "new")
    (tmp_path / "new" / "old").touch()
    empty(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rehearsal.json"]
