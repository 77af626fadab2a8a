"""Ranking losses and DPO, against pair-by-pair enumeration, closed forms and hand-worked numbers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rlhfjax.functional import (
    dpo_loss,
    implicit_reward,
    pairwise_accuracy,
    ranked_pairs,
    ranked_prompts,
    ranking_loss,
)

PAIR_LOSSES = {  # value and slope in Δ, for margin m
    "logistic": (lambda d, m: math.log1p(math.exp(-(d - m))), lambda d, m: -1 / (1 + math.exp(d - m))),
    "hinge": (lambda d, m: max(0.0, m - d), lambda d, m: -1.0 if d < m else 0.0),
    "exp": (lambda d, m: math.exp(m - d), lambda d, m: -math.exp(m - d)),
    "squared": (lambda d, m: (m - d) ** 2, lambda d, m: -2 * (m - d)),
}


def enumerate_pairs(scores, ranks, mask, kind, margin):
    """Loss and gradient, one ordered pair at a time."""
    loss_of, slope_of = PAIR_LOSSES[kind]
    losses, gradients = [], []
    for s, r, m in zip(scores, ranks, mask, strict=True):
        there = np.flatnonzero(m)
        if len(there) < 2:
            gradients.append(np.zeros(len(s)))
            continue
        loss, gradient = 0.0, np.zeros(len(s))
        for winner, loser in itertools.permutations(there, 2):
            if r[winner] < r[loser]:
                loss += loss_of(s[winner] - s[loser], margin)
                gradient[winner] += slope_of(s[winner] - s[loser], margin)
                gradient[loser] -= slope_of(s[winner] - s[loser], margin)
        losses.append(loss / math.comb(len(there), 2))
        gradients.append(gradient / math.comb(len(there), 2))
    return np.mean(losses), np.array(gradients) / len(losses)


def ranked_batch():
    """Nine candidates at most, ties, missing candidates anywhere, a prompt with one candidate and one with none."""
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(6, 9)).astype(np.float32)
    ranks = rng.integers(1, 6, size=(6, 9)).astype(np.int32)
    mask = rng.random((6, 9)) < 0.7
    mask[0], mask[1] = True, np.arange(9) < 2
    mask[4], mask[5] = np.arange(9) == 3, False
    return scores, ranks, mask


def test_three_candidates_hand_worked():
    # gaps 1, 1, 2: (2·log(1+e⁻¹) + log(1+e⁻²)) / 3. Fails if the pairs are not divided by C(3,2): seen
    actual = ranking_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[1, 2, 3]]))
    np.testing.assert_allclose(float(actual), 0.2511505, rtol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("kind", list(PAIR_LOSSES))
def test_value_and_gradient_equal_enumeration(kind, margin):
    # fails if C counts the columns or the untied pairs, if ties count, if prompts with one candidate dilute the mean,
    # if prompts weigh by their pairs, if the margin is ignored, or rank 1 is taken for the worst: each seen
    scores, ranks, mask = ranked_batch()
    value, gradient = jax.value_and_grad(ranking_loss)(jnp.asarray(scores), ranks, mask, kind, margin)
    expected_value, expected_gradient = enumerate_pairs(scores, ranks, mask, kind, margin)
    np.testing.assert_allclose(float(value), expected_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_two_candidates_are_bradley_terry():
    rng = np.random.default_rng(8)
    chosen, rejected = rng.normal(size=(2, 5)).astype(np.float32)
    expected = -np.log(scipy.special.expit(chosen.astype(np.float64) - rejected)).mean()
    ranks = np.tile([1, 2], (5, 1))
    for kind in ("logistic", "plackett_luce"):
        actual = ranking_loss(jnp.stack([chosen, rejected], axis=1), ranks, kind=kind)
        np.testing.assert_allclose(float(actual), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [*PAIR_LOSSES, "plackett_luce"])
def test_order_of_candidates_and_what_absent_ones_hold_do_not_matter(kind):
    scores, ranks, mask = ranked_batch()
    before = float(ranking_loss(scores, ranks, mask, kind, 0.5))
    shuffle = np.random.default_rng(9).permutation(9)
    np.testing.assert_allclose(
        float(ranking_loss(scores[:, shuffle], ranks[:, shuffle], mask[:, shuffle], kind, 0.5)), before, rtol=1e-5
    )
    poisoned = np.where(mask, scores, np.nan)
    # fails if the gap of absent candidates is masked after the loss instead of before it: seen
    value, gradient = jax.value_and_grad(ranking_loss)(jnp.asarray(poisoned), ranks, mask, kind, 0.5)
    np.testing.assert_allclose(float(value), before, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["logistic", "plackett_luce"])
def test_prompts_weigh_the_same_whatever_their_k(kind):
    scores, ranks, mask = ranked_batch()
    alone = [float(ranking_loss(*(x[i][None] for x in (scores, ranks, mask)), kind)) for i in range(4)]
    np.testing.assert_allclose(float(ranking_loss(scores, ranks, mask, kind)), np.mean(alone), rtol=1e-5)
    # micro batches with the global number of prompts add up
    total = float(ranked_prompts(scores, mask))
    assert total == 4
    parts = [
        float(ranking_loss(*(x[i : i + 3] for x in (scores, ranks, mask)), kind, normalizer=total)) for i in (0, 3)
    ]
    np.testing.assert_allclose(sum(parts), float(ranking_loss(scores, ranks, mask, kind)), rtol=1e-5)


def test_a_prompt_of_ties_counts_but_teaches_nothing():
    scores, ranks = jnp.array([[2.0, 1.0], [5.0, 3.0]]), jnp.array([[1, 2], [1, 1]])
    value, gradient = jax.value_and_grad(ranking_loss)(scores, ranks)
    np.testing.assert_allclose(float(value), math.log1p(math.exp(-1.0)) / 2, rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], [0.0, 0.0])


def test_plackett_luce_is_a_distribution_over_orders():
    # e^(−choices · loss) over all orders of K candidates sums to 1
    for count in (2, 3, 4):
        scores = np.random.default_rng(count).normal(size=(1, count)).astype(np.float32)
        orders = [np.array([order]) for order in itertools.permutations(range(1, count + 1))]
        losses = [float(ranking_loss(scores, order, kind="plackett_luce")) for order in orders]
        np.testing.assert_allclose(np.exp(-(count - 1) * np.array(losses)).sum(), 1.0, rtol=1e-5)


def test_plackett_luce_with_the_rest_tied_is_best_of_four():
    # softmax cross-entropy of the best one. Fails if the tied rest are taken for choices of their own: seen
    scores = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    best = np.array([0, 3, 1, 2, 2])
    ranks = np.where(np.arange(4)[None] == best[:, None], 1, 2)
    expected = -scipy.special.log_softmax(scores.astype(np.float64), axis=1)[np.arange(5), best].mean()
    np.testing.assert_allclose(float(ranking_loss(scores, ranks, kind="plackett_luce")), expected, rtol=1e-5)


def test_plackett_luce_with_a_tie_at_the_top():
    # two choices, each against the third alone: log(1+e⁻²) and log(1+e⁻¹). Fails if tied candidates meet: seen
    actual = ranking_loss(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[1, 1, 2]]), kind="plackett_luce")
    np.testing.assert_allclose(float(actual), (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2, rtol=1e-5)


def test_nothing_to_compare_is_zero_with_zero_gradient():
    value, gradient = jax.value_and_grad(ranking_loss)(
        jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32), jnp.zeros((2, 3), bool)
    )
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="listnet"):
        ranking_loss(jnp.ones((1, 2)), jnp.array([[1, 2]]), kind="listnet")


def test_accuracy_counts_untied_pairs_and_halves_for_equal_scores():
    # ranks order 5 pairs (2 and 3 are tied): right, right, equal, wrong, right.
    # Fails if equal scores count as right, or tied ranks count: seen
    scores = jnp.array([[3.0, 1.0, 0.0, 1.0], [9.0, 9.0, 9.0, 9.0]])
    ranks = jnp.array([[1, 2, 2, 3], [1, 2, 3, 4]])
    mask = jnp.array([[True] * 4, [True] + [False] * 3])
    np.testing.assert_allclose(float(pairwise_accuracy(scores, ranks, mask)), 3.5 / 5)
    assert float(ranked_pairs(ranks, mask)) == 5
    parts = [float(pairwise_accuracy(scores[i][None], ranks[i][None], mask[i][None], normalizer=5.0)) for i in (0, 1)]
    np.testing.assert_allclose(sum(parts), 0.7, rtol=1e-6)


def test_integer_scores_and_bfloat16_are_computed_in_float32():
    exact = float(ranking_loss(jnp.array([[2.0, 1.0]]), jnp.array([[1, 2]])))
    for dtype in (jnp.int32, jnp.bfloat16):
        loss = ranking_loss(jnp.array([[2, 1]], dtype), jnp.array([[1, 2]]))
        assert loss.dtype == jnp.float32
        assert float(loss) == exact


def test_dpo_is_log_two_where_policy_and_reference_agree():
    log_probs = jnp.array([-3.0, -50.0])
    loss = dpo_loss(log_probs, log_probs - 2.0, log_probs, log_probs - 2.0, 0.1)
    np.testing.assert_allclose(loss, [math.log(2)] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.5130153),  # log(1 + e^−0.4)
        ("sigmoid", 0.1, 0.5530153),  # 0.9 · log(1 + e^−0.4) + 0.1 · log(1 + e^0.4)
        ("hinge", 0.0, 0.6),  # 1 − 0.4
        ("hinge", 0.1, 0.68),  # 0.9 · 0.6 + 0.1 · 1.4
        ("ipo", 0.0, 1.0),  # (4 − 5)²
        ("ipo", 0.1, 9.0),  # 0.9 · 1 + 0.1 · (−4 − 5)²
    ],
)
def test_dpo_kinds_hand_worked(kind, smoothing, expected):
    # β = 0.1, h = (−10 + 13) − (−20 + 19) = 4. Fails if a reference has the wrong sign, or β is left out: seen
    loss = dpo_loss(
        jnp.array([-10.0]), jnp.array([-20.0]), jnp.array([-13.0]), jnp.array([-19.0]), 0.1, kind, smoothing
    )
    np.testing.assert_allclose(loss, [expected], rtol=1e-5)


def test_dpo_gradient_is_that_of_the_paper():
    # −β σ(−β h) on the chosen log-probability, and its opposite on the rejected one
    gradient = jax.grad(lambda c, r: dpo_loss(c, r, jnp.array([-13.0]), jnp.array([-19.0]), 0.1)[0], argnums=(0, 1))(
        jnp.array([-10.0]), jnp.array([-20.0])
    )
    slope = 0.1 / (1 + math.exp(0.4))
    np.testing.assert_allclose(np.concatenate(gradient), [-slope, slope], rtol=1e-5)


def test_dpo_refuses_another_kind_and_reports_rewards():
    one = jnp.array([-1.0])
    with pytest.raises(ValueError, match="apo"):
        dpo_loss(one, one, one, one, 0.1, "apo")
    np.testing.assert_allclose(implicit_reward(jnp.array([-10.0]), jnp.array([-13.0]), 0.1), [0.3], rtol=1e-6)
