"""Int8 parameters: how far each element may be off, what that may do to logits, and what is left as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, random_tokens, tiny

from rlhfjax.models.lora import init_lora, join, merge
from rlhfjax.models.quantized import dequantize, is_quantized, quantize, quantize_array

TOKENS = random_tokens(2, 6)
MASK = jnp.ones(TOKENS.shape, bool)


def test_no_element_is_off_by_more_than_half_a_step():
    # meant to catch truncation, a scale of the wrong axis, and -128, whose negative does not exist
    x = np.random.default_rng(0).standard_t(3, (5, 40, 7)).astype(np.float32)
    x[:, :, 3] = 0.0
    quantized, scale = quantize_array(jnp.asarray(x), 1)
    assert quantized.dtype == jnp.int8
    assert np.abs(np.asarray(quantized, int)).max(axis=1).tolist() == [[127, 127, 127, 0, 127, 127, 127]] * 5
    np.testing.assert_allclose(scale[:, 0], np.where(np.arange(7) == 3, 1.0, np.abs(x).max(axis=1) / 127), rtol=1e-6)
    error = np.abs(x - np.asarray(quantized, np.float32) * np.asarray(scale))
    assert (error <= 0.5 * np.asarray(scale) * (1 + 1e-5)).all()
    assert error.max() > 0.4 * np.asarray(scale).min()  # and the bound is not an idle one


@pytest.mark.parametrize("style", ["gpt2-gqa", "llama-gqa", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_is_the_model_of_the_rounded_matrices(style, tied):
    """To the rounding of sums: meant to catch a scale at the wrong output, a bias that is scaled, heads mixed up."""
    model = tiny(style, tied=tied, kv_heads=2)
    params = params_of(model, seed=1)
    quantized = quantize(params)
    rounded = dequantize(quantized)
    assert jax.tree.structure(rounded) == jax.tree.structure(params)
    got, wanted = model.logits(quantized, TOKENS, MASK), model.logits(rounded, TOKENS, MASK)
    assert jnp.abs(wanted - model.logits(params, TOKENS, MASK)).max() > 1e-2  # rounding matters
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_logits_move_by_no_more_than_the_steps_allow():
    """|Δ logit| <= Σ over elements |d logit / d W| · s / 2 to first order; small matrices keep higher ones small."""
    model = tiny("llama-gqa", layers=1)
    params = params_of(model, seed=2, std=0.1)
    quantized = quantize(params)
    change = jax.tree.map(lambda a, b: a - b, dequantize(quantized), params)
    jacobian = jax.jacrev(lambda p: model.logits(p, TOKENS[:1], MASK[:1])[0, -1])(params)
    steps = {"kernel": 0.5, "embedding": 0.5}
    bound = np.zeros(16)
    for path, slope in jax.tree_util.tree_leaves_with_path(jacobian):
        owner = quantized
        for entry in path[:-1]:
            owner = owner[entry.key]
        name = path[-1].key
        step = np.broadcast_to(np.asarray(owner.get(name + "_scale", 0.0)) * steps.get(name, 0.0), slope.shape[1:])
        bound += (np.abs(np.asarray(slope)) * step).reshape(16, -1).sum(axis=1)
    moved = model.logits(quantized, TOKENS[:1], MASK[:1])[0, -1] - model.logits(params, TOKENS[:1], MASK[:1])[0, -1]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(change)) > 0
    assert (np.abs(moved) <= 1.1 * bound).all()
    assert (np.abs(moved) > 1e-3 * bound).any()


def test_bytes_of_the_quantised_tree():
    # two layers of width 16, 4 heads of 4 and 2 of keys and values, 64 inside; 16 tokens, in and out
    matrices = 2 * (16 * (16 + 8 + 8 + 16) + 2 * 16 * 64) + 2 * 16 * 16
    scales = 2 * (16 + 8 + 8 + 16 + 64 + 16) + 2 * 16
    params = params_of(tiny("gpt2-gqa", tied=False))
    full, small = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, quantize(params)))
    assert full - small == 3 * matrices - 4 * scales


def test_layers_may_be_stacked_or_apart():
    model = tiny("llama-gqa")
    params = params_of(model, seed=4)
    together = quantize(params)["blocks"]
    for layer in range(2):
        apart = quantize({f"layer_{layer}": jax.tree.map(lambda x, i=layer: x[i], params["blocks"])})
        wanted = jax.tree.map(lambda x, i=layer: x[i], together)
        jax.tree.map(np.testing.assert_array_equal, apart[f"layer_{layer}"], wanted)


def test_adapters_stay_beside_an_int8_base_or_are_merged_before():
    model = tiny("llama-gqa")
    base = params_of(model, seed=5)
    fresh = init_lora(jax.random.key(0), base, 2, ["query", "out", "down"])
    params = join(base, jax.tree.map(lambda x: x + 0.1, fresh))
    beside = quantize(params)
    assert beside["blocks"]["attention"]["query"]["lora_a"].dtype == jnp.float32
    got, wanted = model.logits(beside, TOKENS, MASK), model.logits(dequantize(beside), TOKENS, MASK)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    merged = quantize(merge(params, model.config.lora_alpha))
    full = model.logits(params, TOKENS, MASK)
    assert jnp.abs(model.logits(merged, TOKENS, MASK) - full).mean() < 0.05 * jnp.abs(full).mean()


def test_what_is_small_or_routes_stays():
    model = tiny("llama-gqa", experts=2, experts_per_token=1, mtp_heads=1)
    params = params_of(model)
    quantized = quantize(params)
    assert quantized["blocks"]["experts"] is params["blocks"]["experts"]
    assert quantized["mtp_heads"] is params["mtp_heads"]
    assert quantized["final_norm"]["scale"] is params["final_norm"]["scale"]
    assert is_quantized(quantized)
    assert not is_quantized(params)
