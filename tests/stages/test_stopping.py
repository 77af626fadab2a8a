"""Asked to stop, a run saves and says so; hung, it is ended; and the same command then goes on to the same end."""

import signal
import time

import pytest

from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STEPS

DEADLINE = 600  # seconds, of what takes a few, on a busy machine


@pytest.fixture
def started(start):
    """Starts the command line with a fault in it."""
    return lambda fault, *args: start(*args, fault=fault)


def ended(process):
    """(exit code, stderr) of a process that must end by itself."""
    try:
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, err


def same_end(run_dir, finished, stage):
    again, straight = rows_of(run_dir / stage / "metrics.jsonl"), rows_of(finished / stage / "metrics.jsonl")
    timed = ("perf/", "timing/")
    assert [{k: v for k, v in row.items() if not k.startswith(timed)} for row in again] == [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in straight
    ]
    assert_same_bits(*(saved(place / stage / "checkpoints" / str(STEPS)) for place in (run_dir, finished)))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.faults)


# (where SIGTERM comes, the stage, the step that is saved)
@pytest.mark.parametrize(
    ("point", "stage", "step"),
    [
        ("pretrain:2", "pretrain", 2),
        slow("sft:3", "sft", 3),
        slow("reward:1", "reward", 1),
        slow("measure:3", "sft", 3),
        ("rollout:3", "ppo", 2),
        slow("score:2", "ppo", 1),
        slow("update:2", "ppo", 2),
        slow("save:2", "ppo", 2),
    ],
)
def test_sigterm(started, copied, finished, config, point, stage, step):
    run_dir = copied(stage)
    arguments = ("run", config, "--run-dir", run_dir, "--only", stage)
    code, err = ended(started(f"sigterm@{point}", *arguments))
    assert code == 42, err
    assert "Traceback" not in err
    assert err.rstrip().endswith(
        "error: stopped by SIGTERM; what was done is saved, the same command goes on from there"
    )
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("preempted", 42)
    steps = [int(path.name) for path in (run_dir / stage / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) == step
    assert rows_of(run_dir / stage / "metrics.jsonl")[-1]["step"] == step

    code, err = ended(started(None, *arguments))
    assert code == 0, err
    same_end(run_dir, finished, stage)


@pytest.mark.faults
@pytest.mark.parametrize("point", ["responses/ppo:0", "sft:0", "judges:0"])
def test_sigterm_in_the_evaluation(started, copied, config, point):
    run_dir = copied("evaluate")
    arguments = ("run", config, "--run-dir", run_dir, "--only", "evaluate")
    code, err = ended(started(f"sigterm@{point}", *arguments))
    assert code == 42, err
    assert not (run_dir / "evaluate" / "complete.json").exists()
    assert ended(started(None, *arguments))[0] == 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["sigterm", "sigint", "sigkill"])
def test_stopped_in_an_export(started, finished, tmp_path, kind):
    target = tmp_path / "exported"
    code, err = ended(started(f"{kind}@export:0", "export", finished, target))
    assert code == {"sigterm": 42, "sigint": 130, "sigkill": -9}[kind], err
    assert not target.exists()
    assert [*tmp_path.iterdir()] == [] or kind == "sigkill"
    code, err = ended(started(None, "export", finished, target))
    assert code == 0, err
    assert [*tmp_path.iterdir()] == [target]
    assert (target / "model.safetensors").exists()


@pytest.mark.faults
def test_sigterm_while_the_tokenizer_is_made(started, config, tmp_path):
    run_dir = tmp_path / "run"
    code, err = ended(started("sigterm@tokenizer:0", "run", config, "--run-dir", run_dir, "--only", "tokenizer"))
    assert code == 42, err
    assert not (run_dir / "tokenizer" / "complete.json").exists()
    assert ended(started(None, "run", config, "--run-dir", run_dir, "--only", "tokenizer"))[0] == 0


def test_a_second_signal_does_not_wait(started, copied, config):
    run_dir = copied("pretrain")
    # The first comes where the loop can't end before the step; that hangs, and so nothing is saved.
    process = started("hang@pretrain:2", "run", config, "--run-dir", run_dir, "--only", "pretrain")
    stage = run_dir / "pretrain"
    wait_for(lambda: (stage / "metrics.jsonl").exists() and (stage / "checkpoints" / "1").exists(), process, "a step")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, err = ended(process)
    assert code == 130, err
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("interrupted", 130)
    assert "ended" in line


def wait_for(condition, process, what):
    until = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, f"waited {DEADLINE} s for {what}"
        time.sleep(0.01)


# That a deadline ends what hangs, and which deadline, is in every run: tests of the watchdog and of supervision.
@pytest.mark.faults
@pytest.mark.parametrize("kind", ["lock_gil", "hang"])
def test_what_hangs_is_ended(started, copied, finished, config, kind):
    run_dir = copied("ppo")
    arguments = ("run", config, "--run-dir", run_dir, "--only", "ppo")
    code, err = ended(started(f"{kind}@update:3", *arguments, "reliability.deadlines.step=30.0"))
    assert code == 42, err
    stacks = (run_dir / "ppo" / "stacks.txt").read_text(encoding="utf-8")
    assert "in reach" in stacks  # the thread that hangs
    assert stacks.count("hread 0x") > 1
    code, err = ended(started(None, *arguments))
    assert code == 0, err
    same_end(run_dir, finished, "ppo")
