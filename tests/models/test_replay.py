"""Routes that were recorded are followed, against a plain loop over tokens; what would go elsewhere is counted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHAPE, params_of, random_tokens

from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.experts import replayed, rerouted
from rlhfjax.types import TokenBatch

ROWS, LENGTH, LAYERS, EXPERTS, PER_TOKEN = 3, 7, 2, 4, 2
MODEL = LanguageModel(decoder_config("mixtral", **SHAPE, kv_heads=2, experts=EXPERTS))


def batch(routes=None):
    tokens = random_tokens(ROWS, LENGTH)
    segments = np.broadcast_to(np.int32(1), tokens.shape)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return TokenBatch(tokens, segments, positions, segments > 0, routes=routes)


def random_routes(seed=0):
    rng = np.random.default_rng(seed)
    each = [rng.permutation(EXPERTS)[:PER_TOKEN] for _ in range(ROWS * LENGTH * LAYERS)]
    return np.int16(each).reshape(ROWS, LENGTH, LAYERS, PER_TOKEN)


@pytest.mark.parametrize("norm_topk", [True, False])
def test_weights_of_recorded_experts_are_the_routers_own_at_these(norm_topk):
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 1.0, (ROWS, LENGTH, EXPERTS)).astype(np.float32)
    recorded, own = random_routes()[:, :, 0], np.int32([[[0, 1]] * LENGTH] * ROWS)
    recorded[1, 2] = -1  # not known: the router chooses
    weights, chosen = replayed(jax.nn.softmax(logits), own, recorded, norm_topk)
    for place in np.ndindex(ROWS, LENGTH):
        experts = own[place] if place == (1, 2) else recorded[place]
        p = np.exp(logits[place]) / np.exp(logits[place]).sum()
        wanted = p[experts] / (p[experts].sum() if norm_topk else 1.0)
        np.testing.assert_array_equal(chosen[place], experts)
        np.testing.assert_allclose(weights[place], wanted, rtol=1e-5)


def test_other_experts_are_counted_in_whatever_order():
    own = jnp.asarray([[[0, 1], [0, 1], [0, 1], [2, 3]]])
    got = rerouted(own, jnp.asarray([[[0, 1], [1, 0], [0, 2], [-1, -1]]]))
    np.testing.assert_array_equal(got, [[0.0, 0.0, 1.0, -1.0]])


def forced(params, routes):
    """Parameters whose routers choose these experts for every token, and weigh them as they did."""
    experts = params["blocks"]["experts"]
    picked = np.full((LAYERS, EXPERTS), -1e4, np.float32)
    for layer in range(LAYERS):
        picked[layer, routes[layer]] = 0.0
    kernel = experts["router"]["kernel"]
    return params | {"blocks": params["blocks"] | {"experts": experts | {"router": {"kernel": kernel, "bias": picked}}}}


def test_hidden_states_follow_the_routes():
    # A router with a bias of -10,000 for all but two experts chooses these: the same as routes that say so.
    biased = LanguageModel(replace(MODEL.config, biases=True))
    params = params_of(biased)
    router = params["blocks"]["experts"]["router"]
    free = params | {
        "blocks": params["blocks"]
        | {"experts": params["blocks"]["experts"] | {"router": router | {"bias": jnp.zeros((LAYERS, EXPERTS))}}}
    }
    pairs = [(0, 3), (2, 1)]
    routes = np.broadcast_to(np.int16(pairs), (ROWS, LENGTH, LAYERS, PER_TOKEN))
    run = jax.jit(biased.batch_hidden)
    wanted = run(forced(params, pairs), batch())
    got = run(free, batch(routes))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(run(free, batch()) - wanted)).max() > 0.01


def test_a_models_own_routes_change_nothing_and_none_is_counted():
    params = params_of(MODEL)
    unknown = np.full((ROWS, LENGTH, LAYERS, PER_TOKEN), -1, np.int16)
    run = jax.jit(MODEL.batch_hidden)
    np.testing.assert_array_equal(run(params, batch(unknown)), run(params, batch()))
    count = jax.jit(MODEL.rerouted)
    np.testing.assert_array_equal(count(params, batch(unknown)), np.full((ROWS, LENGTH), -1.0))
    shares = np.asarray(count(params, batch(random_routes())))
    assert set(np.unique(shares)) <= {0.0, 0.5, 1.0}
    # Two of four experts at random are those that were chosen in one case of six.
    assert 0.6 < shares.mean() < 0.98


def test_gradients_of_the_router_are_of_the_weights_at_the_routes():
    params, routes = params_of(MODEL), random_routes()

    def total(params, routes):
        return MODEL.batch_hidden(params, batch(routes)).sum()

    grads = jax.jit(jax.grad(total))(params, routes)["blocks"]["experts"]
    assert np.abs(np.asarray(grads["router"]["kernel"])).max() > 0
    alone = np.broadcast_to(np.int16([1, 2]), routes.shape)
    grads = jax.jit(jax.grad(total))(params, alone)["blocks"]["experts"]
    of_each = np.abs(np.asarray(grads["down"]["kernel"])).max(axis=(0, 2, 3))
    assert (of_each[[1, 2]] > 0).all()
    assert not of_each[[0, 3]].any()
