"""One of two processes is sent SIGTERM: both save the same step and exit with 42, and go on together."""

import pytest

from stages.conftest import assert_same_bits, rows_of, saved
from stages.test_processes import HEARTBEAT, copy_until, launched, numbers, two  # noqa: F401
from stages.tiny_recipe import STEPS

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("point", "stage", "step"),
    [
        ("pretrain:1", "pretrain", 1),
        ("sft:1", "sft", 1),
        ("reward:1", "reward", 1),
        ("rollout:1", "ppo", 0),
        ("score:1", "ppo", 0),
        ("update:1", "ppo", 1),
        ("responses/ppo:0", "evaluate", None),
    ],
)
def test_sigterm_to_one_of_two(two, config, launched, environment, tmp_path, point, stage, step):  # noqa: F811
    finished, _ = two
    run_dir = copy_until(finished, stage, tmp_path)
    words = ("run", config, HEARTBEAT, "--run-dir", run_dir, "--only", stage)
    environment |= {"RLHFJAX_FAULT": f"sigterm@{point}:1", "RLHFJAX_ALLOW_FAULTS": "1"}
    try:
        code, _, err = launched(2, 1, *words, options=("--restarts-preempted", 0))
    finally:
        del environment["RLHFJAX_FAULT"], environment["RLHFJAX_ALLOW_FAULTS"]
    assert code == 42, err
    assert "Traceback" not in err
    assert "error: stopped by a preemption; what was done is saved" in err
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("preempted", 42)
    if step is not None:
        steps = [int(path.name) for path in (run_dir / stage / "checkpoints").iterdir() if path.name.isdigit()]
        assert (
            step <= max(steps, default=0) < STEPS
        )  # jax looks for signals once a second, then they agree on a place ahead

    code, _, err = launched(2, 1, *words)
    assert code == 0, err
    if step is not None:
        assert numbers(run_dir / stage / "metrics.jsonl") == numbers(finished / stage / "metrics.jsonl")
        assert_same_bits(*(saved(place / stage / "checkpoints" / str(STEPS)) for place in (run_dir, finished)))
