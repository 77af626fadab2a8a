"""Three processes of which one does not go on: one line says which, where and how, and all end with 42."""

import json
import random
import re

import pytest

from stages.tiny_recipe import recipe

pytestmark = pytest.mark.faults
PROCESSES = 3
# What happens to it, and what the line says of where it is.
KINDS = {
    "sigstop@pretrain": r"says nothing since \d+ s \(stopped by a signal\); last it was in pretrain step ",
    "hang@pretrain": r"pretrain step {step}, pretrain, host code, for \d+ s; at faults.py:\d+ reach < ",
    "spin@pretrain": r"pretrain step {step}, pretrain, host code, for \d+ s; at faults.py:\d+ reach < ",
    "lock@data": r", pretrain, reading data, for \d+ s; at ",
    "lock_gil@pretrain": r"says nothing since \d+ s \(it lives, and lets none of its threads run\); last ",
}


@pytest.fixture
def short(files, tmp_path):
    whole = recipe(files)
    one = whole["stages"]["pretrain"] | {"steps": 12, "validation": [], "batch": {"size": 12, "length": 32}}
    whole |= {"stages": {"pretrain": one}, "checkpoints": {"every": 100}}
    whole["reliability"] = {"heartbeat": 10, "deadlines": {"compile": 240, "step": 12, "save": 240}}
    (tmp_path / "short.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return tmp_path / "short.yaml"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_one_that_does_not_come_is_named(command, short, tmp_path, kind, seed):
    draw = random.Random(f"{kind} {seed}")
    process, step = draw.randrange(PROCESSES), draw.randint(4, 9)
    launch = ["launch", "local", "-n", PROCESSES, "--restarts-failed", 0, "--restarts-preempted", 0, "--"]
    run = ["run", short, f"mesh.data={PROCESSES}", "--run-dir", tmp_path / "run"]
    code, _, err = command(*launch, *run, fault=f"{kind}:{step}:{process}")
    lines = [line for line in err.splitlines() if "error:" in line]
    assert (code, len(lines)) == (42, 1), err
    assert re.search(rf"error: process {process} \(", lines[0]), lines
    assert re.search(KINDS[kind].format(step=step), lines[0]), lines
    stacks = tmp_path / "run" / "pretrain" / (f"stacks.{process}.txt" if process else "stacks.txt")
    assert str(stacks) in lines[0]


def test_a_process_by_itself_says_where_it_stood(command, short, tmp_path):
    code, _, err = command("run", short, "--run-dir", tmp_path / "run", fault="lock@data:6")
    lines = [line for line in err.splitlines() if "error:" in line]
    assert (code, len(lines)) == (42, 1), err
    assert "error: process 0 (" in lines[0]
    assert (
        "did not come out of pretrain step 7, pretrain in 12 s: it is in pretrain step 7, pretrain, reading" in lines[0]
    )
    stacks = (tmp_path / "run" / "pretrain" / "stacks.txt").read_text(encoding="utf-8")
    assert "faults.py" in stacks  # the thread that holds the lock
