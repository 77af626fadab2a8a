"""Advantages, against hand-worked numbers and Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhfjax.functional import gae, group_relative, leave_one_out, overlong_penalty

BATCH, TIME = 3, 6
compiled_gae = jax.jit(gae)


def reference_gae(rewards, values, mask, gamma, lam):
    """The double sum of the definition over the real tokens of each row, packed: no recursion."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        real = np.flatnonzero(mask[b])
        r, v = rewards[b, real].astype(np.float64), values[b, real].astype(np.float64)
        next_v = np.append(v[1:], 0.0) if len(real) else v
        delta = r + gamma * next_v - v
        for i, t in enumerate(real):
            advantages[b, t] = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(real)))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def test_gae_hand_worked():
    # δ = 0, 0, ½ from the back, so A = ½, ½·0.95, ½·0.95². Fails if the scan runs forward, or λ is left out: seen
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.5, 0.5]])
    advantages, returns = gae(rewards, values, jnp.ones((1, 3), bool), 1.0, 0.95)
    np.testing.assert_allclose(advantages, [[0.45125, 0.475, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.95125, 0.975, 1.0]], rtol=1e-6)


def test_value_after_the_last_real_token_is_zero():
    # fails if it bootstraps from the padding, or if padding gets an advantage or a return: seen
    rewards, values = jnp.array([[0.0, 1.0, 77.0]]), jnp.array([[0.5, 0.5, 99.0]])
    advantages, returns = gae(rewards, values, jnp.array([[True, True, False]]), 1.0, 0.95)
    np.testing.assert_allclose(advantages, [[0.475, 0.5, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.975, 1.0, 0.0]], rtol=1e-6)


def test_one_token_response():
    advantages, returns = gae(jnp.array([[-1.5, 0.0]]), jnp.array([[0.25, 9.0]]), jnp.array([[True, False]]), 1.0, 0.95)
    np.testing.assert_allclose(advantages, [[-1.75, 0.0]])
    np.testing.assert_allclose(returns, [[-1.5, 0.0]])


numbers = hnp.arrays(np.float32, (BATCH, TIME), elements=st.floats(-4, 4, width=32))
rates = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(numbers, numbers, hnp.arrays(bool, (BATCH, TIME)), rates, rates)
def test_gae_equals_the_definition_at_any_mask(rewards, values, mask, gamma, lam):
    # fails if a hole in the mask decays the sum or zeroes the next value: seen
    advantages, returns = compiled_gae(rewards, values, mask, gamma, lam)
    expected_advantages, expected_returns = reference_gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected_advantages, atol=2e-5)
    np.testing.assert_allclose(returns, expected_returns, atol=2e-5)


def test_lambda_one_returns_are_the_rewards_to_go():
    rng = np.random.default_rng(0)
    rewards, values = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(2))
    _, returns = gae(rewards, values, np.ones((2, 5), bool), 1.0, 1.0)
    np.testing.assert_allclose(returns, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], atol=1e-5)


def test_nan_in_padding_stays_out():
    rewards, values = jnp.array([[1.0, jnp.nan]]), jnp.array([[0.5, jnp.nan]])
    advantages, returns = gae(rewards, values, jnp.array([[True, False]]), 1.0, 0.95)
    np.testing.assert_array_equal(advantages, [[0.5, 0.0]])
    np.testing.assert_array_equal(returns, [[1.0, 0.0]])


def test_group_relative_hand_worked():
    # mean ¼, sample deviation ½ and population deviation √3/4. Fails over the whole batch: seen
    scores, third = jnp.array([[0.0, 0.0, 0.0, 1.0], [5.0, 7.0, 7.0, 5.0]]), 3**-0.5
    sample = [[-0.5, -0.5, -0.5, 1.5], [-(0.75**0.5), 0.75**0.5, 0.75**0.5, -(0.75**0.5)]]
    population = [[-third, -third, -third, 3**0.5], [-1.0, 1.0, 1.0, -1.0]]
    np.testing.assert_allclose(group_relative(scores), sample, rtol=1e-5)
    np.testing.assert_allclose(group_relative(scores, deviation="population"), population, rtol=1e-5)
    np.testing.assert_allclose(group_relative(scores, deviation="none"), [[-0.25, -0.25, -0.25, 0.75], [-1, 1, 1, -1]])
    with pytest.raises(ValueError, match="'sample', 'population' or 'none', got 'std'"):
        group_relative(scores, deviation="std")


def test_group_relative_is_a_z_score():
    # scipy's, in float64. Fails with the mean of the batch: seen
    scores = np.random.default_rng(1).normal(50.0, 3.0, (4, 8)).astype(np.float32)
    for deviation, lost in (("sample", 1), ("population", 0)):
        wanted = scipy.stats.zscore(scores.astype(np.float64), axis=1, ddof=lost)
        np.testing.assert_allclose(group_relative(scores, deviation=deviation), wanted, rtol=1e-4, atol=1e-5)


EQUAL = [0.1, 2.5, 100.1, 1000.1, 10000.1, -3.3e7, 1e30]


@pytest.mark.parametrize("deviation", ["sample", "population", "none"])
def test_a_group_with_nothing_to_prefer_gives_zero_whatever_its_scores(deviation):
    # the mean of five 10000.1 in float32 is not 10000.1. Fails by -0.995 without the shift before the mean: seen
    for size in (2, 3, 5, 7, 64):
        scores = jnp.broadcast_to(jnp.asarray(EQUAL, jnp.float32)[:, None], (len(EQUAL), size))
        np.testing.assert_array_equal(group_relative(scores, deviation=deviation), np.zeros(scores.shape))
        np.testing.assert_array_equal(leave_one_out(scores), np.zeros(scores.shape))
    np.testing.assert_array_equal(group_relative(jnp.array([[3.0]]), deviation=deviation), [[0.0]])


def test_leave_one_out_hand_worked():
    # 1 − (2+6)/2, 2 − (1+6)/2, 6 − (1+2)/2. Fails if the baseline counts the response itself: seen
    np.testing.assert_allclose(leave_one_out(jnp.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(jnp.array([[1.0]]))


# Revisions of which the formulas were read: huggingface/trl f2cd577 (24 July 2026), trl/trainer/grpo_trainer.py and
# rloo_trainer.py; volcengine/verl b178a3c (29 January 2026), verl/trainer/ppo/core_algos.py. Both divide by n - 1.
EPSILONS = {"trl": 1e-4, "verl": 1e-6}


@pytest.mark.parametrize("scores", [[[0.0, 0.0, 1.0, 1.0], [2.0, -1.0, 0.5, 7.25]], [[0.1, 0.2, 0.4]]], ids=["4", "3"])
@pytest.mark.parametrize("system", EPSILONS)
def test_group_relative_is_what_trl_and_verl_compute(scores, system):
    # theirs is (s - mean) / (std + epsilon), which is smaller by epsilon / std. Fails with the population's deviation
    s, epsilon = np.asarray(scores), EPSILONS[system]
    std = s.std(axis=1, ddof=1, keepdims=True)
    theirs = (s - s.mean(axis=1, keepdims=True)) / (std + epsilon)
    np.testing.assert_allclose(group_relative(jnp.asarray(scores)), theirs, rtol=1.01 * epsilon / std.min() + 1e-6)
    np.testing.assert_allclose(group_relative(jnp.asarray(scores)), theirs * (std + epsilon) / std, rtol=3e-6)


def test_leave_one_out_is_what_trl_and_verl_compute():
    s = np.asarray([[0.0, 0.0, 1.0, 1.0], [2.0, -1.0, 0.5, 7.25]])
    trl = s - (s.sum(axis=1, keepdims=True) - s) / 3
    verl = s * 4 / 3 - s.mean(axis=1, keepdims=True) * 4 / 3
    for theirs in (trl, verl):
        np.testing.assert_allclose(leave_one_out(jnp.asarray(s, jnp.float32)), theirs, rtol=1e-5, atol=1e-6)


def test_overlong_penalty_by_hand():
    # of at most 20 tokens the last 4 cost a quarter each; what is longer still costs 1
    lengths = jnp.asarray([1, 16, 17, 18, 20, 21, 90], jnp.int32)
    np.testing.assert_allclose(overlong_penalty(lengths, 20, 4), [0, 0, -0.25, -0.5, -1, -1, -1])
