"""Rewards at work: numbers in their order, and for each way to fail the end that the documents promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhfjax.errors import ConfigError, DataError, RewardError
from rlhfjax.rewards import Example
from tests.rewards.conftest import EXAMPLES, gone, parent, state, wait_for

FUNCTIONS = """
import os
import signal
import sys

import numpy


def length(examples):
    print("a line on standard output")
    os.write(1, b"and one below Python")
    return [len(example.response_ids) for example in examples]


def right(examples):
    return numpy.array([example.record["answer"] in example.response for example in examples])


def seen(examples):
    kinds = [(e.prompt, e.prompt_ids, e.finished, e.record) for e in examples]
    assert kinds[3] == ("3 + 1 =", (9, 3), False, {"answer": "4"}), kinds[3]
    assert type(examples[0]).__name__ == "Example"
    return ["jax" in sys.modules or "flax" in sys.modules for _ in examples]


def forks(examples):
    os.fork()
    return [1.0 for _ in examples]


def raises(examples):
    deeper(examples[0].prompt)


def deeper(prompt):
    raise KeyError("gold")


def some(examples):
    return [float("nan"), 1.0, float("inf"), 1e39, None, "2"]


def few(examples):
    return [1.0, 2.0]


def many(examples):
    return [0.0] * 7


def text(examples):
    return "123456"


def nothing(examples):
    pass


def leaves(examples):
    sys.exit(7)


def dies(examples):
    os._exit(3)


def killed(examples):
    os.kill(os.getpid(), signal.SIGKILL)


def group(examples):
    os.killpg(os.getpgrp(), signal.SIGTERM)


def closes(examples):
    os.closerange(3, 256)
    return [1.0 for _ in examples]
"""
WRONG = {
    "raises": r"KeyError: 'gold' \(my_rewards.py:35\) \(all 6 responses\)",
    "some": r"expected a finite number, got nan \(5 of 6 responses, the first is number 1\)",
    "few": r"expected 6 numbers, one for each example, got 2 \(all 6 responses\)",
    "many": r"expected 6 numbers, one for each example, got 7 \(all 6 responses\)",
    "text": r"expected a list of numbers, one for each example, got str \(all 6 responses\)",
    "nothing": r"expected a list of numbers, one for each example, got NoneType \(all 6 responses\)",
    "leaves": r"SystemExit: 7 \(my_rewards.py:\d+\) \(all 6 responses\)",
    "dies": r"its process ended with exit code 3 \(all 6 responses\)",
    "killed": r"its process ended with signal 9 \(SIGKILL\) \(all 6 responses\)",
    "group": r"its process ended with signal 15 \(SIGTERM\) \(all 6 responses\)",
    "closes": r"its process ended with .* \(all 6 responses\)",
}


def function(name, **more):
    return {"function": f"my_rewards.py:{name}", **more}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS.lstrip())
    return path


def test_rewards_are_summed_by_their_weights_and_measured_by_themselves(opened, file, capfd):
    """By hand: responses of 1 to 6 tokens, all right; what a function prints is not lost, and forks do no harm."""
    entries = [
        function("length", weight=0.5),
        function("right", weight=2.0),
        {"length": {"target": 2}, "name": "length_rule", "weight": 0.0},
    ]
    with opened(*entries, function("forks", weight=-1.0), function("seen")) as rewards:
        scores = rewards.submit(3, EXAMPLES).result()
        again = rewards.submit(4, EXAMPLES[:4]).result()
        assert rewards.said == []
    values = {name: found.tolist() for name, found in scores.values.items()}
    assert values == {
        "length": [1, 2, 3, 4, 5, 6],
        "right": [1] * 6,
        "length_rule": [-0.5, 0.0, -0.5, -1.0, -1.5, -2.0],
        "forks": [1] * 6,
        "seen": [0] * 6,
    }
    assert scores.total.tolist() == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert scores.total.dtype == np.float32
    assert (scores.failures, scores.failed, scores.skip) == ([], 0, False)
    assert again.total.tolist() == [1.5, 2.0, 2.5, 3.0]
    metrics = scores.metrics()
    assert metrics["objective/reward/length"] == 3.5
    assert metrics["objective/reward_std/length"] == pytest.approx((35 / 12) ** 0.5)
    assert metrics["objective/reward_failures"] == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "a line on standard output" in err
    assert "and one below Python" in err


def test_every_failure_is_told_and_gets_the_value(opened, file):
    """Twice: whoever died is there again."""
    with opened(*(function(name, on_error="value", value=-2.0) for name in WRONG)) as rewards:
        for step in (1, 2):
            scores = rewards.submit(step, EXAMPLES).result()
            assert len(scores.failures) == len(WRONG)
            for failure, (name, words) in zip(scores.failures, WRONG.items(), strict=True):
                assert re.fullmatch(f"reward {name}, step {step}: {words}", failure), failure
            expected = [-2.0, 1.0, -2.0, -2.0, -2.0, -2.0]
            assert scores.values["some"].tolist() == expected
            assert scores.values["raises"].tolist() == [-2.0] * 6
            others = -2.0 * (len(WRONG) - 1)
            np.testing.assert_allclose(scores.total, np.asarray(expected) + others)
            assert (scores.failed, scores.skip) == (5 + 6 * (len(WRONG) - 1), False)
        assert len(rewards.said) == len(WRONG)
        assert rewards.said[0].endswith(
            "(all 6 responses); -2 stands in its place; more of this is only counted (objective/reward_failures)"
        )


def test_skip_leaves_no_total_and_stop_ends_the_run(opened, file):
    with opened(function("few", on_error="skip"), function("length")) as rewards:
        scores = rewards.submit(1, EXAMPLES).result()
        assert (scores.skip, scores.failed) == (True, 6)
        assert np.isnan(scores.total).all()
        assert np.isnan(scores.values["few"]).all()
        assert scores.values["length"].tolist() == [1, 2, 3, 4, 5, 6]
        assert "the update is skipped" in rewards.said[0]
    with opened(function("raises")) as rewards:
        pending = rewards.submit(5, EXAMPLES)
        with pytest.raises(
            RewardError, match=r"reward raises, step 5: KeyError: 'gold' \(my_rewards.py:35\).*on_error"
        ):
            pending.result()
    assert RewardError.exit_code == 3


def test_a_record_without_the_answer_fails_alone(opened):
    examples = [*EXAMPLES[:2], Example("2 + 1 =", " 3", record={"gold": 3})]
    with opened({"numeric_match": {"field": "answer"}, "on_error": "value", "value": 0.0}) as rewards:
        scores = rewards.submit(1, examples).result()
    assert scores.total.tolist() == [1.0, 1.0, 0.0]
    [failure] = scores.failures
    assert "expected the field answer in the record of its prompt, got gold (1 of 3 responses" in failure


# Calls and their processes ------------------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_the_workers(opened, file):
    file.write_text("def name(examples):\n    return [len(examples) * 100 + len(e.response_ids) for e in examples]\n")
    found = []
    for workers in (1, 3):
        with opened(function("name", per_call=4, workers=workers)) as rewards:
            found.append(rewards.submit(1, EXAMPLES).result().total.tolist())
    assert found == [[401, 402, 403, 404, 205, 206]] * 2


def test_asking_does_not_wait(opened, file, tmp_path):
    file.write_text(
        "import pathlib, time\n\n\ndef waits(examples):\n    while not pathlib.Path('go').exists():\n"
        "        time.sleep(0.01)\n    return [1.0 for _ in examples]\n"
    )
    with opened(function("waits", timeout=600.0)) as rewards:
        pending = rewards.submit(1, EXAMPLES)
        assert not pending.done()
        (tmp_path / "go").touch()
        assert pending.result().total.tolist() == [1.0] * 6
        assert pending.done()


HANGS = """
import os, pathlib, subprocess, time

child = subprocess.Popen(["sleep", "10000"])
pathlib.Path("pids").write_text(pathlib.Path("pids").read_text() + f"{os.getpid()} {child.pid} ")


def hangs(examples):
    if len(examples) == 1:
        return [1.0]
    while True:
        time.sleep(1)
"""


def test_what_hangs_is_killed_with_its_children(opened, file, tmp_path, ends):
    file.write_text(HANGS)
    (tmp_path / "pids").write_text("")
    with opened(function("hangs", timeout=2.0, on_error="skip")) as rewards:
        scores = rewards.submit(1, EXAMPLES).result()
        assert scores.failures == [
            "reward hangs, step 1: no answer within 2 s; its process was killed (all 6 responses)"
        ]
        first = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        ends += first
        wait_for(f"the end of {first}", lambda: all(map(gone, first)))
    with opened(function("hangs", timeout=600.0)) as rewards:
        assert rewards.submit(2, EXAMPLES[:1]).result().total.tolist() == [1.0]
        rewards.submit(3, EXAMPLES)  # under way when the run ends
    ends += [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(ends) == 6
    wait_for(f"the end of {ends}", lambda: all(map(gone, ends)))


RUN = """
from tests.rewards.conftest import Example, Rewards, terms_of

hangs = {"function": "my_rewards.py:hangs", "timeout": 9000.0}
endless = {"format": {"pattern": r"(\\s|\\w)*(\\w+)+x"}, "timeout": 9000.0}
rewards = Rewards.open(terms_of(hangs, endless))
pending = rewards.submit(1, [Example("", "a" * 64), Example("", "")])
print("asked", flush=True)
pending.result()
"""


@pytest.mark.faults
def test_nothing_outlives_a_run_that_is_killed(file, tmp_path, ends):
    """A function that hangs, its child, and a regular expression, which lets no thread of its process do anything."""
    file.write_text(HANGS)
    (tmp_path / "pids").write_text("")
    place = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}}
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, **place) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"asked\n"
        pids = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
        workers = {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if parent(path) == run.pid}
        assert (len(pids), len(workers), len(pids & workers)) == (2, 2, 1)
        ends += pids | workers
        [other] = workers - pids
        wait_for("the regular expression", lambda: state(other) == "R")
        run.kill()
    wait_for(f"the end of {ends}", lambda: all(map(gone, ends)))


def test_a_regular_expression_that_never_ends_is_killed(opened):
    entry = {"format": {"pattern": r"(\s|\w)*(\w+)+x"}, "timeout": 2.0, "on_error": "value", "value": 0.0}
    with opened(entry, {"format": {"pattern": r"\s\d"}, "name": "digit"}) as rewards:
        assert rewards.submit(1, [Example("", "a" * 64)]).result().failed == 1
        scores = rewards.submit(2, EXAMPLES).result()
    assert scores.values["digit"].tolist() == [1.0] * 6
    assert scores.failures == []


# Commands -----------------------------------------------------------------------------------------------------------

GRADE = """#!{python}
import json, sys
for line in sys.stdin:
    example = json.loads(line)
    assert set(example) == {{"prompt", "response", "prompt_ids", "response_ids", "finished", "record"}}
    print("graded", file=sys.stderr)
    print(float(example["record"]["answer"]) / 2)
"""
SHELL = {
    "exits": (
        "cat > /dev/null; echo 1; echo the reason >&2; exit 4",
        r"sh ended with exit code 4; its last words: the ",
    ),
    "dies": ("kill -9 $$", r"sh ended with signal 9"),
    "little": ("cat > /dev/null; echo 1; echo 2; echo why >&2", r"expected 6 numbers, .*, got 2; its last words: why"),
    "much": ("sed 's/.*/1/'; echo 2", r"expected 6 numbers, .*, got 7"),
    "words": ("sed 's/.*/one/'", r"line 1 of its output: expected a number or null, got 'one'"),
    "object": ("sed 's/.*/{}/'", r"line 1 of its output: expected a number or null, got dict"),
    "deaf": ("exit 0", r"expected 6 numbers, .*, got 0"),
}


def test_a_command_reads_and_writes_a_line_for_each(opened, tmp_path, capfd):
    path = tmp_path / "grade"
    path.write_text(GRADE.format(python=sys.executable))
    path.chmod(0o700)
    entries = [{"command": ["./grade"], "per_call": 4}, {"command": ["sed", "s/.*/null/"], "on_error": "skip"}]
    with opened(*entries) as rewards:
        scores = rewards.submit(1, EXAMPLES).result()
    assert scores.values["grade"].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert "expected a number, got NoneType (all 6 responses)" in scores.failures[0]
    assert capfd.readouterr().err.count("graded") == 6


def test_a_command_that_fails_says_why(opened):
    entries = [
        {"command": ["sh", "-c", words], "name": name, "on_error": "value", "value": 0.0}
        for name, (words, _) in SHELL.items()
    ]
    with opened(*entries) as rewards:
        failures = rewards.submit(1, EXAMPLES).result().failures
    for failure, (name, (_, words)) in zip(failures, SHELL.items(), strict=True):
        assert re.match(f"reward {name}, step 1: {words}", failure), failure


# Code ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def exact(:\n", r"SyntaxError: .* \(my_rewards.py:1\)"),
        ("import absent_module\n", r"ModuleNotFoundError: No module named 'absent_module' \(my_rewards.py:1\)"),
        ("x = 1\nraise SystemExit\n", r"SystemExit \(my_rewards.py:2\)"),
        ("def other(examples): ...\n", r"expected a function exact in my_rewards.py, got other"),
        ("exact = 3\n", r"expected a function exact in my_rewards.py, got none"),
    ],
)
def test_code_that_cannot_be_loaded_is_an_error_at_the_start(opened, file, text, words):
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"reward exact cannot be loaded: {words}"), opened(function("exact")):
        pass


def test_code_that_is_not_there_is_an_error_at_the_start(opened, tmp_path):
    for entry in ({"function": "absent.py:exact"}, {"command": ["./absent"]}):
        with pytest.raises(ConfigError, match=r"absent.*: expected a readable file, got No such file"), opened(entry):
            pass
    (tmp_path / "plain").write_text("no program")
    for name in ("./plain", "no-such-program-anywhere"):
        with pytest.raises(ConfigError, match="expected a program that may be run"), opened({"command": [name]}):
            pass


def test_an_edited_function_goes_on_as_it_was_loaded(opened, file, tmp_path):
    (tmp_path / "beside.py").write_text("NUMBER = 5.0\n")
    file.write_text(
        "import os, beside\n\n\ndef exact(examples):\n    if len(examples) == 1:\n        os._exit(1)\n"
        "    return [beside.NUMBER for _ in examples]\n"
    )
    with opened(function("exact", on_error="value", value=0.0)) as rewards:
        before = rewards.facts()["exact"]["sha256"]["my_rewards.py"]
        assert rewards.submit(1, EXAMPLES).result().total.tolist() == [5.0] * 6
        file.write_text("def exact(examples):\n    return [-1.0 for _ in examples]\n")
        rewards.submit(2, EXAMPLES[:1]).result()  # its process ends; the next one loads what was loaded before
        assert rewards.submit(3, EXAMPLES).result().total.tolist() == [5.0] * 6
        edits = [line for line in rewards.said if "edited" in line]
    [edit] = edits
    assert f"my_rewards.py was edited; what was loaded when this run began (SHA-256 {before[:12]}" in edit


def test_an_edited_command_ends_the_run(opened, tmp_path):
    path = tmp_path / "grade"
    path.write_text("#!/bin/sh\nsed 's/.*/1/'\n")
    path.chmod(0o700)
    with opened({"command": ["./grade"]}) as rewards:
        assert rewards.submit(1, EXAMPLES).result().total.tolist() == [1.0] * 6
        os.utime(path)  # touched, and the same
        rewards.submit(2, EXAMPLES).result()
        path.write_text("#!/bin/sh\nsed 's/.*/2/'\n")
        with pytest.raises(RewardError, match="grade was edited since this run began") as caught:
            rewards.submit(3, EXAMPLES)
    assert isinstance(caught.value, DataError)
