"""Moments and frozen models in the host's memory: a recipe with the bits of one that keeps all on the device."""

import shutil

import pytest

from rlhfjax import host_memory
from rlhfjax.config import load_config
from rlhfjax.errors import ConfigError
from rlhfjax.runs import run_recipe
from stages.conftest import assert_same_bits, rows_of, saved
from stages.tiny_recipe import STEPS

TIMES = ("timing/", "perf/")


def last(run_dir, stage):
    return saved(run_dir / stage / "checkpoints" / str(STEPS))


def figures(run_dir, stage):
    """The rows of a stage without its times."""
    rows = rows_of(run_dir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def assert_same_run(one, other, stage):
    assert_same_bits(last(one, stage), last(other, stage))
    assert figures(one, stage) == figures(other, stage)


def without_last_steps(run_dir, stage, kept):
    """A run as one that was stopped after so many steps of a stage leaves it."""
    (run_dir / stage / "complete.json").unlink()
    for step in range(kept + 1, STEPS + 1):
        shutil.rmtree(run_dir / stage / "checkpoints" / str(step), ignore_errors=True)


@pytest.mark.slow  # a run of dpo with moments and its reference there is in test_dpo.py
def test_the_bits_are_those_of_a_run_that_keeps_all_on_the_device(config, copied, finished, command):
    run_dir = copied("sft")
    words = "stages.evaluate=null", "checkpoints.keep=9", "--run-dir", run_dir
    code, _, err = command("run", config, "mesh.offload=all", *words)
    assert code == 0, err
    for stage in ("sft", "reward", "ppo"):
        assert_same_run(run_dir, finished, stage)
    # it goes on with all on the device, from what it saved of moments on the host
    without_last_steps(run_dir, "ppo", 2)
    code, _, err = command("run", config, *words)
    assert code == 0, err
    assert_same_run(run_dir, finished, "ppo")


def test_devices_without_that_memory_are_refused_before_anything_is_made(config, tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "HOST", "memory_of_tomorrow")
    run = load_config(str(config), ["stages.ppo.mesh={offload: frozen}"])
    with pytest.raises(ConfigError, match=r"stages\.ppo\.mesh\.offload: expected devices with a memory memory_of_"):
        run_recipe(run, tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer").exists()
