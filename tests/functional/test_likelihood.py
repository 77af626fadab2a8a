"""Token log-probabilities and entropy, against hand-worked numbers and scipy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny import stored

from rlhfjax.functional import entropy, filter_logits, masked_mean, masked_sum, smoothed_cross_entropy, token_log_probs


def test_log_probs_of_a_hand_worked_row():
    logits = jnp.array([[0.0, np.log(3.0)]])  # probabilities ¼ and ¾
    np.testing.assert_allclose(token_log_probs(logits, jnp.array([1])), [np.log(0.75)], rtol=1e-6)
    # T = ½ doubles the logits: 1 against 9. Fails if the temperature is left out, or multiplied: seen
    np.testing.assert_allclose(token_log_probs(logits, jnp.array([1]), 0.5), [np.log(0.9)], rtol=1e-6)
    np.testing.assert_allclose(token_log_probs(logits, jnp.array([0]), 0.5), [np.log(0.1)], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_log_probs_and_entropy_equal_scipy(temperature):
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=5.0, size=(2, 3, 7)).astype(np.float32)
    tokens = rng.integers(7, size=(2, 3))
    log_p = scipy.special.log_softmax(logits.astype(np.float64) / temperature, axis=-1)
    expected = np.array([[log_p[b, t, tokens[b, t]] for t in range(3)] for b in range(2)])
    np.testing.assert_allclose(token_log_probs(logits, tokens, temperature), expected, rtol=1e-5, atol=1e-6)
    # fails if the sign is lost, or the temperature: seen
    np.testing.assert_allclose(entropy(logits, temperature), -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4, atol=1e-6)


def test_entropy_of_known_distributions():
    np.testing.assert_allclose(entropy(jnp.zeros((1, 8))), [np.log(8.0)], rtol=1e-6)
    quarter = 0.25 * np.log(4) + 0.75 * np.log(4 / 3)
    np.testing.assert_allclose(entropy(jnp.array([[0.0, np.log(3.0)]])), [quarter], rtol=1e-6)


def test_entropy_after_filters_has_no_nan_in_value_or_gradient():
    # two equal tokens survive: log 2 nats. Fails if 0·log 0 is computed, forward or backward: seen
    logits = jnp.array([[1.0, 1.0, 0.0, -2.0]])

    def of_top_two(z):
        return jnp.sum(entropy(filter_logits(z, 1.0, 2, 1.0)))

    value, gradient = jax.value_and_grad(of_top_two)(logits)
    np.testing.assert_allclose(float(value), np.log(2.0), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, 1e4 - 1.0, -1e4]])
    expected = -np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(token_log_probs(logits, jnp.array([0])), [expected], rtol=1e-3)


def test_bfloat16_logits_are_computed_in_float32():
    # fails if the sum of 4,096 terms is taken in bfloat16: seen
    logits = jnp.zeros((1, 4096), jnp.bfloat16)
    result = token_log_probs(logits, jnp.array([7]))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [-np.log(4096.0)], rtol=1e-6)
    assert entropy(logits).dtype == jnp.float32


def test_label_smoothing_of_a_hand_worked_row():
    # probabilities ¼ and ¾, ε = 0.2: 0.8·log(4/3) + 0.1·(log 4 + log(4/3)). Without ε/V on the token itself: seen
    logits, expected = jnp.array([[0.0, np.log(3.0)]]), 0.9 * np.log(4 / 3) + 0.1 * np.log(4.0)
    np.testing.assert_allclose(smoothed_cross_entropy(logits, jnp.array([1]), 0.2), [expected], rtol=1e-6)
    plain = smoothed_cross_entropy(logits, jnp.array([1]), 0.0)
    np.testing.assert_allclose(plain, -token_log_probs(logits, jnp.array([1])), rtol=1e-6)


def test_label_smoothing_is_torchs_for_every_reduction():
    golden = stored(Path(__file__).parents[1] / "golden" / "encoder_decoder.npz")
    targets = golden["following"] != -100
    assert not targets.all()
    made = smoothed_cross_entropy(golden["logits"], np.where(targets, golden["following"], 0), 0.1)
    np.testing.assert_allclose(np.where(targets, made, 0.0).ravel(), golden["loss_none"], rtol=1e-5)
    np.testing.assert_allclose(masked_sum(made, targets), golden["loss_sum"], rtol=1e-5)
    np.testing.assert_allclose(masked_mean(made, targets), golden["loss_mean"], rtol=1e-5)
