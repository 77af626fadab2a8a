"""Killed ten times at moments that nobody chose, from the tokenizer to the report, a run ends with the same bits."""

import random
import signal
import subprocess
import time

import pytest

from rlhfjax.training.checkpoint import stored_digests
from stages.conftest import rows_of
from stages.tiny_recipe import STAGES, STEPS

pytestmark = pytest.mark.faults
TRAINED = [stage for stage in STAGES if stage not in ("tokenizer", "evaluate")]
KILLS = 10


def numbers(path):
    rows = rows_of(path)
    return [{name: row[name] for name in row if not name.startswith(("timing/", "perf/"))} for row in rows]


def require_same_bits(run_dir, finished, stages=TRAINED, steps=STEPS):
    """Of two whole runs: metrics, arrays and samples."""
    for stage in stages:
        assert numbers(run_dir / stage / "metrics.jsonl") == numbers(finished / stage / "metrics.jsonl")
        ours, theirs = (stored_digests(place / stage / "checkpoints" / str(steps)) for place in (run_dir, finished))
        assert ours == theirs
        assert ours
    if "ppo" in stages:
        assert rows_of(run_dir / "ppo" / "samples.jsonl") == rows_of(finished / "ppo" / "samples.jsonl")


def test_ten_kills(start, finished, config, tmp_path):
    run_dir, draw = tmp_path / "run", random.Random(11)
    seconds = time.monotonic()
    timed = start("run", config, "--run-dir", tmp_path / "timed")
    _, err = timed.communicate()
    seconds = time.monotonic() - seconds  # of a whole run, on this machine as it is now
    assert timed.returncode == 0, err
    killed = 0
    while True:
        process = start("run", config, "--run-dir", run_dir)
        wait = draw.uniform(0.1, 0.4) * seconds if killed < KILLS else 60 * seconds
        try:
            _, err = process.communicate(timeout=wait)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    assert process.returncode == 0, err
    assert killed > 2  # the run was over before ten at the latest
    require_same_bits(run_dir, finished)
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".part", ".damaged")]
    attempts = rows_of(run_dir / "manifest.jsonl")
    assert [line["status"] for line in attempts] == ["running"] * (len(attempts) - 1) + ["finished"]
