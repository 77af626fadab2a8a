"""Int8 parameters: how far each element may be off, what that may do to logits, and what is left as it is."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models.lora import init_lora, join, merge
from rlhfjax.models.quantized import dequantize, int8_dot, is_quantized, quantize, quantize_array
from rlhfjax.target import building_for, machine
from rlhfjax.types import PromptBatch

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
    logits = jax.jit(model.logits)
    got, wanted = logits(quantized, TOKENS, MASK), logits(rounded, TOKENS, MASK)
    assert jnp.abs(wanted - logits(params, TOKENS, MASK)).max() > 1e-2  # rounding matters
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_logits_move_by_no_more_than_the_steps_allow():
    """|Δ logit| <= Σ over elements |d logit / d W| · s / 2 to first order; small matrices keep higher ones small."""
    model = tiny("llama-gqa", layers=1)
    params = params_of(model, seed=2, std=0.1)
    quantized = quantize(params)
    change = jax.tree.map(lambda a, b: a - b, dequantize(quantized), params)
    jacobian = jax.jit(jax.jacrev(lambda p: model.logits(p, TOKENS[:1], MASK[:1])[0, -1]))(params)
    steps = {"kernel": 0.5, "embedding": 0.5}
    bound = np.zeros(16)
    for path, slope in jax.tree_util.tree_leaves_with_path(jacobian):
        owner = quantized
        for entry in path[:-1]:
            owner = owner[entry.key]
        name = path[-1].key
        step = np.broadcast_to(np.asarray(owner.get(name + "_scale", 0.0)) * steps.get(name, 0.0), slope.shape[1:])
        bound += (np.abs(np.asarray(slope)) * step).reshape(16, -1).sum(axis=1)
    logits = jax.jit(model.logits)
    moved = logits(quantized, TOKENS[:1], MASK[:1])[0, -1] - logits(params, TOKENS[:1], MASK[:1])[0, -1]
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
    logits = jax.jit(model.logits)
    got, wanted = logits(beside, TOKENS, MASK), logits(dequantize(beside), TOKENS, MASK)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    merged = quantize(merge(params, model.config.lora_alpha))
    full = logits(params, TOKENS, MASK)
    assert jnp.abs(logits(merged, TOKENS, MASK) - full).mean() < 0.05 * jnp.abs(full).mean()


def test_what_is_small_or_routes_stays():
    model = tiny("llama-gqa", experts=2, experts_per_token=1, mtp_heads=1)
    params = params_of(model)
    quantized = quantize(params)
    assert quantized["blocks"]["experts"] is params["blocks"]["experts"]
    assert quantized["mtp_heads"] is params["mtp_heads"]
    assert quantized["final_norm"]["scale"] is params["final_norm"]["scale"]
    assert is_quantized(quantized)
    assert not is_quantized(params)


# A cache of int8 ------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 3, 4))
def continued(model, params, tokens, start, cut):
    """Logits after each token from `start` on, the first `cut` of these read one by one and the rest at once."""
    prompt = tokens[:, :start]
    weights = model.arrange(params)
    logits, cache = model.prefill(weights, prompt, jnp.ones(prompt.shape, bool), tokens.shape[1] - start)
    said = [logits]
    for slot in range(start, start + cut):
        logits, cache = model.decode(weights, cache, tokens[:, slot])
        said.append(logits)
    said = jnp.stack(said, axis=1)
    if start + cut == tokens.shape[1]:
        return said, cache
    rest = tokens[:, start + cut :]
    hidden, cache = model.extend(weights, cache, rest, jnp.full(len(tokens), rest.shape[1], jnp.int32))
    return jnp.concatenate([said, model.unembed(weights, hidden)], axis=1), cache


@pytest.mark.parametrize("style", ["gpt2-gqa", "gemma3"])
def test_an_int8_cache_holds_what_it_says_and_reads_what_it_holds(style):
    """The same logits whatever was read in one call; near those of the full cache; a quarter of its bytes."""
    model, tokens = tiny(style, head_dim=8), random_tokens(2, 9, seed=3)
    params = params_of(model, seed=6)
    small = replace(model, precision="int8_cache")
    full, whole = continued(model, params, tokens, 3, 2)
    first, cache = continued(small, params, tokens, 3, 2)
    second, _ = continued(small, params, tokens, 5, 4)
    np.testing.assert_allclose(first[:, 2:], second, rtol=1e-4, atol=1e-4)
    for kept, exact in ((cache.keys, whole.keys), (cache.values, whole.values)):
        # of the first layer, whose input is the same with both
        error = jnp.abs(kept[0].integers.astype(jnp.float32) * kept[0].scales - exact[0])
        assert (error <= 0.5 * kept[0].scales * (1 + 1e-4)).all()
        assert kept[0].integers.nbytes == exact[0].nbytes // 4
        assert kept[0].scales.nbytes == exact[0].nbytes // exact[0].shape[3]
    gap = jnp.abs(jax.nn.log_softmax(first) - jax.nn.log_softmax(full))
    assert 0 < gap.mean() < 0.05


def test_sampling_at_int8_is_near_sampling_at_full_precision():
    """The log-probability that an int8 sampler gives each of its tokens, against the model's own."""
    model = tiny("llama-gqa")
    params = params_of(model, seed=7, std=0.2)
    batch = PromptBatch(TOKENS, MASK, jnp.arange(2, dtype=jnp.int32))
    sampling, exactly = SamplingParams(max_new_tokens=8, stop_id=-1, pad_id=0), jax.jit(model.response_logits)
    for precision, most in (("full", 1e-4), ("int8_cache", 0.05), ("int8_weights", 0.05), ("int8", 0.05)):
        sampler = replace(model, precision=precision)
        run = jax.jit(lambda params, key, sampler=sampler: generate(sampler, params, batch, key, sampling))
        drawn = run(params, jax.random.key(0))
        logits = exactly(params, TOKENS, MASK, drawn.response, drawn.response_mask)
        exact = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn.response[:, :, None], axis=2)[:, :, 0]
        gap = jnp.abs(drawn.sampled_log_probs - exact).mean()
        assert gap < most
        assert precision == "full" or gap > 1e-5


def test_tpus_add_up_parts_of_a_product_in_the_type_of_the_computation():
    # fails where several devices of `tensor` would send float32, twice what a product without integers sends
    x, q, s = jnp.ones((2, 8), jnp.bfloat16), jnp.full((8, 3), 2, jnp.int8), jnp.full((1, 3), 0.5, jnp.float32)

    def product(platform):
        with building_for(replace(machine(), platform=platform)):
            traced = jax.jit(lambda x: int8_dot(x, q, s, 1, jnp.bfloat16)).trace(x)
            (dot,) = (one for one in traced.jaxpr.jaxpr.eqns if one.primitive.name == "dot_general")
            np.testing.assert_array_equal(traced.lower().compile()(x).astype(jnp.float32), 8.0)
            return dot.outvars[0].aval.dtype.name

    assert (product("tpu"), product("cpu")) == ("bfloat16", "float32")
