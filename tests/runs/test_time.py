"""What a run says of its time, against a clock outside and against what was done to it."""

import json
import subprocess
import sys
import time

import pytest
from stages.conftest import rows_of
from stages.tiny_recipe import recipe

from rlhfjax.host.goodput import FAILURE, PREEMPTION, PRODUCTIVE, account_of

STEPS, EVERY = 60, 10
PAUSE = 4  # seconds until the next start, as launchers wait
FAULTS = [
    ("kill", 17),
    ("term", 21),
    ("term", 25),
    ("kill", 34),
    ("term", 38),
    ("term", 44),
    ("term", 47),
    ("kill", 59),
]


@pytest.fixture
def long(files, tmp_path):
    whole = recipe(files)
    whole["stages"] = {"pretrain": whole["stages"]["pretrain"] | {"steps": STEPS, "validate_every": 7}}
    whole["checkpoints"] = {"every": EVERY}
    (tmp_path / "long.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return tmp_path / "long.yaml"


@pytest.mark.faults
def test_every_second_of_a_run_that_is_stopped_eight_times_is_accounted_for(environment, command, long, tmp_path):
    # meant to catch time that no kind has, or that two have
    run_dir, began, ends, codes = tmp_path / "run", time.time(), [], []
    for fault in [*FAULTS, None]:
        faults = {"RLHFJAX_FAULT": "sig{}@pretrain:{}".format(*fault)} if fault else {}
        words = [sys.executable, "-m", "rlhfjax.cli", "run", long, "--run-dir", run_dir]  # as anybody starts it
        variables = environment | {"RLHFJAX_ALLOW_FAULTS": "1"} | faults
        process = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        err = process.stderr
        ends.append(time.time())
        codes.append(process.returncode)
        time.sleep(PAUSE if fault else 0)
        assert fault or process.returncode == 0, err
    assert codes == [-9, 42, 42, -9, 42, 42, 42, -9, 0]
    resumed = [line["resumed_from"]["step"] for line in rows_of(run_dir / "manifest.jsonl")[1:]]
    again = sum(step - 1 - to for (kind, step), to in zip(FAULTS, resumed, strict=True) if kind == "kill")
    account = account_of(run_dir)
    print(f"{account.wall:.2f} s of {ends[-1] - began:.2f} s")
    assert account.wall == pytest.approx(ends[-1] - began, rel=0.01)
    assert [attempt.code for attempt in account.attempts] == [None if code < 0 else code for code in codes]
    assert account.steps == {PRODUCTIVE: STEPS, PREEMPTION: 0, FAILURE: again}
    assert all(account.seconds.values())
    recovered = account.to_recover()
    for began, ended, seconds in zip(ends, ends[1:], recovered, strict=False):
        assert 0 < seconds < ended - began + 1
    code, out, _ = command("goodput", run_dir)
    assert code == 0
    assert "lost to preemption" in out
    assert f"{STEPS} steps, {again} done again (lost to failure)" in out
    assert 0 < rows_of(run_dir / "pretrain" / "metrics.jsonl")[-1]["timing/goodput"] < 1


def test_a_whole_run_keeps_its_time(finished, command):
    account = account_of(finished)
    assert [attempt.code for attempt in account.attempts] == [0]
    assert account.steps == {PRODUCTIVE: 4 * 4, PREEMPTION: 0, FAILURE: 0}
    assert account.seconds[PREEMPTION] == account.seconds[FAILURE] == 0
    assert "Where the time since the first start went" in (finished / "report.html").read_text(encoding="utf-8")
    code, _, err = command("goodput", finished / "sft")
    assert (code, err.count("\n")) == (2, 1)
