"""Responses that are dropped: what is learned from the others is to the last digit what it is without them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experience, log_probs_from

from algorithms.groups_of_responses import GROUP, MASK, ROLLOUT, ROWS, SCORES, loss_and_gradient, on_policy, table
from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.algorithms.ppo import Ppo
from rlhfjax.algorithms.rloo import Rloo
from rlhfjax.algorithms.scored_rollouts import without_dropped
from rlhfjax.config.rewards import KINDS
from rlhfjax.functional import group_relative, leave_one_out
from rlhfjax.stages.rewards import Judges

KEPT = np.array([1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1], bool)  # one of each group of four is dropped
TABLE = log_probs_from(lambda params, rollout: params["policy"])


def rows_of(rollout, rows):
    return jax.tree.map(lambda x: x[rows], rollout)


def estimated(algorithm, rollout, kl_coef=0.3):
    return jax.jit(lambda r: algorithm.estimate(without_dropped(r), jnp.float32(kl_coef)))(rollout)


ALGORITHMS = {
    "ppo": (
        lambda size: Ppo(TABLE, lambda params, made: params["policy"][..., 0]),
        replace(experience(ROWS, 3, 5).rollout, kept=jnp.asarray(KEPT)),
    ),
    **{
        f"grpo/{average}": (
            lambda size, average=average: Grpo(TABLE, size, average=average, longest=5, overlong=3),
            replace(ROLLOUT, scores=jnp.asarray(SCORES, jnp.float32), kept=jnp.asarray(KEPT)),
        )
        for average in ("sequence", "token")
    },
    "rloo": (
        lambda size: Rloo(TABLE, size),
        replace(ROLLOUT, scores=jnp.asarray(SCORES, jnp.float32), kept=jnp.asarray(KEPT)),
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_learned_is_what_it_is_without_those_that_are_dropped(name):
    algorithm, rollout = ALGORITHMS[name]
    whole, alone = algorithm(GROUP), algorithm(GROUP - 1)
    made, metrics = estimated(whole, rollout)
    wanted, measured = estimated(alone, rows_of(replace(rollout, kept=None), KEPT))
    np.testing.assert_allclose(made.advantages[KEPT], wanted.advantages, atol=1e-6)
    np.testing.assert_array_equal(made.advantages[~KEPT], 0.0)
    np.testing.assert_array_equal(np.asarray(made.mask), MASK & KEPT[:, None])
    assert metrics.keys() == measured.keys()
    for key, value in measured.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    loss, _, gradient = loss_and_gradient(whole, on_policy(made))
    params = {"policy": table()["policy"][KEPT]}
    log_probs = on_policy(made).rollout.log_probs[KEPT]
    wanted = replace(wanted, rollout=replace(wanted.rollout, log_probs=log_probs))
    other, _, slope = loss_and_gradient(alone, wanted, params)
    assert loss == pytest.approx(other, abs=1e-6)
    np.testing.assert_allclose(gradient[KEPT], slope, atol=1e-6)
    np.testing.assert_array_equal(gradient[~KEPT], 0.0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_where_all_are_dropped_nothing_is_learned(name):
    algorithm, rollout = ALGORITHMS[name]
    made, metrics = estimated(algorithm(GROUP), replace(rollout, kept=jnp.zeros(ROWS, bool)))
    loss, _, gradient = loss_and_gradient(algorithm(GROUP), made)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, 0.0)
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_group_of_which_one_is_kept_has_nothing_to_prefer():
    scores, mask = jnp.asarray([[5.0, 1.0, 3.0]]), jnp.asarray([[True, False, False]])
    assert jax.jit(group_relative)(scores, present=mask).tolist() == [[0.0, 0.0, 0.0]]
    assert jax.jit(leave_one_out)(scores, present=mask).tolist() == [[0.0, 0.0, 0.0]]
    two = jnp.asarray([[True, False, True]])
    np.testing.assert_allclose(jax.jit(leave_one_out)(scores, present=two), [[2.0, 0.0, -2.0]])
    np.testing.assert_allclose(jax.jit(group_relative)(scores, present=two), [[0.5**0.5, 0.0, -(0.5**0.5)]], rtol=1e-6)


@pytest.mark.parametrize("flagged", ["penalise", "drop"])
def test_what_moderation_flags_is_counted_and_marked(flagged):
    terms = [
        KINDS["moderation"].model_validate({"moderation": {"policy": "default", "flagged": flagged}, "weight": 2.0}),
        KINDS["length"].model_validate({"length": {"target": 4}}),
    ]
    given = {"moderation": jnp.where(jnp.asarray(KEPT), 0.0, -1.0), "length": jnp.full(ROWS, -0.5)}
    rollout, metrics = jax.jit(Judges(tuple(terms), {}).total)(replace(ROLLOUT, rewards=given))
    np.testing.assert_array_equal(rollout.scores, np.where(KEPT, -0.5, -2.5))
    assert metrics["objective/flagged/moderation"] == 3.0
    assert metrics["objective/reward/moderation"] == pytest.approx(-3 / ROWS)
    assert (rollout.kept is None, metrics.get("objective/dropped")) == (
        (True, None) if flagged == "penalise" else (False, 3.0)
    )
    if flagged == "drop":
        np.testing.assert_array_equal(rollout.kept, KEPT)
