"""Adapters against sums written out by hand, and what is trained of a model and what is not."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import STYLES, params_of, random_tokens, random_tree, right_mask, scalar_params_of, tiny

from rlhfjax.config import schema, shape
from rlhfjax.errors import ConfigError
from rlhfjax.models.lora import has_adapters, init_lora, join, linears, merge, split
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.sharding.rules import path_name
from rlhfjax.stages.models import new_model

RANK, ALPHA = 3, 6.0
TOKENS, MASK = random_tokens(3, 9), right_mask([9, 4, 7], 9)
# Per layer: A reads i, B writes o; attention's output reads heads and their dimensions.
SUMS = {"query": "dr,rhk->dhk", "key": "dr,rhk->dhk", "value": "dr,rhk->dhk", "out": "hkr,rd->hkd"}


def adapters_of(params, targets=(".",), seed=5, std=0.2):
    """Adapters whose A and B are nowhere 0."""
    shapes = jax.eval_shape(lambda key: init_lora(key, params, RANK, targets), jax.random.key(0))
    return random_tree(shapes, seed, std)


def merged_by_hand(params, adapters):
    """W + (α/r) A·B, layer by layer and linear by linear, in float64."""
    merged = jax.tree.map(np.asarray, params)
    for block, own in adapters["blocks"].items():
        for name, leaves in own.items():
            a, b = (np.asarray(leaves[leaf], np.float64) for leaf in ("lora_a", "lora_b"))
            update = np.stack([np.einsum(SUMS.get(name, "ir,ro->io"), *pair) for pair in zip(a, b, strict=True)])
            kernel = merged["blocks"][block][name]["kernel"]
            merged["blocks"][block][name]["kernel"] = (kernel + ALPHA / RANK * update).astype(np.float32)
    return merged


@pytest.mark.parametrize("style", STYLES)
def test_adapters_add_their_scaled_product_to_every_matrix(style):
    # meant to catch a scale of alpha or 1/r alone, an adapter that is not read, and heads that are mixed up
    model = tiny(style, lora_alpha=ALPHA)
    params = params_of(model, std=0.2)
    adapters = adapters_of(params)
    whole = join(params, adapters)
    by_hand, logits = merged_by_hand(params, adapters), jax.jit(model.logits)
    wanted = logits(by_hand, TOKENS, MASK)
    np.testing.assert_allclose(logits(whole, TOKENS, MASK), wanted, atol=1e-5, rtol=1e-4)
    assert np.abs(wanted - logits(params, TOKENS, MASK)).max() > 0.1
    merged = jax.jit(merge, static_argnums=1)(whole, ALPHA)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for got, leaf in zip(jax.tree.leaves(merged), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(got, leaf, atol=1e-6)
    np.testing.assert_allclose(logits(merged, TOKENS, MASK), wanted, atol=1e-5, rtol=1e-4)


def test_decoding_with_a_cache_reads_the_adapters_too():
    model = tiny(lora_alpha=ALPHA)
    params = params_of(model, std=0.2)
    params = join(params, adapters_of(params))
    tokens = random_tokens(2, 6, seed=1)

    @jax.jit
    def both(params):
        first, cache = model.prefill(params, tokens[:, :5], jnp.ones((2, 5), bool), new_tokens=1)
        straight = model.logits(params, tokens, jnp.ones((2, 6), bool))
        return jnp.stack([first, model.decode(params, cache, tokens[:, 5])[0]], axis=1), straight

    decoded, straight = both(params)
    np.testing.assert_allclose(decoded, straight[:, 4:], atol=1e-4)


def test_fresh_adapters_change_nothing_and_can_learn():
    model = tiny()
    params = params_of(model, std=0.2)
    fresh = init_lora(jax.random.key(3), params, 4, ["attention/(query|out)", "mlp"])
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(logits(join(params, fresh), TOKENS, MASK), logits(params, TOKENS, MASK))
    # Where B is 0, A has no gradient yet and B has one: the first step moves B.
    grads = jax.jit(jax.grad(lambda p: model.logits(join(params, p), TOKENS, MASK)[..., 0].sum()))(fresh)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert (np.abs(gradient).max() > 0) == path_name(path).endswith("lora_b"), path_name(path)
    # U(-b, b) with b = 1/sqrt(inputs): 16 for query, 4 heads of 4 for out, 48 for down; 2 layers are two draws.
    for name, block, inputs in (("query", "attention", 16), ("out", "attention", 16), ("down", "mlp", 48)):
        a = np.asarray(fresh["blocks"][block][name]["lora_a"])
        assert 0.8 < np.abs(a).max() * inputs**0.5 <= 1.0
        assert np.var(a) * inputs == pytest.approx(1 / 3, rel=0.35)
        assert not np.array_equal(a[0], a[1])
    drawn = {np.asarray(leaf["lora_a"]).ravel()[0].item() for leaf in fresh["blocks"]["mlp"].values()}
    assert len(drawn) == 3


def test_what_is_trained_are_adapters_and_the_scalar_head():
    model = tiny("gpt2")
    params = scalar_params_of(model)
    adapters = adapters_of(params, ["query"])
    whole = join(params, adapters)
    frozen, trained = split(whole)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    query = "decoder/blocks/attention/query"
    assert names == [f"{query}/lora_a", f"{query}/lora_b", "head/bias", "head/kernel"]
    assert jax.tree.structure(frozen) == jax.tree.structure({"decoder": params["decoder"]})
    again = join(frozen, trained)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True))


def test_of_a_model_without_adapters_everything_is_trained():
    params = scalar_params_of(tiny())
    frozen, trained = split(params)
    assert frozen == {}
    assert trained is params
    assert join(frozen, trained) is params
    assert not has_adapters(params)
    assert merge(params, ALPHA).keys() == params.keys()


def test_a_pattern_that_matches_nothing_names_the_linears():
    params = params_of(tiny(tied=False))
    with pytest.raises(ConfigError, match=r"'attn/q'.*its linears are .*blocks/attention/query.*blocks/mlp/up$"):
        init_lora(jax.random.key(0), params, 2, ["mlp", "attn/q"])
    assert "unembed" not in linears(params)


@pytest.mark.parametrize("family", get_args(schema.Model.model_fields["family"].annotation))
def test_the_configuration_knows_the_linears_of_every_family(family):
    settings = schema.Model(
        family=family, layers=2, width=16, heads=2, context=16, lora={"rank": RANK, "targets": ["."]}
    )
    params = jax.eval_shape(new_model(settings, 32).init, jax.random.key(0))
    assert shape.linears(shape.model_shape(settings)).keys() == linears(params).keys()
    adapters = jax.eval_shape(lambda key: init_lora(key, params, RANK, ["."]), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert settings.lora is not None
    assert shape.adapter_count(shape.model_shape(settings), settings.lora) == count


def test_adapters_lie_as_their_kernels():
    model = tiny("llama")
    params = scalar_params_of(model)
    shapes = {"value": join(params, adapters_of(params))}
    placed = jax.tree_util.tree_leaves_with_path(state_shardings(make_mesh(2, 2, 1, 2), shapes))
    got = {path_name(path).split("blocks/")[-1]: sharding.spec for path, sharding in placed}
    for name in ("query", "key", "value"):
        assert got[f"attention/{name}/lora_a"] == P(None, "fsdp", None)
        assert got[f"attention/{name}/lora_b"] == P(None, None, "tensor", None)
    assert got["attention/out/lora_a"] == P(None, "tensor", None, None)
    assert got["attention/out/lora_b"] == P(None, None, "fsdp")
    assert got["mlp/up/lora_a"] == got["mlp/gate/lora_a"] == P(None, "fsdp", None)
    assert got["mlp/up/lora_b"] == got["mlp/gate/lora_b"] == P(None, None, "tensor")
    assert got["mlp/down/lora_a"] == P(None, "tensor", None)
    assert got["mlp/down/lora_b"] == P(None, None, "fsdp")
    with pytest.raises(ConfigError, match="no rule for parameter 'blocks/mixer/lora_a' with 3 axes"):
        state_shardings(make_mesh(), {"blocks": {"mixer": {"lora_a": jnp.zeros((2, 4, 4))}}})
