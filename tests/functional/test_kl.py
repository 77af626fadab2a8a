"""KL estimators, penalised rewards and the adaptive coefficient, against hand-worked numbers and Python loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.functional import (
    adaptive_kl,
    kl_estimate,
    kl_penalized_rewards,
    length_mask,
    sequence_kl,
    token_log_probs,
)


def test_estimators_hand_worked():
    # x = log 2. Fails if x is log π − log π_ref: seen
    log_probs, ref = jnp.array([-1.0]), jnp.array([-1.0 + np.log(2.0)])
    np.testing.assert_allclose(kl_estimate(log_probs, ref, "k1"), [-0.6931472], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(log_probs, ref, "k2"), [0.2402265], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(log_probs, ref, "k3"), [0.3068528], rtol=1e-6)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = float((policy * np.log(policy / reference)).sum())
    log_probs, ref = jnp.log(jnp.asarray(policy, jnp.float32)), jnp.log(jnp.asarray(reference, jnp.float32))
    for kind in ("k1", "k3"):
        expectation = float((policy * np.asarray(kl_estimate(log_probs, ref, kind))).sum())
        np.testing.assert_allclose(expectation, exact, rtol=1e-5)
    assert (np.asarray(kl_estimate(log_probs, ref, "k3")) >= 0).all()


def test_equal_policies_have_no_kl_and_another_kind_is_refused():
    log_probs = jnp.array([-0.1, -7.0])
    for kind in ("k1", "k2", "k3"):
        np.testing.assert_array_equal(kl_estimate(log_probs, log_probs, kind), [0.0, 0.0])
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(log_probs, log_probs, "k4")


def test_sequence_kl_is_a_sum_over_real_tokens():
    log_probs, ref = jnp.array([[-1.0, -2.0, -5.0]]), jnp.array([[-1.5, -2.25, 5.0]])
    np.testing.assert_allclose(sequence_kl(log_probs, ref, length_mask(jnp.array([2]), 3), "k1"), [0.75])


def reference_rewards(scores, log_probs, ref, mask, kl_coef):
    rewards = np.zeros(np.shape(log_probs))
    for b, row in enumerate(mask):
        for t in np.flatnonzero(row):
            rewards[b, t] = -kl_coef * (log_probs[b][t] - ref[b][t])
        if row.any():
            rewards[b, np.flatnonzero(row)[-1]] += scores[b]
    return rewards


def test_rewards_hand_worked():
    # Fails if the score is added one position later, at the last column, or to an empty row; if the penalty has the
    # other sign; if padding keeps a penalty; if the score is cut to an integer: each seen
    scores = jnp.array([0.25, -1.5, 3.0, 7.0])  # fractional and negative; the last row is padding
    log_probs = jnp.full((4, 3), -1.0)
    ref = jnp.full((4, 3), -1.5)  # half a nat per token
    mask = length_mask(jnp.array([2, 1, 3, 0]), 3)  # one token; no room left after the last one
    expected = [[-0.05, 0.2, 0.0], [-1.55, 0.0, 0.0], [-0.05, -0.05, 2.95], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(kl_penalized_rewards(scores, log_probs, ref, mask, 0.1), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [4, 4, 4, 4], [1, 2, 3, 4], [0, 4, 1, 0]])
def test_rewards_equal_the_loop_at_any_length_and_temperature(lengths, temperature):
    rng = np.random.default_rng(3)
    policy, reference = (jnp.asarray(rng.normal(size=(4, 4, 5)), jnp.float32) for _ in range(2))
    tokens = jnp.asarray(rng.integers(5, size=(4, 4)))
    log_probs, ref = token_log_probs(policy, tokens, temperature), token_log_probs(reference, tokens, temperature)
    scores = rng.normal(size=4).astype(np.float32)
    mask = np.arange(4)[None] < np.array(lengths)[:, None]
    actual = np.asarray(kl_penalized_rewards(scores, log_probs, ref, mask, 0.05))
    np.testing.assert_allclose(actual, reference_rewards(scores, log_probs, ref, mask, 0.05), atol=1e-6)
    # summed over a response: score − β·KL
    total = np.where(mask.any(-1), scores, 0) - 0.05 * np.asarray(sequence_kl(log_probs, ref, mask, "k1"))
    np.testing.assert_allclose(actual.sum(-1), total, atol=1e-6)


def test_rewards_at_ragged_masks():
    mask = np.array([[False, True, False, True], [True, False, False, False]])
    log_probs, ref = np.full((2, 4), -1.0, np.float32), np.full((2, 4), -2.0, np.float32)
    scores = np.array([1.5, -0.5], np.float32)
    np.testing.assert_allclose(
        kl_penalized_rewards(scores, log_probs, ref, mask, 0.1),
        reference_rewards(scores, log_probs, ref, mask, 0.1),
        rtol=1e-6,
    )


def test_rewards_are_float32_for_integer_and_bfloat16_inputs():
    # fails if the rewards take the type of the scores or of the log-probabilities: seen
    half = jnp.full((1, 2), -1.0, jnp.bfloat16)
    rewards = kl_penalized_rewards(
        jnp.array([3]), half, jnp.full((1, 2), -1.25, jnp.bfloat16), jnp.ones((1, 2), bool), 0.1
    )
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[-0.025, 2.975]], rtol=1e-6)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.150768),  # error 0.1: 0.15 · (1 + 0.1 · 512 / 10,000)
        (12.0, 0.151536),  # error 1, clipped to 0.2
        (0.0, 0.148464),  # error −1, clipped to −0.2
        (-3.0, 0.148464),  # k1 may be negative
    ],
)
def test_adaptive_coefficient_with_the_settings_of_ziegler(kl, expected):
    # β 0.15, target 6 nats, horizon 10,000 episodes, 512 a batch. Fails without the clip, or without episodes: seen
    actual = adaptive_kl(0.15, kl, target=6.0, horizon=10_000, episodes=512)
    np.testing.assert_allclose(float(actual), expected, rtol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 5.9, 60.0])
@pytest.mark.parametrize("episodes", [16, 449, 512, 10_000_000])
def test_adaptive_coefficient_stays_positive_however_large_the_batch(kl, episodes):
    # fails below 0 from 5 x horizon on without the bound, and at 0 for a coefficient next to it: seen
    moved = float(adaptive_kl(0.1, kl, target=6.0, horizon=100.0, episodes=episodes))
    wanted = max(1 + min(max(kl / 6 - 1, -0.2), 0.2) * episodes / 100, 0.1)  # what is below 0.1 was 0 or less from -0.9
    np.testing.assert_allclose(moved, 0.1 * wanted, rtol=1e-4)
    small = float(adaptive_kl(1.2e-38, kl, target=6.0, horizon=100.0, episodes=episodes))
    assert small > 0
    assert float(adaptive_kl(0.0, kl, target=6.0, horizon=100.0, episodes=episodes)) == 0  # off stays off


def test_adaptive_coefficient_hardly_depends_on_the_batch_size():
    slow = fast = 0.2
    for _ in range(8):
        fast = adaptive_kl(fast, 9.0, target=6.0, horizon=10_000, episodes=64)
    slow = adaptive_kl(slow, 9.0, target=6.0, horizon=10_000, episodes=512)
    np.testing.assert_allclose(float(fast), float(slow), rtol=1e-4)
