"""GRPO against hand-worked advantages, losses and gradients by loops in float64, and the optimum of a small world."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import assert_optimal, learned
from tiny import log_probs_from

from algorithms.groups_of_responses import (
    GROUP,
    LENGTHS,
    MASK,
    ROLLOUT,
    ROWS,
    SCORES,
    WIDTH,
    estimated,
    float64,
    loss_and_gradient,
    loss_of,
    moved,
    on_policy,
    packings,
    table,
)
from rlhfjax.algorithms.grpo import Grpo

AVERAGES = ["sequence", "token", "constant"]

TABLE = log_probs_from(lambda params, rollout: params["policy"])


def grpo(log_probs=TABLE, **settings) -> Grpo:
    """GRPO over a table: logits of each position of each row are the parameters themselves."""
    return Grpo(log_probs, **({"group": GROUP, "longest": WIDTH, "missing_eos": "keep"} | settings))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # deviations (14 / 3)^½ = 2.16025 and (2 / 3)^½ = 0.81650 within the groups
        ({}, [-0.92582, -0.46291, 0, 1.38873, 0, 0, 0, 0, -1.22474, 0, 0, 1.22474]),
        # (14 / 4)^½ = 1.87083 and (2 / 4)^½ = 0.70711
        ({"deviation": "population"}, [-1.06904, -0.53452, 0, 1.60357, 0, 0, 0, 0, -1.41421, 0, 0, 1.41421]),
        ({"deviation": "none"}, [-2, -1, 0, 3, 0, 0, 0, 0, -1, 0, 0, 1]),
    ],
)
def test_advantages_by_hand(settings, wanted):
    # fails with a mean over the batch, and groups of rows that are not neighbours: seen
    made, metrics = estimated(grpo(**settings))
    np.testing.assert_allclose(made.advantages, np.where(MASK, np.asarray(wanted)[:, None], 0), atol=1e-5)
    assert metrics["objective/groups_alike"] == pytest.approx(1 / 3)
    assert metrics["objective/scores"] == pytest.approx(np.mean(SCORES))


def test_the_penalty_is_taken_from_the_score_of_the_whole_response():
    kl = np.where(MASK, np.asarray(ROLLOUT.log_probs - ROLLOUT.ref_log_probs, np.float64), 0).sum(axis=1)
    rewards = (np.asarray(SCORES) - 0.3 * kl).reshape(-1, GROUP)
    made, metrics = estimated(grpo(deviation="none"), kl_coef=0.3)
    wanted = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(made.advantages, np.where(MASK, wanted[:, None], 0), atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], -0.3 * kl.mean(), rtol=1e-5)
    assert metrics["objective/groups_alike"] == pytest.approx(1 / 3)  # of their scores, whatever their KL


def test_responses_without_an_end_score_as_the_rule_says():
    scores = np.where(np.asarray(ROLLOUT.finished), SCORES, -4.0).reshape(-1, GROUP)
    made, metrics = estimated(grpo(deviation="none", missing_eos="replace", missing_eos_value=-4.0))
    wanted = (scores - scores.mean(axis=1, keepdims=True)).reshape(-1, 1)
    np.testing.assert_allclose(made.advantages, np.where(MASK, wanted, 0), atol=1e-5)
    assert metrics["objective/scores"] == pytest.approx(scores.mean())
    assert metrics["objective/groups_alike"] == pytest.approx((scores == scores[:, :1]).all(axis=1).mean())


def test_long_responses_are_punished_before_they_are_compared():
    # of 5 tokens the last 2 cost ½ each
    punished = np.asarray(SCORES) - np.select([LENGTHS == 5, LENGTHS == 4], [1.0, 0.5])
    made, metrics = estimated(grpo(deviation="none", overlong=2))
    wanted = (punished.reshape(-1, GROUP) - punished.reshape(-1, GROUP).mean(axis=1, keepdims=True)).reshape(-1, 1)
    np.testing.assert_allclose(made.advantages, np.where(MASK, wanted, 0), atol=1e-5)
    assert metrics["objective/overlong_penalty"] == pytest.approx((punished - SCORES).mean())
    assert metrics["objective/scores"] == pytest.approx(np.mean(SCORES))
    assert metrics["objective/rlhf_reward"] == pytest.approx(punished.mean())


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("score", [0.5, 10000.1])
def test_groups_of_equal_scores_teach_nothing(average, score):
    # fails at 10000.1 with a deviation from the mean, which is rounded: seen
    made, metrics = estimated(grpo(), [score] * ROWS)
    assert metrics["objective/groups_alike"] == 1
    assert metrics["objective/scores_std"] == 0
    assert (np.asarray(made.advantages) == 0).all()
    loss, _, gradient = loss_and_gradient(grpo(beta=0.0, average=average), on_policy(made))
    assert (loss, np.abs(gradient).max()) == (0, 0)


def shares(average):
    """What a token of each row counts."""
    each = {"sequence": 1 / (ROWS * LENGTHS), "token": 1 / LENGTHS.sum(), "constant": 1 / (ROWS * WIDTH)}
    return np.broadcast_to(each[average], ROWS)


# fails with k3 of the wrong sign: seen; meant to catch a mean over padding and another average
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_first_gradient_is_that_of_reinforce(average, beta):
    made = on_policy(estimated(grpo())[0])
    p = np.asarray(jax.nn.softmax(table()["policy"]), np.float64)
    ref, response = np.asarray(ROLLOUT.ref_log_probs, np.float64), np.asarray(ROLLOUT.response)
    wanted, penalty = np.zeros((ROWS, WIDTH, 16)), 0.0
    for row, (length, share) in enumerate(zip(LENGTHS, shares(average), strict=True)):
        for t in range(length):
            x = ref[row, t] - np.log(p[row, t, response[row, t]])
            penalty += share * (np.exp(x) - 1 - x)
            slope = -float(made.advantages[row, t]) + beta * (1 - np.exp(x))
            wanted[row, t] = share * slope * (np.eye(16)[response[row, t]] - p[row, t])
    loss, metrics, gradient = loss_and_gradient(grpo(average=average, beta=beta), made)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/kl_avg"], penalty, rtol=1e-4)
    np.testing.assert_allclose(loss, float(metrics["loss/policy_avg"]) + beta * penalty, rtol=1e-4)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert (float(metrics["policy/clipfrac_avg"]), float(metrics["val/ratio_err"])) == (0, pytest.approx(0, abs=1e-6))


def test_ratios_are_clipped_by_their_own_bound_on_each_side():
    # rows of one token; ratios 1.25 and 1.5 against 1.3 above, 0.9 and 0.7 against 0.8 below; advantages of both signs
    ratios, advantages = np.asarray([1.25, 1.5, 1.5, 0.9, 0.7, 0.7]), np.asarray([1, 1, -1, -1, -1, 1.0])
    wanted = -np.asarray([1.25, 1.3, -1.5, -0.9, -0.8, 0.7])
    some = jax.tree.map(lambda x: x[:6], estimated(grpo())[0])
    mask = jnp.zeros((6, WIDTH), bool).at[:, 0].set(True)
    rollout = replace(some.rollout, response_mask=mask, log_probs=jnp.full((6, WIDTH), -3.0))
    made = replace(
        some, rollout=rollout, advantages=jnp.where(mask, jnp.asarray(advantages, jnp.float32)[:, None], 0.0)
    )
    algorithm = grpo(lambda params, made: (params["policy"], params["policy"]), clip_high=0.3, beta=0.0)
    params = {"policy": jnp.broadcast_to(jnp.asarray(np.log(ratios) - 3, jnp.float32)[:, None], (6, WIDTH))}
    loss, metrics, gradient = loss_and_gradient(algorithm, made, params)
    assert loss == pytest.approx(wanted.mean(), rel=1e-5)
    assert metrics["policy/clipfrac_avg"] == pytest.approx(2 / 6)
    np.testing.assert_allclose(gradient[:, 0], [-1.25 / 6, 0, 1.5 / 6, 0.9 / 6, 0, -0.7 / 6], rtol=1e-4)


# fails when the tokens of a response are counted by row: seen
@pytest.mark.parametrize("dynamic", [False, True], ids=["all", "dynamic"])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_loss_is_that_of_loops_however_tokens_lie_in_rows(average, dynamic):
    shift, high, beta = 0.2, 0.3, 0.1
    algorithm = grpo(moved, average=average, clip_high=high, beta=beta, dynamic_sampling=dynamic)
    made, _ = estimated(algorithm)
    losses, kls, clipped = [], [], 0
    for new, old, ref, advantages in float64(made, shift):
        rho = np.exp(new - old)
        bounded = np.clip(rho, 1 - 0.2, 1 + high)
        losses.append(np.maximum(-advantages * rho, -advantages * bounded))
        kls.append(np.exp(ref - new) - 1 - (ref - new))
        clipped += (-advantages * bounded > -advantages * rho).sum()
    held = [len(x) for x in losses if len(x)]
    assert len(held) == (ROWS - GROUP if dynamic else ROWS)  # the group of equal scores is left out
    assert clipped > 0
    averaged = {
        "sequence": lambda rows: np.mean([row.mean() for row in rows if len(row)]),
        "token": lambda rows: np.concatenate(rows).mean(),
        "constant": lambda rows: np.concatenate(rows).sum() / (WIDTH * len(held)),
    }[average]
    for batch in (made, *packings(made)):
        loss, metrics = loss_of(algorithm, shift, batch)
        assert float(loss) == pytest.approx(averaged(losses) + beta * averaged(kls), rel=1e-5)
        assert float(metrics["loss/policy_avg"]) == pytest.approx(averaged(losses), rel=1e-4)
        assert float(metrics["policy/clipfrac_avg"]) == pytest.approx(clipped / sum(held), rel=1e-5)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 3], made) for i in range(0, ROWS, 3)]
    summed = sum(loss_of(algorithm, shift, part, made)[0] for part in parts)
    assert float(summed) == pytest.approx(averaged(losses) + beta * averaged(kls), rel=1e-5)


def test_a_batch_without_any_informative_group_gives_zero_and_no_nan():
    algorithm = grpo(dynamic_sampling=True)
    made, _ = estimated(algorithm, [2.0] * ROWS)
    loss, metrics, gradient = loss_and_gradient(algorithm, on_policy(made))
    assert (loss, np.abs(gradient).max()) == (0, 0)
    assert all(np.isfinite(value) for value in metrics.values())


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        grpo(average="mean")
    for settings in ({"average": "constant"}, {"overlong": 2}):
        with pytest.raises(ValueError, match="expected longest"):
            grpo(longest=None, **settings)


def test_the_policy_becomes_the_reference_times_exp_reward_over_beta():
    # meant to catch half or twice the penalty, and groups that mix prompts; with the average over responses short ones
    # would count more, and the optimum be another
    settings = {"group": 8, "beta": 0.0, "deviation": "none", "average": "token"}
    policy, objective = learned(lambda log_probs: grpo(log_probs, **settings))
    assert objective[-20:].mean() > objective[:20].mean() + 0.3
    assert_optimal(policy, within=0.02)
