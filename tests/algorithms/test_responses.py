"""Counts and sums over responses, against loops over the rows that they come from."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from algorithms.groups_of_responses import GROUP, LENGTHS, MASK, ROLLOUT, ROWS, packings
from rlhfjax.algorithms.responses import first_tokens, response_counts, response_sums
from rlhfjax.types import Experience

MADE = Experience(ROLLOUT, ROLLOUT.log_probs, ROLLOUT.values)


def test_every_response_has_one_first_token():
    # fails when two responses that are neighbours in a row are taken for one
    assert first_tokens(MADE)[:, 0].all()
    assert first_tokens(MADE).sum() == ROWS
    for packed in packings(MADE):
        assert (np.asarray(packed.batch.segments) > 1).any()
        assert first_tokens(packed).sum() == ROWS
        assert not (np.asarray(first_tokens(packed)) & ~np.asarray(packed.mask)).any()


def counted(batch):
    return {name: float(count) for name, count in response_counts(batch).items()}


def test_responses_without_tokens_are_not_counted():
    mask = MASK & (np.arange(ROWS) >= GROUP)[:, None]
    made = replace(MADE, rollout=replace(ROLLOUT, response_mask=jnp.asarray(mask)))
    for batch in (made, *packings(made)):
        assert counted(batch) == {"responses": ROWS - GROUP, "tokens": LENGTHS[GROUP:].sum()}
    nothing = replace(MADE, rollout=replace(ROLLOUT, response_mask=jnp.zeros_like(ROLLOUT.response_mask)))
    assert counted(nothing) == {"responses": 1, "tokens": 1}  # what a sum of nothing is divided by


def test_sums_are_those_of_each_response():
    wanted = [np.asarray(ROLLOUT.values, np.float64)[i, : LENGTHS[i]].sum() for i in range(ROWS)]
    np.testing.assert_allclose(response_sums(MADE, MADE.values), np.broadcast_to(wanted, (5, ROWS)).T, rtol=1e-5)
    for packed in packings(MADE):
        sums = np.asarray(response_sums(packed, packed.values))[np.asarray(first_tokens(packed))]
        np.testing.assert_allclose(np.sort(sums), np.sort(wanted), rtol=1e-4, atol=1e-6)
