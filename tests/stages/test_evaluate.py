"""What the evaluation counts as one observation."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rlhfjax.config import load_config
from rlhfjax.sharding import make_mesh
from rlhfjax.stages.batches import open_batches
from rlhfjax.stages.evaluate import Measured
from rlhfjax.stages.job import Job
from rlhfjax.stages.measures.responses import respond
from rlhfjax.training.supervision import Watch
from stages.tiny_recipe import write_jsonl


@pytest.fixture
def job(finished, config):
    """The evaluation of the finished run, with other settings."""

    def made(*settings):
        run = load_config(config, settings)
        return Job(run, "evaluate", finished, Path(run.data_dir), make_mesh(devices=jax.devices()[:1]), print, {})

    return made


def test_a_policy_from_a_checkpoint_is_compared_with_that(job, finished, tmp_path):
    # fails where it is compared with itself: a KL of 0, and no win rates
    without = [f"stages.{stage}=null" for stage in ("pretrain", "sft", "ppo", "reward")]
    dpo = "{data: [{source: c}], steps: 1, batch: {size: 8, length: 8}, optimizer: {lr: 1}}"
    settings = f"model={{checkpoint: {finished / 'sft'}}}"
    made = replace(job(*without, f"stages.dpo={dpo}", settings, "stages.evaluate.comparisons=[]"), run_dir=tmp_path)
    last = made.load_from(finished / "ppo")
    measured = Measured(made, Watch())
    measured.__dict__["models"] = {"dpo": last}
    (before, start), (name, policy) = measured.policies.items()
    assert (before, name, policy) == ("checkpoint", "dpo", last)
    want = jax.tree.leaves(made.load_from(finished / "sft")[1])
    assert all((one == other).all() for one, other in zip(jax.tree.leaves(start[1]), want, strict=True))


def test_a_prompt_that_comes_again_has_another_response(job, tmp_path):
    """At temperature 1 two draws of 8 tokens of 320 agree with a chance of about 320^-8.

    Fails where noise belongs to the prompt: three different responses, each 13 or 14 times.
    """
    prompts = write_jsonl(tmp_path / "three.jsonl", ({"prompt": text} for text in ("the film", "music", "a story")))
    made = job(f'stages.evaluate.data=[{{"source": "{prompts}"}}]', "stages.evaluate.samples=40")
    said = respond(made, open_batches(made)["train"], {"sft": made.load("sft")}, "sft", Watch())
    assert len(set(said.prompts)) == 3
    assert len(set(map(tuple, said.tokens))) == len(said.tokens) == 40
