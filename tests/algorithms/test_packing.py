"""Packed rows hold every token of a rollout once, and what is computed of them comes back to its place."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experience, left_mask, right_mask

from rlhfjax.algorithms.packing import on_packed, pack, packed_experience

ROWS, PROMPT, RESPONSE = 12, 5, 6
MADE = experience(ROWS, PROMPT, RESPONSE)
ROLLOUT = MADE.rollout
PACK = jax.jit(pack, static_argnums=1)


def sequences():
    """Each sequence as a list of tokens, and how many of them are the prompt's."""
    for i in range(ROWS):
        prompt = np.asarray(ROLLOUT.prompt[i])[np.asarray(ROLLOUT.prompt_mask[i])]
        response = np.asarray(ROLLOUT.response[i])[np.asarray(ROLLOUT.response_mask[i])]
        yield [*prompt.tolist(), *response.tolist()], len(prompt)


@pytest.mark.parametrize("part", [1, 3, 5, 12])
def test_every_sequence_is_there_once_in_one_piece(part):
    # meant to catch a prompt that loses its first token, and positions that go on from the sequence before
    packing = PACK(ROLLOUT, part)
    batch = packing.tokens(ROLLOUT)
    assert batch.tokens.shape == (-(-ROWS // part), part, PROMPT + RESPONSE)
    tokens, segments, positions, targets = (
        np.asarray(x).reshape(-1, PROMPT + RESPONSE)
        for x in (batch.tokens, batch.segments, batch.positions, batch.loss_mask)
    )
    found = []
    for row in range(len(tokens)):
        for number in range(1, segments[row].max() + 1):
            at = np.flatnonzero(segments[row] == number)
            assert (np.diff(at) == 1).all()
            assert positions[row, at].tolist() == list(range(len(at)))
            marked = targets[row, at]
            assert (np.diff(marked.astype(int)) >= 0).all()  # the prompt first
            found.append((tokens[row, at].tolist(), len(at) - marked.sum()))
    assert sorted(found) == sorted(sequences())
    empty = segments == 0
    assert not targets[empty].any()
    used_rows = (segments > 0).any(axis=1).sum()
    assert packing.used == -(-used_rows // part) < -(-ROWS // part) or part == ROWS
    assert (segments[: int(packing.used) * part] > 0).any(axis=1).sum() == used_rows


@pytest.mark.parametrize("part", [1, 5])
@pytest.mark.parametrize("prompts", [(1, 1), (1, 3), (1, PROMPT), (PROMPT, PROMPT)])
@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_no_more_response_tokens_than_one_response_may(seed, prompts, part):
    # fails when rows are filled by length alone: seen, short prompts leave room for the tokens of two responses
    rng = np.random.default_rng(seed)
    before = rng.integers(prompts[0], prompts[1] + 1, ROWS)
    lengths = rng.integers(1, RESPONSE + 1, ROWS)
    lengths[:2] = RESPONSE, 1
    rollout = replace(ROLLOUT, prompt_mask=left_mask(before, PROMPT), response_mask=right_mask(lengths, RESPONSE))
    packing = PACK(rollout, part)
    batch = packing.tokens(rollout)
    assert batch.most == RESPONSE
    held = np.asarray(batch.loss_mask).sum(axis=-1)
    assert held.max() <= RESPONSE
    assert held.sum() == lengths.sum()
    assert np.asarray(batch.segments > 0).sum() == before.sum() + lengths.sum()
    assert np.asarray(batch.segments.max(axis=-1)).sum() == ROWS
    assert not np.asarray(batch.segments)[int(packing.used) :].any()
    back = packing.unpacked(batch.tokens.astype(jnp.float32), rollout.response_mask)
    np.testing.assert_array_equal(back, jnp.where(rollout.response_mask, rollout.response, 0))


@pytest.mark.parametrize("part", [1, 5])
def test_what_is_computed_comes_back_to_its_token(part):
    def of_rows(batch):  # of its own token, and of the one before it
        before = jnp.pad(batch.tokens[:, :-1], ((0, 0), (1, 0)))
        return {"own": batch.tokens.astype(jnp.float32), "before": before.astype(jnp.float32)}

    got = jax.jit(lambda rollout: on_packed(part, rollout, of_rows))(ROLLOUT)
    mask, response = np.asarray(ROLLOUT.response_mask), np.asarray(ROLLOUT.response)
    np.testing.assert_array_equal(got["own"], np.where(mask, response, 0))
    before = np.concatenate([np.asarray(ROLLOUT.prompt)[:, -1:], response[:, :-1]], axis=1)
    np.testing.assert_array_equal(got["before"], np.where(mask, before, 0))


def test_parts_that_hold_nothing_are_not_computed():
    calls = []

    def of_rows(batch):
        jax.debug.callback(lambda: calls.append(1))
        return batch.tokens.astype(jnp.float32)

    jax.block_until_ready(jax.jit(lambda rollout: on_packed(1, rollout, of_rows))(ROLLOUT))
    jax.effects_barrier()
    assert len(calls) == int(jax.jit(lambda rollout: pack(rollout, 1).used)(ROLLOUT)) < ROWS


def test_experience_moves_with_its_tokens():
    packed, used = jax.jit(packed_experience, static_argnums=0)(4, MADE)
    assert int(used) <= 3
    mask = np.asarray(packed.mask)
    for name in ("log_probs", "ref_log_probs", "values", "advantages", "returns"):
        got, wanted = np.asarray(getattr(packed, name)), np.asarray(getattr(MADE, name))
        assert sorted(got[mask].tolist()) == sorted(wanted[np.asarray(MADE.mask)].tolist())
        assert (got[~mask] == 0).all()
    pairs = set(zip(np.asarray(packed.advantages)[mask], np.asarray(packed.returns)[mask], strict=True))
    real = np.asarray(MADE.mask)
    assert pairs == set(zip(np.asarray(MADE.advantages)[real], np.asarray(MADE.returns)[real], strict=True))
