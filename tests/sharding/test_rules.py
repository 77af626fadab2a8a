"""Where parameters, optimizer moments and batches go."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import ranked_batch, tiny, token_batch

from rlhfjax.errors import ConfigError
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.decoder import FAMILIES
from rlhfjax.sharding import batch_sharding, make_mesh, place_batch, state_shardings
from rlhfjax.sharding.rules import path_name
from rlhfjax.types import OnlineState, PromptBatch, TrainState


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 2, 1, 2)


def specs(mesh, shapes):
    flat, _ = jax.tree_util.tree_flatten_with_path(state_shardings(mesh, shapes))
    return {path_name(path): sharding.spec for path, sharding in flat}


def shapes_of(model):
    return jax.eval_shape(model.init_scalar, jax.random.key(0))


def test_layout_of_every_parameter(mesh):
    got = specs(mesh, shapes_of(tiny("gpt2"))) | specs(mesh, jax.eval_shape(tiny(tied=False).init, jax.random.key(0)))
    norm = P(None, None)
    assert got == {
        "decoder/embed/embedding": P("tensor", "fsdp"),
        "decoder/positions/embedding": P(None, "fsdp"),
        **{f"decoder/blocks/attention/{n}/kernel": P(None, "fsdp", "tensor", None) for n in ("query", "key", "value")},
        **{f"decoder/blocks/attention/{n}/bias": P(None, "tensor", None) for n in ("query", "key", "value")},
        "decoder/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        "decoder/blocks/attention/out/bias": P(None, "fsdp"),
        "decoder/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "decoder/blocks/mlp/up/bias": P(None, "tensor"),
        "decoder/blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
        "decoder/blocks/mlp/down/bias": P(None, "fsdp"),
        **{f"decoder/blocks/{n}_norm/{leaf}": norm for n in ("attention", "mlp") for leaf in ("scale", "bias")},
        **{f"decoder/final_norm/{leaf}": P(None) for leaf in ("scale", "bias")},
        "head/kernel": P("fsdp"),
        "head/bias": P(),
        "embed/embedding": P("tensor", "fsdp"),
        "unembed/kernel": P("fsdp", "tensor"),
        **{f"blocks/attention/{n}/kernel": P(None, "fsdp", "tensor", None) for n in ("query", "key", "value")},
        "blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        **{f"blocks/mlp/{n}/kernel": P(None, "fsdp", "tensor") for n in ("up", "gate")},
        "blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
        **{f"blocks/{n}_norm/scale": norm for n in ("attention", "mlp")},
        "final_norm/scale": P(None),
    }


def test_moments_and_averages_lie_as_their_parameters(mesh):
    # meant to catch replicated moments, and rules that depend on a name before the path
    params = {"policy": jax.eval_shape(tiny().init, jax.random.key(0)), "value": shapes_of(tiny("gpt2"))}
    optimizer = optax.partition(
        {"policy": optax.adam(1e-3), "value": optax.adamw(1e-3)},
        lambda p: {name: jax.tree.map(lambda _, n=name: n, tree) for name, tree in p.items()},
    )
    train = TrainState(params, jax.eval_shape(optimizer.init, params), jnp.int32(0), params["policy"])
    got = specs(mesh, OnlineState(train, jnp.float32(0.1), jnp.int32(0)))
    wanted = specs(mesh, params)
    moments = 0
    for name, spec in got.items():
        matches = [own for own in wanted if name.endswith(own.split("/", 1)[1]) and own.split("/")[0] in name]
        if name.startswith("train/optimizer") and matches:
            own = [*wanted[matches[0]]]
            split = next((place for place, axis in enumerate(own) if axis), None)
            if split is not None and "norm" not in name:  # once more over data, in its first axis
                own[split] = (own[split], "data")
            assert spec == P(*own), name
            moments += 1
    assert moments == 2 * len(wanted)
    assert got["train/average/embed/embedding"] == P(("tensor", "data"), "fsdp")
    assert got["kl_coef"] == got["train/step"] == P()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_a_rule(mesh, family):
    config = decoder_config(family, vocab_size=16, layers=2, width=16, heads=4, context=8)
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    assert jax.tree.structure(state_shardings(mesh, shapes)) == jax.tree.structure(shapes)


@pytest.mark.parametrize("name", ["adapter/kernel", "unembed/bias", "notembed/embedding"])
def test_a_parameter_without_a_rule_is_an_error(mesh, name):
    module, leaf = name.split("/")
    with pytest.raises(ConfigError, match=rf"no rule for parameter '{name}' with 2 axes.*table"):
        state_shardings(mesh, {module: {leaf: jnp.zeros((4, 4))}})


def test_a_known_name_of_another_rank_is_an_error(mesh):
    with pytest.raises(ConfigError, match="with 3 axes"):
        state_shardings(mesh, {"embed": {"embedding": jnp.zeros((4, 4, 4))}})


def test_batches_split_rows_over_data_fsdp_and_expert_and_tokens_over_sequence():
    mesh = make_mesh(2, 1, 2, 2)
    rows, tokens = ("data", "fsdp", "expert"), "sequence"
    placed = place_batch(mesh, token_batch(4, 8))
    assert placed.tokens.sharding.spec == placed.loss_mask.sharding.spec == P(rows, tokens)
    ranked = place_batch(mesh, ranked_batch(4, 3, 8))
    assert ranked.tokens.sharding.spec == ranked.token_mask.sharding.spec == P(rows, None, tokens)
    assert ranked.ranks.sharding.spec == ranked.mask.sharding.spec == P(rows, None)
    # fails when prompts are split like other tokens: seen
    prompts = place_batch(mesh, PromptBatch(jnp.zeros((4, 7), jnp.int32), jnp.ones((4, 7), bool), jnp.arange(4)))
    assert prompts.tokens.sharding.spec == prompts.mask.sharding.spec == P(rows, None)
    assert batch_sharding(mesh).spec == P(rows)


def test_what_an_axis_does_not_divide_lies_whole_on_it():
    mesh = make_mesh(1, 2, 1, 4)
    got = specs(mesh, jax.eval_shape(tiny("llama-gqa", vocab_size=19, tied=False).init, jax.random.key(0)))
    assert got["blocks/attention/query/kernel"] == P(None, "fsdp", "tensor", None)
    assert got["blocks/attention/key/kernel"] == P(None, "fsdp", None, None)  # two heads on four devices
    assert got["embed/embedding"] == P(None, ("fsdp", "tensor"))  # 19 words
    assert got["unembed/kernel"] == P(("fsdp", "tensor"), None)
    for spec, shape in ((got[name], leaf.shape) for name, leaf in leaves_of(tiny("llama-gqa", vocab_size=19))):
        NamedSharding(mesh, spec).shard_shape(shape)  # raises where it does not divide


def leaves_of(model):
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(model.init, jax.random.key(0)))
    return [(path_name(path), leaf) for path, leaf in flat]
