"""Killed at any moment and started again, a run ends where it would have ended, to the last bit."""

import json
import shutil
import signal
import time

import pytest

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STAGES, STEPS


def wait_for_checkpoint(process, folder):
    """Until a stage has a whole checkpoint, and the metrics of its first step."""
    while process.poll() is None:
        whole = folder.glob("checkpoints/[0-9]")
        if any(whole) and (folder / "metrics.jsonl").read_text(encoding="utf-8").count("\n"):
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[1])


# Pretraining is the loop of the reward model; in every run a test of guards resumes it to the last bit.
@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.faults) for s in ("pretrain", "reward")), "ppo"])
def test_killed_in_a_stage(copied, finished, config, start, command, stage):
    run_dir = copied(stage)
    arguments = ("run", config, "--run-dir", run_dir, "--only", stage)
    process = start(*arguments)
    wait_for_checkpoint(process, run_dir / stage)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run_dir / stage / "complete.json").exists()
    before_it_died = rows_of(run_dir / stage / "metrics.jsonl")
    earlier = [run_dir / name / "complete.json" for name in STAGES[: STAGES.index(stage)]]
    times = [path.stat().st_mtime_ns for path in earlier]

    code, _, err = command(*arguments)
    assert code == 0, err
    assert [path.stat().st_mtime_ns for path in earlier] == times
    again, straight = rows_of(run_dir / stage / "metrics.jsonl"), rows_of(finished / stage / "metrics.jsonl")
    assert again[0] == before_it_died[0]  # with its timings: the step was not done again
    steps = [row["step"] for row in again]
    assert steps == sorted(set(steps))
    assert {1, STEPS} <= set(steps)
    same = [name for name in straight[0] if not name.startswith(("perf/", "timing/"))]
    expected = {row["step"]: row for row in straight}
    assert [{name: row[name] for name in same} for row in again] == [
        {name: expected[row["step"]][name] for name in same} for row in again
    ]
    assert_same_bits(
        saved(run_dir / stage / "checkpoints" / str(STEPS)), saved(finished / stage / "checkpoints" / str(STEPS))
    )
    before, now = rows_of(run_dir / "manifest.jsonl")[-2:]
    assert (before["status"], before["exit_code"]) == ("running", None)  # nobody was left to write more
    assert (now["status"], now["exit_code"]) == ("finished", 0)
    assert now["attempt"] == before["attempt"] + 1


def test_killed_between_training_and_its_last_mark(copied, finished, config, command):
    run_dir = copied("ppo")
    (run_dir / "reward" / "complete.json").unlink()
    code, _, err = command("run", config, "--run-dir", run_dir, "--only", "reward")
    assert code == 0, err
    facts, expected = (
        json.loads((place / "reward" / "complete.json").read_text(encoding="utf-8")) for place in (run_dir, finished)
    )
    changing = {"seconds", "finished"}
    assert {k: facts[k] for k in facts.keys() - changing} == {k: expected[k] for k in expected.keys() - changing}
    assert_same_bits(
        saved(run_dir / "reward" / "checkpoints" / str(STEPS)), saved(finished / "reward" / "checkpoints" / str(STEPS))
    )


def test_on_another_mesh_it_goes_on_and_says_that_bits_differ(copied, finished, config, capsys):
    run_dir = copied("pretrain")
    shutil.copytree(finished / "pretrain", run_dir / "pretrain", ignore=shutil.ignore_patterns("4", "complete.json"))
    run = load_config(config, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"])
    run_recipe(run, run_dir, only="pretrain")
    said = " ".join(capsys.readouterr().err.split())
    then, now = (line["target"] for line in rows_of(run_dir / "manifest.jsonl")[-2:])
    sizes = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name])
    assert sizes.startswith("slots 16 -> 128")
    assert (
        "pretrain: continues on another layout (devices 1 cpu -> 8 cpu, mesh 1 -> data 2 x fsdp 2 x tensor 2), "
        f"with other sizes ({sizes}); from here on results match within rounding, not bitwise"
    ) in said
    again, straight = rows_of(run_dir / "pretrain" / "metrics.jsonl"), rows_of(finished / "pretrain" / "metrics.jsonl")
    assert again[:3] == straight[:3]
    for name in ("loss/train", "loss/validation", "grad/norm"):
        assert again[3][name] == pytest.approx(straight[3][name], abs=1e-4)
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert line["resumed_from"] == {"stage": "pretrain", "step": 3}
    assert line["mesh"]["device_order"] != [0]


def test_stopped_at_the_keyboard(copied, config, start, command):
    run_dir = copied("pretrain")
    arguments = ("run", config, "--run-dir", run_dir, "--only", "pretrain")
    # A shell's background job ignores Ctrl-C and hands that down; a child gets the default where we handle it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*arguments)
    signal.signal(signal.SIGINT, before)
    wait_for_checkpoint(process, run_dir / "pretrain")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted")
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("interrupted", 130)
    assert "ended" in line
