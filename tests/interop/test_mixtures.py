"""Mixtral and Qwen3-MoE against transformers: logits, greedy tokens, router losses, files in both directions."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.functional import load_balancing_loss, router_z_loss
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.interop.families import config_of, hf_config, weights
from rlhfjax.interop.pretrained import Pretrained, load_parameters, names_of
from rlhfjax.interop.tensors import tensor_of
from rlhfjax.models import LanguageModel
from rlhfjax.models.interface import positions_of
from rlhfjax.types import PromptBatch

QWEN = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
MODELS = ("mixtral", "qwen3_moe", "qwen3_moe_unnormalised")


class Golden:
    """A model of the golden file, here and there."""

    def __init__(self, found, name):
        def of(part):
            prefix = f"{name}/{part}"
            return {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}

        self.theirs = of("")
        self.described = json.loads(self.theirs["config"].tobytes())
        self.tensors = of("weights/") or {
            key.removeprefix("qwen3_moe/weights/"): found[key] for key in found if key.startswith("qwen3_moe/weights/")
        }
        self.model = LanguageModel(config_of(self.described))
        listed = weights(self.model.config)
        source = Pretrained(
            self.model.config, "policy", None, listed, lambda w, name, region: w.look(self.tensors[name])[region]
        )
        self.params = load_parameters(source)


@pytest.fixture(scope="module", params=MODELS)
def golden(request):
    with np.load(Path(__file__).parents[1] / "golden" / "experts.npz") as found:
        return Golden(dict(found), request.param)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(golden, side):
    mask = golden.theirs[side]
    got = jax.jit(golden.model.logits)(golden.params, jnp.asarray(golden.theirs["tokens"], jnp.int32), mask)
    np.testing.assert_allclose(got[mask], golden.theirs[f"{side}_logits"][mask], atol=1e-4, rtol=0)


# Their routers differ in what the logits of all show.
@pytest.mark.parametrize(
    "golden",
    [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.slow) for name in MODELS],
    indirect=True,
)
def test_greedy_tokens(golden):
    tokens, mask, wanted = (golden.theirs[name] for name in ("tokens", "left", "greedy"))
    sampling = SamplingParams(max_new_tokens=wanted.shape[1], stop_id=-1, pad_id=0, temperature=0.0)
    batch = PromptBatch(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(len(tokens), dtype=jnp.int32))
    made = jax.jit(lambda *args: generate(golden.model, *args, sampling=sampling))(
        golden.params, batch, jax.random.key(0)
    )
    np.testing.assert_array_equal(made.response, wanted)


def test_router_losses(golden):
    # theirs of several layers is of the counts of all together, so that layers can make up for each other
    tokens, mask = jnp.asarray(golden.theirs["tokens"], jnp.int32), jnp.asarray(golden.theirs["right"])
    read = jax.jit(golden.model.hidden_and_routing)
    routing = read(golden.params, tokens, positions_of(mask), mask.astype(jnp.int32))[1]
    for layer, wanted in enumerate(golden.theirs["balancing_by_layer"]):
        one = jax.tree.map(lambda x, layer=layer: x[layer], routing)
        np.testing.assert_allclose(load_balancing_loss(one.assigned, one.probabilities, one.tokens), wanted, rtol=1e-5)
    together = jax.tree.map(lambda x: x.sum(axis=0), routing)
    got = load_balancing_loss(together.assigned, together.probabilities, together.tokens)
    np.testing.assert_allclose(got, golden.theirs["balancing"], rtol=1e-5)
    got = load_balancing_loss(routing.assigned, routing.probabilities, routing.tokens)
    np.testing.assert_allclose(got, golden.theirs["balancing_by_layer"].mean(), rtol=1e-5)
    got = router_z_loss(routing.squared_z, routing.tokens)
    np.testing.assert_allclose(got, golden.theirs["z_by_layer"].mean(), rtol=1e-5)


def test_every_tensor_goes_back_to_where_it_came_from(golden):
    made = {}
    flat = {
        "/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(golden.params)
    }
    for weight in weights(golden.model.config):
        for place, name in names_of(weight, golden.model.config):
            made[name] = tensor_of([weight], [np.asarray(flat[weight.path])[place]])
    assert made.keys() == golden.tensors.keys()
    for name, tensor in golden.tensors.items():
        np.testing.assert_array_equal(made[name], tensor, err_msg=name)


def test_configuration_goes_back_and_forth(golden):
    written = hf_config(golden.model.config)
    assert written["architectures"] == golden.described["architectures"]
    assert config_of(json.loads(json.dumps(written))) == golden.model.config
    same = ("num_experts_per_tok", "hidden_size", "rms_norm_eps", "tie_word_embeddings", "router_aux_loss_coef")
    assert {key: written[key] for key in same} == {key: golden.described[key] for key in same}


def test_settings_of_training_alone_do_not_hinder_an_export(golden):
    config = replace(golden.model.config, capacity_factor=1.25, load_balancing_coef=0.3, router_z_coef=0.1)
    assert hf_config(config)["architectures"] == golden.described["architectures"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 1, got 2"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"num_experts_per_tok": 5}, "at most 4 experts, got 5"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
    ],
)
def test_what_is_not_here_is_refused(change, message):
    described = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, **QWEN}
    assert config_of(described).experts == 4
    with pytest.raises(ConfigError, match=message):
        config_of(described | change)
