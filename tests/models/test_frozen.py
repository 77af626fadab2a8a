"""Frozen parameters in the type of the computation: half the bytes, and no bit of any result is another."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, random_tokens, tiny

from rlhfjax.models.frozen import in_compute_type
from rlhfjax.models.lora import init_lora, join
from rlhfjax.target import building_for, machine

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
STYLES = {
    "llama": ("llama-gqa", {"tied": False}),
    "gpt2": ("gpt2", {}),
    "gemma": ("gemma2", {}),
    "experts": ("gpt_oss", {}),
}


def half(style):
    family, changes = STYLES[style]
    model = tiny(family, **changes)
    return replace(model, config=replace(model.config, dtype="bfloat16")), params_of(model)


# fails where a norm, a router, a scaled table or learned positions are cast too
@pytest.mark.parametrize("style", STYLES)
def test_logits_keep_their_bits(style):
    model, params = half(style)
    cast = in_compute_type(model.config, params)
    run = jax.jit(lambda p: model.hidden(p, TOKENS, jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones_like(TOKENS)))
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(run(cast).astype(np.float32), run(params).astype(np.float32))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (cast, params)]
    assert sizes[0] < 0.75 * sizes[1]


def test_what_computes_in_float32_and_what_shares_its_base_stay():
    model, params = half("llama")
    whole = replace(model.config, dtype="float32")
    assert in_compute_type(whole, params) is params
    adapted = join(params, init_lora(jax.random.key(0), params, 2, ["mlp/up"]))
    assert in_compute_type(model.config, adapted) is adapted


def test_shapes_are_cast_as_arrays_are():
    model, params = half("gemma")
    shapes = in_compute_type(model.config, jax.eval_shape(lambda: params))
    arrays = in_compute_type(model.config, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), arrays)


def test_on_tpus_gradients_of_layers_are_stacked_as_products_make_them():
    whole, tokens, ones = (
        tiny(layers=3, attention="xla", remat="full"),
        random_tokens(2, 8),
        jnp.ones((2, 8), jnp.int32),
    )
    params, model = params_of(whole), replace(whole, config=replace(whole.config, dtype="bfloat16"))
    target = replace(machine(), platform="tpu", unrolled_layers=0)

    def gradient(params):
        return jax.grad(lambda p: jnp.square(model.hidden(p, tokens, ones, ones).astype(jnp.float32)).sum())(params)

    def made(target):
        with building_for(target), jax.numpy_dtype_promotion("standard"):
            traced = jax.jit(gradient).trace(params)
            backward = [one for one in traced.jaxpr.jaxpr.eqns if one.primitive.name == "scan"][-1]
            stacks = [out.aval for out in backward.outvars if out.aval.shape[:1] == (3,) and out.aval.ndim > 2]
            return {one.dtype.name for one in stacks}, traced.lower().compile()(params)

    (kernels, grads), (others, plain) = made(target), made(replace(target, platform="cpu"))
    assert (kernels, others) == ({"bfloat16"}, {"float32"})
    jax.tree.map(np.testing.assert_array_equal, grads, plain)
