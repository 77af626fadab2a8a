"""What the stages take from the table: their function, their keys."""

import importlib
from pathlib import Path

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.config.recipe import FACTS, STAGES
from rlhfjax.stages.job import Job


@pytest.mark.parametrize("facts", STAGES, ids=lambda facts: facts.name)
def test_every_stage_has_its_function(facts):
    module = importlib.import_module(f"rlhfjax.stages.{facts.module}")
    assert getattr(module, facts.name).__module__ == module.__name__


@pytest.mark.parametrize("stage", FACTS)
def test_a_key_is_of_seed_stage_and_use(stage):
    # of these numbers: with others a run that is resumed would draw otherwise than it began
    run = load_config("quickstart", ["seed=5"])
    job = Job(run, stage, Path(), Path(), jax.sharding.Mesh(jax.devices()[:1], ("data",)), print, {})
    for use, number in (("init", 0), ("steps", 1), ("samples", 2), ("adapters", 3)):
        want = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), FACTS[stage].key), number)
        assert (jax.random.key_data(job.key(use)) == jax.random.key_data(want)).all()
