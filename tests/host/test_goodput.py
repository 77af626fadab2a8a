"""The account of a run's time adds up, and knows new work from work that is done again."""

import json

import pytest

from rlhfjax.host.goodput import FAILURE, PREEMPTION, Account, read_lines

# 100 s from the first start: killed after step 5 with step 3 saved, preempted in step 9 with step 8 saved.
LINES = [
    {"at": 1000.0, "is": "start", "attempt": 1},
    {"at": 1010.0, "stage": "sft", "done": 0, "s": {"starting up": 6.0, "compile": 4.0}},
    {"at": 1013.0, "stage": "sft", "done": 3, "s": {"productive": 3.0}},
    {"at": 1014.0, "stage": "sft", "done": 3, "s": {"save": 1.0}},
    {"at": 1016.5, "stage": "sft", "done": 5, "s": {"productive": 2.0, "waiting": 0.5}},
    {"at": 1017.0, "stage": "sft", "done": 5, "s": {"productive": 0.5}},  # of step 6, which was never done
    {"at": 1030.0, "is": "start", "attempt": 2},  # 13 s after the last line
    {"at": 1038.0, "stage": "sft", "done": 3, "s": {"starting up": 5.0, "restore": 3.0}},
    {"at": 1040.0, "stage": "sft", "done": 5, "s": {"productive": 2.0}},  # steps 4 and 5 again
    {"at": 1043.0, "stage": "sft", "done": 8, "s": {"productive": 3.0}},
    {"at": 1045.0, "stage": "sft", "done": 8, "is": "end", "code": 42, "s": {"save": 1.5, "productive": 0.5}},
    {"at": 1060.0, "is": "start", "attempt": 3},
    {"at": 1070.0, "stage": "sft", "done": 8, "s": {"starting up": 10.0}},
    {"at": 1100.0, "stage": "sft", "done": 20, "is": "end", "code": 0, "s": {"productive": 30.0}},
]


def test_a_ledger_by_hand():
    account = Account(LINES)
    assert account.seconds == {
        "productive": 3.0 + 2.0 + 3.0 + 30.0,
        "compile": 4.0,
        "restore": 3.0,
        "save": 1.0 + 1.5,
        "waiting": 0.5,
        "starting up": 6.0 + 5.0 + 10.0,
        PREEMPTION: 0.5 + 15.0,  # the step that was given up, and the pause
        FAILURE: 0.5 + 13.0 + 2.0,
    }
    assert account.wall == pytest.approx(100.0)
    assert account.goodput == pytest.approx(0.38)
    assert account.steps == {"productive": 20, PREEMPTION: 0, FAILURE: 2}
    assert account.to_recover() == [1040.0 - 1017.0, 1070.0 - 1045.0]


def test_steps_are_lost_to_what_made_the_run_go_back():
    account = Account(LINES[:6])  # at step 5, killed; then preempted at step 4, before it was there again
    for line in (
        {"at": 1030.0, "is": "start"},
        {"at": 1031.0, "stage": "sft", "done": 3, "s": {"restore": 1.0}},
        {"at": 1032.0, "stage": "sft", "done": 4, "s": {"productive": 1.0}},
        {"at": 1032.0, "is": "end", "code": 42},
        {"at": 1040.0, "is": "start"},
        {"at": 1041.0, "stage": "sft", "done": 3, "s": {"restore": 1.0}},
        {"at": 1043.0, "stage": "sft", "done": 4, "s": {"productive": 2.0}},
        {"at": 1046.0, "stage": "sft", "done": 5, "s": {"productive": 3.0}},
    ):
        account.add(line)
    assert account.boundary is None
    assert account.steps == {"productive": 5, PREEMPTION: 1, FAILURE: 2}
    assert account.seconds[PREEMPTION] == 8.0 + 2.0
    assert account.seconds[FAILURE] == 0.5 + 13.0 + 1.0 + 3.0


def test_a_rollback_is_a_failure_and_a_good_end_asks_for_nothing():
    account = Account(LINES)
    for line in (
        {"at": 5000.0, "is": "start", "redo": ["sft"]},  # the next day, with --from: nothing of it was lost
        {"at": 5001.0, "stage": "sft", "done": 0, "s": {"restore": 1.0}},
        {"at": 5005.0, "stage": "sft", "done": 4, "s": {"productive": 4.0}},
        {"at": 5005.5, "stage": "sft", "done": 2, "s": {"productive": 0.5}},
        {"at": 5007.5, "stage": "sft", "done": 4, "s": {"productive": 2.0}},
    ):
        account.add(line)
    assert account.wall == pytest.approx(100.0 + 7.5)
    assert account.steps == {"productive": 24, PREEMPTION: 0, FAILURE: 2 + 2}
    assert account.seconds[FAILURE] == 15.5 + 0.5 + 2.0
    assert account.to_recover()[-1] == 5001.0 - 1100.0


def test_what_was_torn_is_passed_over(tmp_path):
    path = tmp_path / "time.jsonl"
    path.write_text('{"at":1}\n' + json.dumps(LINES[0]) + '\n{"at":10\n[]\n' + json.dumps(LINES[1]) + '\n{"at"')
    assert read_lines(path) == LINES[:2]
