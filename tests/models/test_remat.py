"""What is kept for the backward pass changes memory, and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, random_tokens, tiny

from rlhfjax.models.remat import POLICIES

POLICY_NAMES = ("none", *POLICIES)


def program(remat, **style):
    """Loss and gradients of a decoder whose feed-forward blocks are its largest part, compiled."""
    model = tiny(layers=4, width=32, mlp_width=192, context=64, remat=remat, attention="xla", **style)
    tokens, ones = random_tokens(8, 64), jnp.ones((8, 64), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(64)[None, :], (8, 64))
    params = params_of(model, std=0.2)
    run = jax.jit(jax.value_and_grad(lambda params: jnp.square(model.hidden(params, tokens, positions, ones)).mean()))
    return run.trace(params), params


@pytest.fixture(scope="module")
def programs():
    traced = {name: program(name) for name in POLICY_NAMES}
    return {name: (trace, trace.lower().compile(), params) for name, (trace, params) in traced.items()}


@pytest.mark.parametrize("name", list(POLICIES))
def test_gradients_are_those_without_it(programs, name):
    plainly, plain, params = programs["none"]
    trace, compiled, _ = programs[name]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), compiled(params), plain(params))
    assert str(trace.jaxpr).count("remat") > str(plainly.jaxpr).count("remat")  # norms and gates always are


def test_each_keeps_less_than_the_one_before(programs):
    # fails when a policy keeps nothing, or when a name is no longer where attention is
    sizes = [
        programs[name][1].memory_analysis().temp_size_in_bytes
        for name in ("none", "dots", "attention", "halves", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] > 1.2 * sizes[2] > 1.2 * 1.1 * sizes[4]


def test_halves_keep_the_stream_twice_a_layer(programs):
    # arrays [layers, rows, tokens, width] that the loop over layers hands to that of the backward pass
    stacks = {name: _stacks(programs[name][0].jaxpr.jaxpr, (4, 8, 64, 32)) for name in ("halves", "full")}
    assert stacks == {"halves": 2, "full": 1}


def _stacks(jaxpr, shape):
    first = next(one for one in jaxpr.eqns if one.primitive.name == "scan" and one.params["length"] == 4)
    return sum(out.aval.shape == shape for out in first.outvars)


def test_what_is_offloaded_goes_to_the_host_and_comes_back(programs):
    text = str(programs["offload"][0].jaxpr)
    assert "pinned_host" in text or "Host" in text
    assert "pinned_host" not in str(programs["attention"][0].jaxpr)
