"""Killed between two checkpoints, a run goes on from a local step and ends with the bits of one that was not."""

import shutil
import time

import pytest

from rlhfjax.training.checkpoint import stored_digests
from stages.conftest import rows_of
from stages.test_processes import HEARTBEAT, PATIENCE, launched, processes_of, running  # noqa: F401
from stages.tiny_recipe import STEPS


def numbers(path):
    rows = rows_of(path)
    return [{name: row[name] for name in row if not name.startswith(("timing/", "perf/"))} for row in rows]


def assert_ends_the_same(run_dir, finished, stage):
    assert numbers(run_dir / stage / "metrics.jsonl") == numbers(finished / stage / "metrics.jsonl")
    assert rows_of(run_dir / stage / "ledger.jsonl") == rows_of(finished / stage / "ledger.jsonl")
    ours, theirs = (stored_digests(place / stage / "checkpoints" / str(STEPS)) for place in (run_dir, finished))
    assert ours == theirs
    assert ours


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_killed_between_checkpoints(copied, finished, config, command, tmp_path, stage):
    run_dir, disk = copied(stage), tmp_path / "disk"
    words = ("run", config, "checkpoints.every=100", f"checkpoints.local.dir={disk}", "checkpoints.local.every=2")
    words += ("--run-dir", run_dir, "--only", stage)
    words += (f"stages.{stage}.select_by=last",) if stage == "sft" else ()
    code, _, err = command(*words, fault="sigkill@local:2")
    assert code == -9, err
    assert not any((run_dir / stage / "checkpoints").glob("[0-9]*"))
    code, _, err = command(*words)
    assert code == 0, err
    assert f"{stage}: goes on from the local step 2 in {disk}" in " ".join(err.split())
    assert_ends_the_same(run_dir, finished, stage)
    assert rows_of(run_dir / "manifest.jsonl")[-1]["resumed_from"] == {"stage": stage, "step": 2, "local": True}
    assert list(disk.iterdir()) == []
    assert not (run_dir / stage / "local.json").exists()


@pytest.mark.faults
def test_two_processes_and_one_of_them_loses_its_disk(config, launched, start, tmp_path):  # noqa: F811
    gone = [f"stages.{stage}=null" for stage in ("sft", "reward", "ppo", "evaluate")]
    words = ["run", config, HEARTBEAT, "mesh.data=1", "mesh.fsdp=4", *gone]
    code, _, err = launched(2, 2, *words, "--run-dir", tmp_path / "straight")
    assert code == 0, err
    disk = tmp_path / "disk"
    words += ["checkpoints.every=100", f"checkpoints.local.dir={disk}", "checkpoints.local.every=2"]
    words += ["--run-dir", tmp_path / "run"]
    launch = ("launch", "local", "-n", 2, "--devices-per-process", 2, "--")
    launcher = start(*launch, *words, fault="hang@pretrain:4")
    try:
        until = time.monotonic() + PATIENCE
        while len(list(disk.glob("*/p*/2.shards"))) < 2:
            assert time.monotonic() < until
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        children = processes_of(launcher).values()
    finally:
        launcher.kill()
        launcher.communicate()
    while any(running(child) for child in children):
        time.sleep(0.05)  # they die with it
    [root] = disk.iterdir()
    assert {path.name for path in root.iterdir()} == {"p0", "p1"}
    shutil.rmtree(root / "p0")
    code, _, err = launched(2, 2, *words)
    assert code == 0, err
    assert f"pretrain: goes on from the local step 2 in {disk}" in err
    assert_ends_the_same(tmp_path / "run", tmp_path / "straight", "pretrain")


@pytest.mark.faults
def test_a_rollback_does_not_go_to_a_local_step(copied, config, command, tmp_path):
    run_dir = copied("pretrain")
    guards = ("reliability.guards.non_finite=1", "reliability.guards.on_divergence=rollback", "checkpoints.every=100")
    local = (f"checkpoints.local.dir={tmp_path / 'disk'}", "checkpoints.local.every=1")
    words = ("run", config, *guards, *local, "--run-dir", run_dir, "--only", "pretrain")
    code, _, err = command(*words, fault="nan@update:3")
    assert code == 0, err
    assert "pretrain: rolled back from step 3 to 0" in err
    assert "goes on from" not in err
    assert [row["step"] for row in rows_of(run_dir / "pretrain" / "metrics.jsonl")] == [1, 2, 3, 4]
