"""Masked sums, means and whitening, against hand-worked numbers and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.functional import last_token_mask, length_mask, masked_mean, masked_sum, whiten
from rlhfjax.functional.masking import masked_centred, masked_variance


def test_masked_mean_of_hand_worked_rows():
    # fails if the mean divides by the number of positions: seen
    x = jnp.array([[1.0, 2.0, 99.0], [4.5, 99.0, 99.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    assert float(masked_sum(x, mask)) == 7.5
    assert float(masked_mean(x, mask)) == 2.5
    np.testing.assert_array_equal(masked_sum(x, mask, axis=-1), [3.0, 4.5])
    np.testing.assert_array_equal(masked_mean(x, mask, axis=-1), [1.5, 4.5])


def test_empty_mask_gives_zero_and_zero_gradient():
    # fails if the count is not guarded against 0: seen
    x, nothing = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
    value, gradient = jax.value_and_grad(masked_mean)(x, nothing)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
    np.testing.assert_array_equal(masked_mean(x, nothing, axis=-1), [0.0, 0.0])
    np.testing.assert_array_equal(whiten(x, nothing), np.zeros((2, 3)))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_padding_holds_never_reaches_a_result(poison):
    # fails if the mask is multiplied instead of selected: seen
    x = jnp.array([1.0, 3.0, poison])
    mask = jnp.array([True, True, False])
    assert float(masked_mean(x, mask)) == 2.0
    np.testing.assert_allclose(whiten(x, mask), [-1.0, 1.0, 0.0], atol=1e-6)


def test_global_normalizer_makes_uneven_micro_batches_add_up():
    # fails if the local count is used in spite of the global one: seen
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    mask = length_mask(jnp.array([5, 1, 3, 2]), 5)
    total = jnp.float32(11)
    parts = [masked_mean(x[i : i + 1], mask[i : i + 1], normalizer=total) for i in range(4)]
    np.testing.assert_allclose(sum(map(float, parts)), float(masked_mean(x, mask)), rtol=1e-6)
    assert float(masked_mean(x, mask, normalizer=0.0)) == 0.0


def test_whiten_hand_worked():
    # population deviation of 1, 2, 3 is √(2/3), so 1 becomes −√1.5. Fails with the sample variance: seen
    x, mask = jnp.array([1.0, 2.0, 3.0, 50.0]), jnp.array([True, True, True, False])
    np.testing.assert_allclose(whiten(x, mask), [-(1.5**0.5), 0.0, 1.5**0.5, 0.0], rtol=1e-6)
    # fails if shift_mean=False drops the mean, or leaks it into masked positions: seen
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False), [2 - 1.5**0.5, 2.0, 2 + 1.5**0.5, 0.0], rtol=1e-6)


def test_whiten_uses_rsqrt_of_variance_plus_epsilon():
    # deviation 1e-4, variance 1e-8: halved variance, so the result is ±1/√2. Fails with σ + ε instead: seen
    x = jnp.array([-1e-4, 1e-4])
    np.testing.assert_allclose(whiten(x, jnp.array([True, True])), [-(0.5**0.5), 0.5**0.5], rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1000.1, 10000.1, -3.3e7, 1e30])
@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_equal_values_are_whitened_to_zero_whatever_their_size(value, count):
    # fails by up to 1 with the mean taken of the values themselves: seen
    x, mask = jnp.full(count + 1, value).at[-1].set(jnp.nan), jnp.arange(count + 1) < count
    np.testing.assert_array_equal(whiten(x, mask), np.zeros(count + 1))
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False)[:-1], np.full(count, np.float32(value)), rtol=1e-6)
    assert float(masked_variance(x, mask)) == 0


def test_variance_and_distances_from_the_mean_are_numpys():
    x = np.random.default_rng(2).normal(1e4, 1.0, (3, 6)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    rows = [row[keep].astype(np.float64) for row, keep in zip(x, mask, strict=True)]
    variances = [row.var() if row.size else 0.0 for row in rows]
    np.testing.assert_allclose(masked_variance(x, mask, axis=-1), variances, rtol=1e-4)
    np.testing.assert_allclose(masked_variance(x, mask), np.concatenate(rows).var(), rtol=1e-4)
    centred = np.asarray(masked_centred(x, mask, axis=-1))
    for row, made, keep in zip(rows, centred, mask, strict=True):
        np.testing.assert_allclose(made[keep], row - row.mean() if row.size else row, atol=1e-3)
        assert not made[~keep].any()


def test_the_gradient_of_whitening_is_numpys():
    # by differences in float64: what is centred does not depend on the value that was taken away before
    x, weights = np.array([0.3, -1.0, 2.0, 5.0]), np.array([1.0, -2.0, 0.5, 3.0])

    def whitened(x):
        kept = x[:3]
        return weights[:3] @ ((kept - kept.mean()) / np.sqrt(kept.var() + 1e-8))

    wanted = [(whitened(x + step) - whitened(x - step)) / 2e-5 for step in 1e-5 * np.eye(4)]
    mask = jnp.arange(4) < 3
    made = jax.grad(lambda x: (jnp.asarray(weights, jnp.float32) * whiten(x, mask)).sum())(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_masks_from_lengths():
    np.testing.assert_array_equal(
        length_mask(jnp.array([0, 1, 3]), 3), [[False, False, False], [True, False, False], [True, True, True]]
    )


def test_last_token_of_padded_ragged_and_empty_rows():
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    # fails if the last position stands in for an empty row: seen
    np.testing.assert_array_equal(last_token_mask(mask), [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
