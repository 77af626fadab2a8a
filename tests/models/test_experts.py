"""Experts against a plain loop over tokens, a drop case worked by hand, and what mixtures are not allowed to change."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHAPE, params_of, random_tokens

from rlhfjax.functional import load_balancing_loss, max_load, router_z_loss
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.experts import bounded, capacity, dropless, route, routing_of
from rlhfjax.models.interface import positions_of

ROWS, LENGTH, WIDTH, INNER, EXPERTS, PER_TOKEN = 3, 7, 6, 5, 4, 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.0, 1.0, shape).astype(np.float32)


X = normal(ROWS, LENGTH, WIDTH)
LOGITS = normal(ROWS, LENGTH, EXPERTS, seed=1) * 2
KERNELS = (
    normal(EXPERTS, WIDTH, INNER, seed=2),
    normal(EXPERTS, WIDTH, INNER, seed=3),
    normal(EXPERTS, INNER, WIDTH, seed=4),
)
REAL = np.arange(LENGTH) < np.array([LENGTH, 4, 1])[:, None]


def silu(g, u):
    return g / (1 + np.exp(-g)) * u


def clamped(g, u):
    g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
    return g / (1 + np.exp(-1.702 * g)) * (u + 1)


def loop(x, logits, kernels, norm_topk, kept=None, activation=silu):
    """One token and one expert at a time, float64."""
    gate, up, down = (kernel.astype(np.float64) for kernel in kernels[:3])
    biases = kernels[3:] or [np.zeros((EXPERTS, 1))] * 3
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        p = np.exp(logits[place].astype(np.float64))
        p /= p.sum()
        best = np.argsort(-p)[:PER_TOKEN]
        total = p[best].sum() if norm_topk else 1.0
        for rank, expert in enumerate(best):
            if kept is None or kept[(*place, rank)]:
                g, u = x[place] @ gate[expert] + biases[0][expert], x[place] @ up[expert] + biases[1][expert]
                out[place] += p[expert] / total * (activation(g, u) @ down[expert] + biases[2][expert])
    return out


@pytest.mark.parametrize("norm_topk", [True, False])
def test_dropless_is_the_loop_over_tokens_and_experts(norm_topk):
    weights, chosen = route(jnp.asarray(LOGITS), PER_TOKEN, norm_topk)
    got = jax.jit(dropless)(X, weights, chosen, KERNELS)
    np.testing.assert_allclose(got, loop(X, LOGITS, KERNELS, norm_topk), rtol=1e-4, atol=1e-5)


def test_experts_with_biases_and_a_clamped_gate_are_the_loop_both_ways():
    # kernels so large that the clamps hold; fails without them, or with the bias of another expert
    large = tuple(8 * kernel for kernel in KERNELS[:2]) + KERNELS[2:]
    kernels = large + tuple(normal(EXPERTS, size, seed=5 + i) for i, size in enumerate((INNER, INNER, WIDTH)))
    weights, chosen = route(jnp.asarray(LOGITS), PER_TOKEN, True)
    wanted = loop(X, LOGITS, kernels, True, activation=clamped)
    np.testing.assert_allclose(dropless(X, weights, chosen, kernels, "clamped_swiglu"), wanted, rtol=1e-4, atol=1e-4)
    room = jnp.ones_like(REAL), kernels, LENGTH, "clamped_swiglu"
    np.testing.assert_allclose(bounded(X, weights, chosen, *room)[0], wanted, rtol=1e-4, atol=1e-4)


def test_one_expert_may_get_every_token_and_others_none():
    logits = np.broadcast_to(np.float32([3.0, -1.0, 1.0, -2.0]), (ROWS, LENGTH, EXPERTS))
    weights, chosen = route(jnp.asarray(logits), PER_TOKEN, True)
    np.testing.assert_allclose(
        dropless(X, weights, chosen, KERNELS), loop(X, logits, KERNELS, True), rtol=1e-4, atol=1e-5
    )


def test_bounded_with_room_for_all_is_dropless_in_value_and_gradient():
    assert capacity(1e9, LENGTH, EXPERTS, PER_TOKEN) == LENGTH

    def total(way, x, logits, kernels):
        weights, chosen = route(logits, PER_TOKEN, True)
        if way == "dropless":
            out, dropped = dropless(x, weights, chosen, kernels), jnp.float32(0.0)
        else:
            out, dropped = bounded(x, weights, chosen, jnp.ones_like(REAL), kernels, LENGTH)
        return (out * normal(*X.shape, seed=9)).sum(), (out, dropped)

    results = [
        jax.value_and_grad(lambda *args, way=way: total(way, *args), argnums=(0, 1, 2), has_aux=True)(
            jnp.asarray(X), jnp.asarray(LOGITS), tuple(map(jnp.asarray, KERNELS))
        )
        for way in ("dropless", "bounded")
    ]
    assert results[1][0][1][1] == 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


# Six tokens, three experts, two choices each, two slots an expert; the third token is padding. In the order of service:
# first choices  0:a 1:a 3:a(full) 4:b 5:b   second choices  0:b(full) 1:c 3:c 4:c(full) 5:a(full)
CHOSEN = np.array([[[0, 1], [0, 2], [0, 1], [0, 2], [1, 2], [1, 0]]])
KEPT = np.array([[[1, 0], [1, 1], [0, 0], [0, 1], [1, 0], [1, 0]]], bool)


def worked():
    logits = np.full((1, 6, 3), -4.0, np.float32)
    np.put_along_axis(logits, CHOSEN[..., :1], 1.0, axis=-1)
    np.put_along_axis(logits, CHOSEN[..., 1:], 0.5, axis=-1)
    real = np.array([[True, True, False, True, True, True]])
    return logits, real, normal(1, 6, WIDTH, seed=5), tuple(kernel[:3] for kernel in KERNELS)


def test_what_is_over_capacity_is_dropped_in_the_order_of_choices_and_tokens():
    # fails when padding takes slots, and when a token's second choice is served before another's first
    logits, real, x, kernels = worked()
    weights, chosen = route(jnp.asarray(logits), PER_TOKEN, True)
    np.testing.assert_array_equal(chosen, CHOSEN)
    out, dropped = bounded(x, weights, chosen, real, kernels, 2)
    assert dropped == 4.0
    np.testing.assert_allclose(out, loop(x, logits, kernels, True, KEPT), rtol=1e-4, atol=1e-5)
    assert not out[0, 2].any()


def test_no_row_takes_slots_of_another():
    logits, real, x, kernels = worked()
    weights, chosen = route(jnp.asarray(np.concatenate([logits, LOGITS[:1, :6, :3]])), PER_TOKEN, True)
    rows = np.concatenate([x, X[:1, :6]]), np.concatenate([real, real])
    both, _ = bounded(rows[0], weights, chosen, rows[1], kernels, 2)
    alone, _ = bounded(x, weights[:1], chosen[:1], real, kernels, 2)
    np.testing.assert_allclose(both[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("factor", "slots"), [(1.0, 4), (1.25, 5), (0.1, 1), (2.0, 7)])
def test_capacity(factor, slots):
    # 2 x 7 assignments over 4 experts are 3.5 each
    assert capacity(factor, LENGTH, EXPERTS, PER_TOKEN) == slots


def test_padding_does_not_count():
    logits, chosen = jnp.asarray(LOGITS), route(jnp.asarray(LOGITS), PER_TOKEN, True)[1]
    got = routing_of(logits, chosen, jnp.asarray(REAL), jnp.float32(0.0))
    kept = LOGITS[REAL]
    p = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    counts = np.bincount(np.argsort(-kept)[:, :PER_TOKEN].ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(got.assigned, counts)
    np.testing.assert_allclose(got.probabilities, p.sum(0), rtol=1e-5)
    np.testing.assert_allclose(got.squared_z, (np.log(np.exp(kept).sum(-1)) ** 2).sum(), rtol=1e-5)
    assert float(got.tokens) == REAL.sum() == 12


def test_the_balancing_loss_makes_a_toy_balanced():
    # The router starts with a bias that no token's content explains: nearly everything goes to expert 0.
    x = jnp.asarray(normal(1, 64, WIDTH, seed=6))
    router = jnp.asarray(normal(WIDTH, EXPERTS, seed=7) * 0.1)
    bias = jnp.asarray([3.0, 1.0, 0.0, 0.0])[None, None, :]

    def loss(router, bias):
        logits = x @ router + bias
        chosen = route(logits, PER_TOKEN, True)[1]
        r = routing_of(logits, chosen, jnp.ones(x.shape[:2], bool), jnp.float32(0.0))
        return load_balancing_loss(r.assigned, r.probabilities, r.tokens), max_load(r.assigned)

    (first, load), step = loss(router, bias), jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    assert load > 1.9
    for _ in range(60):
        router, bias = jax.tree.map(lambda w, g: w - 0.5 * g, (router, bias), step(router, bias)[0])
    last, after = loss(router, bias)
    assert after < 1.3
    assert PER_TOKEN <= last < first - 0.5


def test_losses_of_perfect_balance_and_of_one_favourite():
    even = jnp.full((2, EXPERTS), 6.0)
    np.testing.assert_allclose(load_balancing_loss(even, even / 2, jnp.full((2,), 12.0)), 2.0, rtol=1e-6)
    np.testing.assert_allclose(max_load(even), 1.0)
    one = jnp.asarray([[12.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(load_balancing_loss(one, one, jnp.full((1,), 12.0)), EXPERTS, rtol=1e-6)
    np.testing.assert_allclose(max_load(one), EXPERTS)
    np.testing.assert_allclose(router_z_loss(jnp.asarray([8.0, 4.0]), jnp.asarray([2.0, 2.0])), 3.0)


@pytest.fixture(scope="module")
def model():
    routed = {"experts": EXPERTS, "capacity_factor": 0.5, "remat": "full"}
    return LanguageModel(decoder_config("mixtral", **SHAPE, kv_heads=2, **routed))


def test_a_model_drops_tokens_in_training_alone(model):
    params, tokens, mask = params_of(model), random_tokens(ROWS, LENGTH), jnp.asarray(REAL)
    inputs = params, tokens, positions_of(mask), mask.astype(jnp.int32)
    free = LanguageModel(replace(model.config, capacity_factor=None))
    wanted = jax.jit(free.hidden)(*inputs)
    np.testing.assert_array_equal(jax.jit(model.hidden)(*inputs), wanted)
    hidden, routing = jax.jit(free.hidden_and_routing)(*inputs)
    np.testing.assert_allclose(hidden, wanted, rtol=1e-5, atol=1e-5)
    assert not routing.dropped.any()
    hidden, routing = jax.jit(model.hidden_and_routing)(*inputs)
    assert float(routing.dropped.min()) > 0
    assert np.abs(hidden - wanted).max() > 0.01
    np.testing.assert_array_equal(routing.assigned.sum(axis=-1), [REAL.sum() * PER_TOKEN] * 2)


def test_cached_decoding_and_padding_change_nothing(model):
    params, tokens = params_of(model), random_tokens(2, 8)
    wanted = jax.jit(model.logits)(params, tokens, jnp.ones((2, 8), bool))
    padded = jnp.pad(tokens, ((0, 0), (3, 2)))
    mask = jnp.pad(jnp.ones((2, 8), bool), ((0, 0), (3, 2)))
    np.testing.assert_allclose(jax.jit(model.logits)(params, padded, mask)[:, 3:-2], wanted, rtol=1e-4, atol=1e-4)
    logits, cache = jax.jit(model.prefill, static_argnums=3)(params, padded[:, :8], mask[:, :8], 3)
    decode = jax.jit(model.decode)
    for step in range(5, 8):
        np.testing.assert_allclose(logits, wanted[:, step - 1], rtol=1e-4, atol=1e-4)
        logits, cache = decode(params, cache, tokens[:, step])
    np.testing.assert_allclose(logits, wanted[:, -1], rtol=1e-4, atol=1e-4)


def test_rows_can_be_mapped():
    # fails with `ragged_dot` as it is: it is not implemented for one factor mapped and the other not
    weights, chosen = route(jnp.asarray(LOGITS), PER_TOKEN, True)
    one_by_one = jax.vmap(dropless, in_axes=(0, 0, 0, None))(X, weights, chosen, KERNELS)
    np.testing.assert_allclose(one_by_one, dropless(X, weights, chosen, KERNELS), rtol=1e-5, atol=1e-6)
