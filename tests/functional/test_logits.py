"""Temperature, top-k and top-p, against a sorted numpy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.functional import apply_temperature, entropy, filter_logits, token_log_probs, top_k, top_p
from rlhfjax.functional.logits import min_p

VOCABULARY = 8


def numpy_filter(row, temperature, k, p):
    """One row, step by step: the set of ids that stay."""
    row = row.astype(np.float64) / temperature
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if k > 0:
        order = order[:k]
    if p >= 1:
        return set(order)
    weights = np.exp(row[order] - row[order[0]])
    kept, mass = [], 0.0
    for token, probability in zip(order, weights / weights.sum(), strict=True):
        kept.append(token)
        mass += probability
        if mass >= p:
            break
    return set(kept)


def kept(filtered):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(filtered)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.integers(0, VOCABULARY + 2),
    st.sampled_from([0.013, 0.31, 0.57, 0.83, 0.97, 1.0]),
)
def test_filters_equal_the_numpy_loop(seed, temperature, k, p):
    # fails if top-p sums over what top-k removed, or if either keeps one token less or more: seen
    logits = np.random.default_rng(seed).normal(scale=2.0, size=(3, VOCABULARY)).astype(np.float32)
    filtered = filter_logits(jnp.asarray(logits), temperature, jnp.int32(k), jnp.float32(p))
    assert kept(filtered) == [numpy_filter(row, temperature, k, p) for row in logits]
    # what stays keeps its value: filters choose, they do not rescale
    stays = np.isfinite(filtered)
    np.testing.assert_array_equal(
        np.asarray(filtered)[stays], np.asarray(apply_temperature(logits, temperature))[stays]
    )


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-12, 0.0])
def test_next_to_zero_the_temperature_leaves_the_largest_logit(temperature):
    # z / T is infinite there, and infinity less infinity no number. Fails without the bound of T: seen
    logits, tokens = jnp.array([[1.0, 5.0, 4.9999995, -jnp.inf, -90.0]]), jnp.array([[1]])
    p = jax.nn.softmax(apply_temperature(logits, temperature))
    np.testing.assert_array_equal(p, [[0, 1, 0, 0, 0]])

    def measured(logits):
        return token_log_probs(logits[None], tokens, temperature).sum() + entropy(logits, temperature).sum()

    value, gradient = jax.value_and_grad(measured)(logits)
    assert float(value) == 0
    assert not np.asarray(gradient).any()


def test_top_p_hand_worked():
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
    assert kept(top_p(logits, 0.45)) == [{1}]
    assert kept(top_p(logits, 0.7)) == [{1, 3}]
    assert kept(top_p(logits, 0.85)) == [{0, 1, 3}]
    assert kept(top_p(logits, 0.0)) == [{1}]  # never empty; fails without the floor of one token: seen


def test_ties_at_the_edge_keep_exactly_k_and_the_lower_ids():
    # fails if everything equal to the k-th logit stays: seen
    assert kept(top_k(jnp.zeros((1, 6)), 2)) == [{0, 1}]
    assert kept(top_p(jnp.zeros((1, 6)), 0.5)) == [{0, 1, 2}]


@pytest.mark.parametrize("off", [(0, 1.0), (jnp.int32(0), jnp.float32(1.0))])
def test_off_means_untouched(off):
    # one token takes all the mass that float32 can hold: the cumulative sum is 1 before the second.
    # Fails if p = 1 is compared with the cumulative sum: seen
    logits = jnp.where(jnp.arange(64) == 5, 0.0, -40.0)[None]
    np.testing.assert_array_equal(filter_logits(logits, 1.0, *off), logits)


def test_scalars_may_be_traced_or_one_per_row():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]]))
    assert kept(jax.jit(filter_logits)(logits, 1.0, 2, 1.0)) == [{1, 2}, {1, 2}]
    per_row = jax.jit(filter_logits)(logits, jnp.array([1.0, 2.0]), jnp.array([1, 0]), jnp.array([1.0, 1.0]))
    assert kept(per_row) == [{2}, {0, 1, 2}]
    np.testing.assert_allclose(per_row[1], logits[1] / 2.0, rtol=1e-6)


def test_min_p_hand_worked():
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    assert kept(min_p(logits, 0.2)) == [{0, 1, 3}, {0, 1, 2, 3}]  # at least 0.1 of the first, 0.05 of the second
    assert kept(min_p(logits, 0.0)) == [{0, 1, 2, 3}] * 2
    assert kept(filter_logits(logits, top_k=2, min_p=0.7)) == [{1}, {0, 1}]


def test_a_known_top_k_keeps_what_a_traced_one_keeps():
    # two ways: the k largest by selection, and by sorting everything
    logits = jnp.asarray(np.random.default_rng(3).integers(0, 4, (6, VOCABULARY)), jnp.float32)  # with ties
    for k in (1, 3, 7):
        np.testing.assert_array_equal(filter_logits(logits, 1.0, k, 0.8), filter_logits(logits, 1.0, jnp.int32(k), 0.8))
