"""Schedules at steps worked out by hand; AdamW and clipping in numpy; what is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import lenient, params_of, ppo_config, scalar_params_of, tiny

from rlhfjax.config.schema import Optimizer
from rlhfjax.stages.online_programs import optimizer_of
from rlhfjax.training.optimizer import learning_rate, make_optimizer

PEAK = 2e-3


def rates(steps, total=110, **settings):
    schedule = learning_rate(Optimizer(lr=PEAK, **settings), total)
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(step)) / PEAK for step in steps]


# meant to catch a warm-up from 0, a decay that ends with the warm-up's steps on top, and `final` taken for a rate
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {0: 1, 50: 1, 109: 1}),
        ({"schedule": "linear", "final": 0.0}, {0: 1, 11: 0.9, 55: 0.5, 110: 0, 500: 0}),
        ({"schedule": "linear", "final": 0.2}, {0: 1, 55: 0.6, 110: 0.2}),
        ({"schedule": "cosine", "final": 0.1}, {0: 1, 55: 0.55, 110: 0.1, 500: 0.1}),
        # 10 steps from a tenth of the peak, as InstructGPT; a quarter of the other 100 is cos(45°)
        (
            {"schedule": "constant", "warmup_steps": 10, "warmup_from": 0.1},
            {0: 0.1, 1: 0.19, 5: 0.55, 10: 1, 109: 1},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 10, "final": 0.1},
            {0: 0, 5: 0.5, 10: 1, 35: 0.1 + 0.45 * (1 + np.cos(np.pi / 4)), 60: 0.55, 110: 0.1},
        ),
        ({"schedule": "linear", "warmup_steps": 10, "final": 0.0}, {5: 0.5, 10: 1, 60: 0.5, 110: 0}),
    ],
)
def test_schedules(settings, expected):
    np.testing.assert_allclose(rates(expected, **settings), list(expected.values()), rtol=1e-5, atol=1e-7)


def test_noam_of_the_paper():
    """d = 512 and 4,000 steps of warm-up: 512^-0.5 x 4000^-1.5 at step 1, 2048000^-0.5 at its highest, then s^-0.5."""
    settings = Optimizer(lr=1.0, schedule="noam", warmup_steps=4000, b2=0.98, eps=1e-9, clip_norm=None)
    schedule = learning_rate(settings, 100_000, width=512)
    by_hand = {1: 1.7469e-7, 4000: 6.9877e-4, 16_000: 3.4939e-4, 100_000: 1.3975e-4}
    for step, rate in by_hand.items():  # the optimizer counts from 0
        assert float(schedule(step - 1)) == pytest.approx(rate, rel=1e-4)
    assert float(learning_rate(settings, 100_000, peak=2.0, width=512)(3999)) == pytest.approx(2 * 6.9877e-4, rel=1e-4)


def test_another_peak_has_the_same_shape():
    settings = Optimizer(lr=PEAK, schedule="linear", final=0.5)
    with jax.numpy_dtype_promotion("standard"):
        assert float(learning_rate(settings, 10, peak=8e-3)(5)) == pytest.approx(6e-3)


def adamw(p, gradients, *, lr, b1, b2, eps, decay):
    """Loshchilov & Hutter 2019, algorithm 2, with ε outside the root and decay times the learning rate."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
    return p


def stepped(optimizer, params, gradients):
    @jax.jit
    def step(params, state, gradient):
        updates, state = lenient(optimizer).update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


@pytest.mark.parametrize("clip_norm", [None, 1.0, 100.0])
def test_three_steps_equal_adamw_by_hand(clip_norm):
    # meant to catch ε inside the root, decay on scales and biases, and clipping leaf by leaf
    rng = np.random.default_rng(0)
    shapes = {"layer": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": (1, 2)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(3)]
    settings = Optimizer(lr=0.1, schedule="constant", b1=0.8, b2=0.9, eps=1e-2, weight_decay=0.3, clip_norm=clip_norm)
    got = stepped(make_optimizer(settings, 10), params, gradients)
    for path, start in jax.tree_util.tree_flatten_with_path(params)[0]:
        scaled = []
        for gradient in gradients:
            norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradient)))
            scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
            scaled.append(np.asarray(gradient[path[0].key][path[1].key], np.float64) * scale)
        decay = 0.3 if path[1].key == "kernel" else 0.0
        wanted = adamw(np.asarray(start, np.float64), scaled, lr=0.1, b1=0.8, b2=0.9, eps=1e-2, decay=decay)
        np.testing.assert_allclose(got[path[0].key][path[1].key], wanted, rtol=1e-5, atol=1e-6)


def test_of_a_decoder_only_matrices_are_decayed():
    # meant to catch stacked scales and biases that the layer axis makes look like matrices
    params = scalar_params_of(tiny("gpt2"))
    still = jax.tree.map(jnp.zeros_like, params)
    settings = Optimizer(lr=0.1, schedule="constant", weight_decay=0.5)
    got = stepped(make_optimizer(settings, 10), params, [still])

    def check(path, before, after):
        matrix = path[-1].key in ("kernel", "embedding") and "head" not in str(path)
        np.testing.assert_allclose(after, before * (1 - 0.1 * 0.5) if matrix else before, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, params, got)


def test_policy_and_value_have_their_own_rate_and_clipping():
    # fails with one norm over both models, where the value model's gradient would shrink the policy's step
    config = ppo_config(optimizer={"lr": 0.01, "schedule": "constant", "eps": 1.0}, value={"lr": 0.03})
    params = {"policy": params_of(tiny()), "value": scalar_params_of(tiny())}
    gradients = {
        "policy": jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params["policy"]),
        "value": jax.tree.map(lambda x: jnp.full_like(x, 1e3), params["value"]),
    }
    got = stepped(optimizer_of(config), params, [gradients])
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64).mean(), params, got)
    for leaf in jax.tree.leaves(moved["policy"]):  # not clipped: lr · g / (g + ε)
        assert leaf == pytest.approx(0.01 * 1e-3 / (1e-3 + 1), rel=0.02)
    count = sum(leaf.size for leaf in jax.tree.leaves(params["value"]))
    clipped = 1 / np.sqrt(count)
    for leaf in jax.tree.leaves(moved["value"]):
        assert leaf == pytest.approx(0.03 * clipped / (clipped + 1), rel=0.02)
