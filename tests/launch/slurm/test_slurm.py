"""The launch file for SLURM under SLURM: two nodes of this machine, stopped, killed, lost and late.

`make slurm` runs it. What ends must have every bit of a run of two processes that went through without a break.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from stages.conftest import environment, rows_of, start  # noqa: F401
from stages.test_killed_anywhere import require_same_bits
from stages.tiny_recipe import recipe, write_files
from typer.testing import CliRunner

from launch.slurm.cluster import PATIENCE, cluster, missing
from rlhfjax.cli import app

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"no SLURM here: without {', '.join(missing())}"),
]
GRACE = 60  # seconds
NEEDS = {
    "platform": "cpu", "topology": "cpu:2", "slices": 1, "devices": 2, "hosts": 2, "devices_per_host": 1,
    "grace_s": GRACE, "host_memory_bytes": 0, "disk_bytes": 0,
}  # fmt: skip
QUICK = ("reliability.heartbeat=10", "reliability.deadlines.join=30")
STAGES, STEPS = ("pretrain", "sft"), 8
SHIM = """\
#!/bin/bash
# `rlhfjax` on the nodes; one of them comes late where a file says so.
if [[ "$SLURMD_NODENAME" == n2 && "$1" == run && -e late ]]; then
  seconds=$(< late)
  rm late
  sleep "$seconds"
fi
exec {python} -m rlhfjax.cli "$@"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The tiny recipe up to SFT, with a checkpoint at each of eight steps."""
    folder = write_files(tmp_path_factory.mktemp("recipe"))
    given = recipe(folder)
    given["stages"] = {stage: given["stages"][stage] | {"steps": STEPS} for stage in STAGES}
    (folder / "tiny.yaml").write_text(json.dumps(given))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def unbroken(config, start, tmp_path_factory):  # noqa: F811
    """The run that two processes make without a break."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    process = start("launch", "local", "-n", "2", "--", "run", config, *QUICK, "--run-dir", run_dir)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return run_dir


@pytest.fixture
def submit(slurm, config, environment, tmp_path):  # noqa: F811
    """Renders the launch file of a plan and submits it: the job's number."""
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "rlhfjax"
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    slurm.environment |= environment | {"PATH": f"{shim.parent}:{os.environ['PATH']}"}

    def submitted(*overrides):
        (tmp_path / "PLAN.json").write_text(json.dumps({"fits": True, "needs": NEEDS}))
        run = [str(config), *QUICK, *overrides, "--run-dir", "run", "--plan", str(tmp_path / "PLAN.json")]
        rendered = CliRunner().invoke(app, ["launch", "render", "slurm", *run])
        assert rendered.exit_code == 0, rendered.output
        (tmp_path / "train.sbatch").write_text(rendered.stdout)
        return slurm.ask("sbatch", "--parsable", "train.sbatch", cwd=tmp_path).strip()

    yield submitted
    slurm.ask("scancel", "--user=root", check=False)
    slurm.ask("scancel", "--user=root", "--signal=KILL", "--full", check=False)
    until = time.monotonic() + PATIENCE
    while slurm.ask("squeue", "--noheader").strip():
        assert time.monotonic() < until, "jobs do not end"
        time.sleep(0.5)


def log_of(folder):
    return "".join(path.read_text() for path in folder.glob("*.log"))


def wait_until(true, folder, what):
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, f"{what}\n{log_of(folder)}"
        time.sleep(0.2)


def saved(run_dir, stage, step=1):
    return lambda: any(int(path.name) >= step for path in (run_dir / stage / "checkpoints").glob("[0-9]"))


def processes_of(slurm, node):
    """The trainers on a node: those of its daemon's mount namespace."""
    mount = os.readlink(f"/proc/{slurm.daemons[node].pid}/ns/mnt")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.readlink(process / "ns/mnt") == mount
            if ours and b"rlhfjax.cli\0run\0" in (process / "cmdline").read_bytes():
                yield int(process.name)
        except OSError:
            continue


def require_finished(slurm, number, tmp_path, restarts):
    job = slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", restarts), log_of(tmp_path)


def statuses(run_dir):
    return [line["status"] for line in rows_of(run_dir / "manifest.jsonl")]


def test_a_stop_saves_is_requeued_and_ends_with_the_same_bits(slurm, submit, tmp_path, unbroken):
    number, run_dir = submit(), tmp_path / "run"
    wait_until(saved(run_dir, "pretrain"), tmp_path, "no step of pretraining")
    slurm.ask("scancel", "--signal=TERM", number)
    require_finished(slurm, number, tmp_path, "1")
    assert statuses(run_dir) == ["preempted", "finished"]
    assert "exit code 42; requeued" in log_of(tmp_path)
    require_same_bits(run_dir, unbroken, STAGES, STEPS)


def test_a_process_that_dies_and_a_node_that_is_lost(slurm, submit, tmp_path, unbroken):
    number, run_dir = submit(), tmp_path / "run"
    wait_until(saved(run_dir, "pretrain"), tmp_path, "no step of pretraining")
    for process in processes_of(slurm, "n2"):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: "; requeued" in log_of(tmp_path), tmp_path, "not requeued")
    wait_until(saved(run_dir, "sft"), tmp_path, "no step of SFT")
    slurm.lose("n2")
    wait_until(lambda: slurm.job(number)["JobState"] == "PENDING", tmp_path, "SLURM did not requeue it")
    slurm.start_node("n2")
    require_finished(slurm, number, tmp_path, "2")
    assert statuses(run_dir)[2:] == ["finished"]  # of the others whatever their first process could still say
    require_same_bits(run_dir, unbroken, STAGES, STEPS)


def test_a_node_that_comes_too_late_is_named_and_all_start_again(slurm, submit, tmp_path):
    (tmp_path / "late").write_text("45")
    number = submit()
    wait_until(lambda: "; requeued" in log_of(tmp_path), tmp_path, "not requeued")
    assert "expected 2 processes within 30 s, got 1, without process 1" in log_of(tmp_path)
    wait_until(saved(tmp_path / "run", "pretrain"), tmp_path, "not started again")
    slurm.ask("scancel", number)
    slurm.wait(number, "CANCELLED")


def test_a_job_that_somebody_cancels_does_not_come_back(slurm, submit, tmp_path):
    number, run_dir = submit(), tmp_path / "run"
    wait_until(saved(run_dir, "pretrain"), tmp_path, "no step of pretraining")
    slurm.ask("scancel", number)
    assert slurm.wait(number, "CANCELLED")["Restarts"] == "0"
    wait_until(lambda: statuses(run_dir) == ["preempted"], tmp_path, "not saved")


def test_what_would_end_the_same_is_final(slurm, submit, tmp_path):
    number = submit(f"stages.pretrain.data=[{{source: {tmp_path}/absent.jsonl}}]")
    job = slurm.wait(number, "FAILED", "COMPLETED")
    assert (job["ExitCode"], job["Restarts"]) == ("3:0", "0"), log_of(tmp_path)
