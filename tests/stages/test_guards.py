"""Numbers that are not finite in a whole run: skipped, counted, stopped at or rolled back, through the command line."""

import json
import math
import shutil
import stat

import pytest

from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STEPS


@pytest.fixture
def run(config, command):
    """Runs a stage with a fault on purpose: (exit code, stderr)."""

    def ran(run_dir, stage, *overrides, fault=None):
        code, _, err = command("run", config, "--run-dir", run_dir, "--only", stage, *overrides, fault=fault)
        assert "Traceback" not in err
        return code, err

    return ran


def told(run_dir, stage):
    """What a stage says of itself at its end."""
    return json.loads((run_dir / stage / "complete.json").read_text(encoding="utf-8"))


def column(run_dir, stage, name):
    return [row[name] for row in rows_of(run_dir / stage / "metrics.jsonl")]


def went_on(run_dir, stage, run):
    """What the last checkpoint holds, and the rows without times, once more after the last step was lost."""
    step = run_dir / stage / "checkpoints" / str(STEPS)
    before = saved(step), untimed(run_dir, stage)
    shutil.rmtree(step)
    (run_dir / stage / "complete.json").unlink()
    code, err = run(run_dir, stage)
    assert code == 0, err
    assert_same_bits(before[0], saved(step))
    assert untimed(run_dir, stage) == before[1]


def untimed(run_dir, stage):
    rows = rows_of(run_dir / stage / "metrics.jsonl")
    return [{k: str(v) for k, v in row.items() if not k.startswith(("timing/", "perf/"))} for row in rows]


def test_a_gradient_that_is_nan(copied, run):
    """One update of four is skipped; resumed behind it, the run ends as it would have, also in its learning rates."""
    run_dir = copied("pretrain")
    code, err = run(run_dir, "pretrain", fault="nan@update:2")
    assert code == 0, err
    assert "step 2 skipped 1 updates" in err
    assert told(run_dir, "pretrain")["skipped_updates"] == 1
    assert rows_of(run_dir / "manifest.jsonl")[-1]["guards"] == {"pretrain": {"skipped_updates": 1}}
    assert column(run_dir, "pretrain", "guard/skipped_updates") == [0, 1, 0, 0]
    rates = column(run_dir, "pretrain", "lr")
    assert rates[1] == rates[2] != rates[3]
    noted = run_dir / "pretrain" / "guards.jsonl"
    assert rows_of(noted) == [{"step": 2, "kind": "skipped", "values": {"grad/norm": "nan"}, "rows": [*range(8, 16)]}]
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600
    went_on(run_dir, "pretrain", run)


def test_training_that_blows_up_stops(copied, run):
    """No fault but a learning rate beyond all reason: exit code 4, and nothing is saved after it was found."""
    run_dir = copied("pretrain")
    huge = ("stages.pretrain.optimizer.lr=1e38", "stages.pretrain.optimizer.warmup_steps=0")
    code, err = run(run_dir, "pretrain", *huge, "reliability.guards.non_finite=2")
    assert code == 4, err
    first = column(run_dir, "pretrain", "guard/skipped_updates").index(1) + 1
    assert f"pretrain diverged at step {first + 1}: 2 steps in a row without a finite update" in err
    assert max(int(path.name) for path in (run_dir / "pretrain" / "checkpoints").glob("[0-9]")) == first
    assert not (run_dir / "pretrain" / "complete.json").exists()
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("diverged", 4)


@pytest.mark.faults  # that no number of a rollout does harm is in tests/training/test_update.py
def test_a_reward_that_is_nan(copied, run):
    """All scores of an iteration: its updates are skipped, and what is noted of it is no text."""
    run_dir = copied("ppo")
    code, err = run(run_dir, "ppo", fault="nan@score:2")
    assert code == 0, err
    assert column(run_dir, "ppo", "guard/skipped_updates") == [0, 4, 0, 0]
    assert column(run_dir, "ppo", "guard/skipped_in_a_row") == [0, 1, 0, 0]
    assert all(map(math.isfinite, column(run_dir, "ppo", "objective/kl_coef")))
    [noted] = rows_of(run_dir / "ppo" / "guards.jsonl")
    assert (noted["step"], noted["kind"], len(noted["rows"])) == (2, "skipped", 16)
    assert all(isinstance(row, int) for row in noted["rows"])
    assert noted["values"]["loss/total"] == "nan"  # a mean over no update
    assert told(run_dir, "ppo")["skipped_updates"] == 4


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["inf@score:2", "nan@update:2"])
def test_ppo_goes_on_as_it_would_have(copied, run, fault):
    run_dir = copied("ppo")
    code, err = run(run_dir, "ppo", fault=fault)
    assert code == 0, err
    assert column(run_dir, "ppo", "guard/skipped_updates") == [0, 4, 0, 0]
    went_on(run_dir, "ppo", run)


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_rolled_back(copied, run, stage):
    """Found at step 3, back to step 1 of 4: the data of steps 2 and 3 are left out, also after another resume."""
    run_dir = copied(stage)
    settings = ("reliability.guards.non_finite=1", "reliability.guards.on_divergence=rollback", "checkpoints.keep=4")
    code, err = run(run_dir, stage, *settings, fault="nan@update:3")
    assert code == 0, err
    assert f"{stage}: rolled back from step 3 to 1" in err
    assert told(run_dir, stage)["rollbacks"] == 1
    assert column(run_dir, stage, "step") == [1, 2, 3, 4]
    assert column(run_dir, stage, "guard/rollbacks") == [0, 1, 1, 1]
    assert column(run_dir, stage, "guard/skipped_updates") == [0, 0, 0, 0]
    rows = {row["kind"]: row for row in rows_of(run_dir / stage / "guards.jsonl")}
    assert rows["rolled_back"]["values"] == {"to": 1, "left_out": 2}
    went_on(run_dir, stage, lambda folder, name: run(folder, name, *settings))


@pytest.mark.faults
def test_rollbacks_end(copied, run):
    run_dir = copied("pretrain")
    settings = ("reliability.guards.non_finite=1", "reliability.guards.on_divergence=rollback")
    code, err = run(run_dir, "pretrain", *settings, "reliability.guards.rollbacks=2", fault="nan@update:3+")
    assert code == 4, err
    assert err.count("rolled back from step 3") == 2
    assert "diverged at step 3 after 2 rollbacks" in err


@pytest.mark.faults
def test_a_reward_model_that_knows_no_number(copied, run):
    """From the second iteration on every score is NaN: the third such iteration ends the run."""
    run_dir = copied("ppo")
    code, err = run(run_dir, "ppo", fault="nan@score:2+")
    assert code == 4, err
    assert "ppo diverged at step 4: 3 steps in a row without a finite update" in err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("setting", "metric"),
    [
        ("kl_ceiling=1e-6", "objective/kl"),
        ("entropy_floor=100", "objective/entropy"),
        ("length_at_cap=0.01", "objective/eos_rate"),
    ],
)
def test_ppo_stops_at_its_bounds(copied, run, setting, metric):
    run_dir = copied("ppo")
    kept = ("stages.ppo.optimizer.lr=0.03", "stages.ppo.kl={coef: 0.0, controller: fixed}")
    code, err = run(run_dir, "ppo", *kept, f"reliability.guards.{setting}")
    assert code == 4, err
    assert metric in err
    code, err = run(run_dir, "ppo", *kept, f"reliability.guards.{setting}", "reliability.guards.on_divergence=continue")
    assert code == 0, err
    assert err.count("more of this is only counted") == 1
    assert column(run_dir, "ppo", "guard/divergences")[-1] >= 1
