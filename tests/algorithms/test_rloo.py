"""RLOO against hand-worked advantages, losses and gradients by loops in float64, and the optimum of a small world."""

import jax
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
    estimated,
    float64,
    loss_and_gradient,
    loss_of,
    moved,
    on_policy,
    packings,
    table,
)
from rlhfjax.algorithms.rloo import Rloo

TABLE = log_probs_from(lambda params, rollout: params["policy"])


def rloo(log_probs=TABLE, **settings) -> Rloo:
    """RLOO over a table: logits of each position of each row are the parameters themselves."""
    return Rloo(log_probs, **({"group": GROUP, "missing_eos": "keep"} | settings))


def test_advantages_by_hand():
    # 1 − (2 + 3 + 6) / 3 and so on. Fails with the response itself in its baseline
    made, metrics = estimated(rloo())
    third = 1 / 3
    wanted = [-8 * third, -4 * third, 0, 4, 0, 0, 0, 0, -4 * third, 0, 0, 4 * third]
    np.testing.assert_allclose(made.advantages, np.where(MASK, np.asarray(wanted)[:, None], 0), atol=1e-5)
    assert metrics["objective/groups_alike"] == pytest.approx(third)
    assert metrics["objective/scores"] == pytest.approx(np.mean(SCORES))


def test_the_kl_of_the_whole_response_is_part_of_what_is_compared():
    kl = np.where(MASK, np.asarray(ROLLOUT.log_probs - ROLLOUT.ref_log_probs, np.float64), 0).sum(axis=1)
    scores = np.where(np.asarray(ROLLOUT.finished), SCORES, np.asarray(SCORES) - 2.0)
    rewards = scores - 0.3 * kl
    made, metrics = estimated(rloo(missing_eos="subtract", missing_eos_value=2.0), kl_coef=0.3)
    for row in range(ROWS):
        others = [i for i in range(ROWS) if i // GROUP == row // GROUP and i != row]
        wanted = rewards[row] - rewards[others].mean()
        np.testing.assert_allclose(made.advantages[row], np.where(MASK[row], wanted, 0), atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], -0.3 * kl.mean(), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_the_first_gradient_is_that_of_reinforce(ratio, clip):
    # of the mean over responses of A log π(y), whatever their lengths. Fails with a mean over tokens
    made = on_policy(estimated(rloo())[0])
    p, response = np.asarray(jax.nn.softmax(table()["policy"]), np.float64), np.asarray(ROLLOUT.response)
    wanted = np.zeros(p.shape)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            wanted[row, t] = -float(made.advantages[row, t]) * (np.eye(16)[response[row, t]] - p[row, t]) / ROWS
    _, metrics, gradient = loss_and_gradient(rloo(ratio=ratio, clip=clip), made)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-6)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert (float(metrics["policy/clipfrac_avg"]), float(metrics["val/ratio_err"])) == (0, pytest.approx(0, abs=1e-6))


# fails when a response counts once per token, and when its ratio is that of its row
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_the_loss_is_that_of_loops_however_tokens_lie_in_rows(ratio, clip):
    shift, algorithm = 0.2, rloo(moved, ratio=ratio, clip=clip)
    made, _ = estimated(algorithm)
    losses, clipped, counted = 0.0, 0, 0
    for new, old, _, advantages in float64(made, shift):
        rho = np.exp([np.sum(new - old)]) if ratio == "sequence" else np.exp(new - old)
        advantages = advantages[: len(rho)]
        bounded = rho if clip is None else np.clip(rho, 1 - clip, 1 + clip)
        losses += np.maximum(-advantages * rho, -advantages * bounded).sum() / ROWS
        clipped += (-advantages * bounded > -advantages * rho).sum()
        counted += len(rho)
    assert (clipped > 0) == (clip is not None)
    for batch in (made, *packings(made)):
        loss, metrics = loss_of(algorithm, shift, batch)
        assert float(loss) == pytest.approx(losses, rel=1e-5)
        assert float(metrics["policy/clipfrac_avg"]) == pytest.approx(clipped / counted, rel=1e-5)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 3], made) for i in range(0, ROWS, 3)]
    summed = sum(loss_of(algorithm, shift, part, made)[0] for part in parts)
    assert float(summed) == pytest.approx(losses, rel=1e-5)


def test_equal_scores_of_one_group_teach_nothing():
    made, metrics = estimated(rloo(group=ROWS), [10000.1] * ROWS)
    assert metrics["objective/groups_alike"] == 1
    loss, _, gradient = loss_and_gradient(rloo(group=ROWS), on_policy(made))
    assert (loss, np.abs(gradient).max()) == (0, 0)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="'word'"):
        rloo(ratio="word")
    with pytest.raises(ValueError, match="at least 2 responses"):
        estimated(rloo(group=1))


def test_the_policy_becomes_the_reference_times_exp_reward_over_beta():
    # meant to catch half or twice the penalty, groups that mix prompts, and a mean over tokens
    policy, objective = learned(lambda log_probs: rloo(log_probs, group=4))
    assert objective[-20:].mean() > objective[:20].mean() + 0.3
    assert_optimal(policy, within=0.02)
