"""PPO's losses, against hand-worked cases of the clip and a numpy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.functional import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    importance_ratio,
    length_mask,
    value_clip_fraction,
)

ALL = jnp.ones((1, 4), bool)
RATIOS = jnp.log(jnp.array([[1.5, 0.5, 1.5, 0.5]]))
OLD = jnp.zeros((1, 4))
ADVANTAGES = jnp.array([[1.0, -1.0, -1.0, 1.0]])


def test_surrogate_in_the_four_corners():
    # gains are clipped (−1.2 and 0.8), losses are not (1.5 and −0.5): mean 0.15.
    # Fails with min for max, or without the clip: seen
    np.testing.assert_allclose(float(clipped_surrogate(RATIOS, OLD, ADVANTAGES, ALL, 0.2)), 0.15, rtol=1e-5)
    # fails if every ratio outside 1 ± ε counts, clipped or not: seen
    assert float(clip_fraction(RATIOS, OLD, ADVANTAGES, ALL, 0.2)) == 0.5


def test_clipped_tokens_have_no_gradient():
    gradient = jax.grad(clipped_surrogate)(RATIOS, OLD, ADVANTAGES, ALL, 0.2)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, 1.5 / 4, -0.5 / 4]], rtol=1e-5)


def test_unmoved_policy_has_ratio_one_and_the_policy_gradient():
    rng = np.random.default_rng(0)
    log_probs = jnp.asarray(rng.normal(size=(2, 5)) - 3.0, jnp.float32)
    advantages = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    mask = length_mask(jnp.array([5, 2]), 5)
    np.testing.assert_array_equal(importance_ratio(log_probs, log_probs, mask), np.ones((2, 5)))
    assert float(approx_kl(log_probs, log_probs, mask)) == 0.0
    assert float(clip_fraction(log_probs, log_probs, advantages, mask, 0.2)) == 0.0
    gradient = jax.grad(clipped_surrogate)(log_probs, log_probs, advantages, mask, 0.2)
    np.testing.assert_allclose(gradient, np.where(mask, -np.asarray(advantages) / 7, 0.0), atol=1e-6)


def test_value_loss_hand_worked():
    # (V, V_old, R) = (1, ½, 0): 1 beats 0.7²; (1, ½, 2): 1.3² beats 1. ½ · (1 + 1.69)/2 = 0.6725.
    # Fails without the ½, with min for max, or with the clip around the return: seen
    values, old, returns = jnp.array([[1.0, 1.0]]), jnp.array([[0.5, 0.5]]), jnp.array([[0.0, 2.0]])
    mask = jnp.ones((1, 2), bool)
    np.testing.assert_allclose(float(clipped_value_loss(values, old, returns, mask, 0.2)), 0.6725, rtol=1e-5)
    assert float(value_clip_fraction(values, old, returns, mask, 0.2)) == 0.5
    gradient = jax.grad(clipped_value_loss)(values, old, returns, mask, 0.2)
    np.testing.assert_allclose(gradient, [[0.5, 0.0]], atol=1e-6)


def test_approx_kl_is_half_the_mean_square():
    moved = jnp.array([[0.1, -0.3, 5.0]])
    # fails without the ½, or if padding counts: seen
    np.testing.assert_allclose(
        float(approx_kl(moved, jnp.zeros((1, 3)), length_mask(jnp.array([2]), 3))), (0.01 + 0.09) / 4, rtol=1e-5
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e4])
def test_padding_reaches_neither_losses_nor_gradients(poison):
    # fails if the ratio or the value error is masked only after it is formed: seen
    mask = jnp.array([[True, False]])
    good, bad = jnp.array([[0.3, 0.0]]), jnp.array([[0.3, poison]])
    zeros = jnp.zeros((1, 2))
    for moved, advantages in ((bad, good), (good, bad)):
        value, gradient = jax.value_and_grad(clipped_surrogate)(moved, zeros, advantages, mask, 0.2)
        np.testing.assert_allclose(float(value), -0.3 * 1.2, rtol=1e-5)
        np.testing.assert_array_equal(gradient, [[0.0, 0.0]])
    value, gradient = jax.value_and_grad(clipped_value_loss)(bad, zeros, bad, mask, 0.5)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, [[0.0, 0.0]])
    assert float(clip_fraction(bad, zeros, good, mask, 0.2)) == 1.0
    np.testing.assert_allclose(float(approx_kl(bad, zeros, mask)), 0.045, rtol=1e-5)


def test_micro_batches_add_up_to_the_update_in_loss_and_gradient():
    # rows of 6, 1, 3 and 2 real tokens, one at a time. Fails if a loss ignores the global count: seen
    rng = np.random.default_rng(5)
    new, old, advantages = (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(3))
    mask = length_mask(jnp.array([6, 1, 3, 2]), 6)
    for loss in (clipped_surrogate, clipped_value_loss, clip_fraction, value_clip_fraction):
        whole, gradient = jax.value_and_grad(loss)(new, old, advantages, mask, 0.2)
        parts = [
            jax.value_and_grad(loss)(
                new[i][None], old[i][None], advantages[i][None], mask[i][None], 0.2, normalizer=12.0
            )
            for i in range(4)
        ]
        np.testing.assert_allclose(sum(float(part) for part, _ in parts), float(whole), rtol=1e-5)
        np.testing.assert_allclose(np.concatenate([part for _, part in parts]), gradient, rtol=1e-5, atol=1e-7)
    whole = float(approx_kl(new, old, mask))
    parts = [float(approx_kl(new[i][None], old[i][None], mask[i][None], normalizer=12.0)) for i in range(4)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def test_losses_equal_the_numpy_loop_and_are_float32_from_bfloat16():
    rng = np.random.default_rng(6)
    new, old, advantages = (jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16) for _ in range(3))
    mask = rng.random((3, 4)) < 0.6
    policy, value, count = 0.0, 0.0, 0
    for b, t in zip(*np.nonzero(mask), strict=True):
        n, o, a = (float(x[b, t]) for x in (new, old, advantages))
        ratio = np.exp(n - o)
        policy += max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        value += 0.5 * max((n - a) ** 2, (min(max(n, o - 0.2), o + 0.2) - a) ** 2)
        count += 1
    actual = clipped_surrogate(new, old, advantages, mask, 0.2)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(float(actual), policy / count, rtol=1e-5)
    np.testing.assert_allclose(float(clipped_value_loss(new, old, advantages, mask, 0.2)), value / count, rtol=1e-5)
