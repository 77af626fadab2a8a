"""Groups that teach something, and batches of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from algorithms.groups_of_responses import GROUP, ROLLOUT, ROWS, SCORES
from rlhfjax.algorithms.groups import chosen, differing, refilled
from rlhfjax.algorithms.grpo import Grpo


def test_groups_in_which_a_score_differs():
    assert differing(jnp.asarray(SCORES, jnp.float32), GROUP).tolist() == [True, False, True]
    assert differing(jnp.asarray([1.0, 2.0]), 1).tolist() == [False, False]


def test_what_the_rule_for_missing_ends_tells_apart_is_informative():
    rollout = replace(
        ROLLOUT,
        scores=jnp.zeros(ROWS),
        finished=jnp.asarray([True] * GROUP + [True, False, True, True] + [False] * GROUP),
    )
    for mode, wanted in (("keep", [False] * 3), ("replace", [False, True, False])):
        algorithm = Grpo(lambda params, made: (params, params), GROUP, missing_eos=mode)
        assert algorithm.informative(rollout).tolist() == wanted


def test_informative_groups_are_chosen_first_and_in_order():
    informative = jnp.asarray([False, True, False, True, True])
    assert chosen(informative, 2).tolist() == [1, 3]
    assert chosen(informative, 4).tolist() == [1, 3, 4, 0]


def test_a_batch_is_refilled_with_whole_groups_until_all_are_informative():
    def drawn(start):
        """A rollout whose rows have numbers from `start` on as scores."""
        return replace(ROLLOUT, scores=jnp.arange(start, start + ROWS, dtype=jnp.float32))

    refill = jax.jit(refilled)
    kept = drawn(0), jnp.asarray([False, True, False])
    kept = refill(*kept, drawn(100), jnp.asarray([False, False, True]))
    assert kept[0].scores.tolist() == [*range(4, 8), *range(108, 112), *range(4)]
    assert kept[1].tolist() == [True, True, False]
    kept = refill(*kept, drawn(200), jnp.asarray([True, True, True]))
    assert kept[0].scores.tolist() == [*range(4, 8), *range(108, 112), *range(200, 204)]
    assert kept[1].all()
    rows = np.r_[4:8, 8:12, 0:4]
    np.testing.assert_array_equal(kept[0].response, np.asarray(ROLLOUT.response)[rows])
