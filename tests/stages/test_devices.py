"""The recipe on eight devices as 2 x 2 x 2: the numbers of one device, no compiling on the way, resumed to the bit."""

import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.runs import run_recipe
from rlhfjax.stages import offline, online
from rlhfjax.training.checkpoint import Checkpoints
from stages.conftest import assert_same_bits, rows_of, saved
from stages.once import keeping, once
from stages.tiny_recipe import STEPS

MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
PROFILE = "profile={start: 2, steps: 2}"
TRAINED = ("pretrain", "sft", "reward", "ppo")


@pytest.fixture(scope="module")
def programs():
    """What the run on the mesh compiled, by stage."""
    return {}


@pytest.fixture(scope="module")
def sharded(config, programs, tmp_path_factory):
    """A run on the mesh up to PPO: its directory; how much was compiled as each PPO iteration began and at the end."""
    run_dir = tmp_path_factory.mktemp("sharded") / "run"
    compiled, counts, loop = [], [], online.train_online

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def counted(steps, *args, **kwargs):
        def rollout(*inputs):
            counts.append(len(compiled))
            return steps.rollout(*inputs)

        state = loop(replace(steps, rollout=rollout), *args, **kwargs)
        counts.append(len(compiled))
        return state

    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "train_online", counted)
        for module in (offline, online):
            patch.setattr(module, "Ahead", keeping(programs))
        run_recipe(load_config(config, [*MESH, PROFILE, "stages.evaluate=null"]), run_dir)
    jax.monitoring.unregister_event_duration_listener(listen)
    return run_dir, counts


def test_nothing_is_compiled_after_the_first_iteration(sharded):
    _, (first, second, *rest) = sharded
    assert first < second
    assert rest == [second] * (STEPS - 1)


@pytest.mark.parametrize("stage", TRAINED)
def test_the_trace_of_a_stage_holds_the_steps_asked_for(sharded, stage):
    run_dir, _ = sharded
    [_] = (run_dir / stage / "profile").glob("plugins/profile/*/*.xplane.pb")
    [path] = (run_dir / stage / "profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sorted(event["args"]["step_num"] for event in events if event.get("name") == stage) == ["2", "3"]
    if stage == "ppo":
        names = Counter(event.get("name") for event in events)
        assert [names[part] for part in ("rollout", "score", "estimate", "update")] == [2, 2, 2, 2]


def test_the_time_to_the_first_step_is_kept(sharded):
    run_dir, _ = sharded
    kept = rows_of(run_dir / "manifest.jsonl")[-1]["first_step_s"]
    for stage in TRAINED:
        facts = json.loads((run_dir / stage / "complete.json").read_text(encoding="utf-8"))
        assert kept[stage] == facts["timing/first_step_s"] >= facts["timing/compile_s"] > 0


def test_the_parts_of_an_iteration_are_its_whole(sharded):
    for row in rows_of(sharded[0] / "ppo" / "metrics.jsonl"):
        parts = ("reshard", "rollout", "score", "estimate", "update", "host")
        assert sum(row[f"timing/{part}_s"] for part in parts) == pytest.approx(row["timing/step_s"], rel=1e-3)
        assert sum(row[f"timing/{part}_share"] for part in parts) == pytest.approx(1, rel=1e-3)
        assert 0 < row["perf/mfu"] < 1


@pytest.mark.parametrize("stage", TRAINED)
def test_the_numbers_are_those_of_one_device(sharded, finished, stage):
    names = {
        "pretrain": ["loss/train", "loss/validation", "grad/norm"],
        "sft": ["loss/train", "loss/validation", "grad/norm"],
        "reward": ["train/rm/loss", "train/rm/accuracy", "eval/rm/accuracy", "grad/norm"],
        "ppo": [
            "objective/scores",
            "objective/kl",
            "loss/policy_avg",
            "loss/value_avg",
            "loss/ptx",
            "grad/policy_norm",
        ],
    }[stage]
    many, one = (rows_of(run_dir / stage / "metrics.jsonl") for run_dir in (sharded[0], finished))
    assert len(many) == len(one) == STEPS
    for row, expected in zip(many, one, strict=True):
        wanted = {name: expected[name] for name in names if name in expected}
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_interrupted_in_every_stage_it_ends_the_same(sharded, programs, config, tmp_path):
    run = load_config(config, [*MESH, "stages.evaluate=null"])
    stops, save = Counter(), Checkpoints.save

    def interrupted(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        stage = self.directory.parent.name
        if step == 2 and not stops[stage]:
            stops[stage] += 1
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        for module in (offline, online):
            patch.setattr(module, "Ahead", once(programs))
        for _ in TRAINED:
            with pytest.raises(KeyboardInterrupt):
                run_recipe(run, tmp_path / "run")
        run_recipe(run, tmp_path / "run")
    assert stops == dict.fromkeys(TRAINED, 1)
    attempts = rows_of(tmp_path / "run" / "manifest.jsonl")
    assert [line["attempt"] for line in attempts] == [1, 2, 3, 4, 5]
    assert [line["status"] for line in attempts] == ["interrupted"] * 4 + ["finished"]
    assert [line["exit_code"] for line in attempts] == [130] * 4 + [0]
    for stage in TRAINED:
        steps = [row["step"] for row in rows_of(tmp_path / "run" / stage / "metrics.jsonl")]
        assert steps == sorted(set(steps))
        one, other = (saved(place / stage / "checkpoints" / str(STEPS)) for place in (tmp_path / "run", sharded[0]))
        assert_same_bits(one, other)


@pytest.mark.faults  # no fault, but long, and evaluation on one device is in every run
def test_the_evaluation_is_that_of_one_device(sharded, config, finished, tmp_path):
    run_dir = shutil.copytree(sharded[0], tmp_path / "run")
    run_recipe(load_config(config, MESH), run_dir)
    many, one = (json.loads((place / "evaluate" / "evaluation.json").read_text()) for place in (run_dir, finished))
    assert many["heldout_losses"].keys() == one["heldout_losses"].keys()
    for stage, expected in one["heldout_losses"].items():
        assert many["heldout_losses"][stage] == pytest.approx(expected, abs=1e-4)
