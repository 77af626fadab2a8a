"""`routing` of an online stage: what its programs hand on, found by tracing them alone."""

import jax
import pytest
from pydantic import ValidationError

from rlhfjax.config import schema
from rlhfjax.errors import ConfigError
from rlhfjax.sharding import make_mesh
from rlhfjax.stages.building import Vocabulary, build
from rlhfjax.target import target_of

DATA = [{"source": "unused.jsonl"}]


def run(routing, family="mixtral", **sampling):
    stage = {"data": DATA, "steps": 10, "optimizer": {"lr": 1e-3}}
    ppo = {
        "batch": {"size": 4, "prompt_length": 8, "routing": routing},
        "sampling": {"max_new_tokens": 6} | sampling,
    }
    reward = {"batch": {"size": 4, "length": 16, "candidates": 2}, "normalize": {"on": "none"}}
    shape = {"family": family, "layers": 2, "width": 16, "heads": 4, "context": 32}
    tokenizer = {"kind": "bpe", "vocab_size": 320, "data": DATA}
    stages = {"reward": stage | reward, "ppo": stage | ppo}
    return schema.Run.model_validate({"name": "routed", "model": shape, "tokenizer": tokenizer, "stages": stages})


def built(routing, **how):
    mesh = make_mesh(devices=jax.devices()[:1])
    return build(run(routing, **how), "ppo", mesh, target_of(mesh), Vocabulary(320))


@pytest.mark.parametrize("routing", ["own", "measured", "replayed"])
def test_routes_go_from_the_sampler_to_the_update(routing):
    programs = built(routing)
    made, scored = programs["rollout"].shapes(), programs["score"].shapes()
    if routing == "own":
        assert (made.routes, scored.rerouted) == (None, None)
        return
    assert made.routes.shape == (4, 14, 2, 2)
    assert scored.rerouted.shape == (4, 6)
    experience, metrics = programs["estimate"].shapes()
    assert "router/rerouted" in metrics
    kept = experience.rollout.routes
    assert (kept is not None) == (routing == "replayed")
    programs["update"].lower()


def test_a_model_without_experts_has_none():
    with pytest.raises(ConfigError, match="mixtures of experts"):
        built("replayed", family="llama")


def test_draft_tokens_are_not_routed():
    with pytest.raises(ValidationError, match="speculate"):
        run("measured", speculate="ngram")
