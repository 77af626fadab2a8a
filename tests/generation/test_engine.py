"""The sampler, mostly on a table of logits: what it draws, when it stops, what it reports."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from bigram import Bigram
from tiny import left_mask, params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, generate
from rlhfjax.types import PromptBatch

STOP, PAD = 5, 0
LOGITS = np.asarray([1.0, 0.2, -0.7, 2.0, -2.5, 0.4], np.float32)


def prompts(count: int, last: int = 0) -> PromptBatch:
    tokens = jnp.full((count, 2), last, jnp.int32)
    return PromptBatch(tokens, jnp.ones((count, 2), bool), jnp.arange(count, dtype=jnp.int32))


def sampled(params, batch, key, **changes):
    sampling = replace(SamplingParams(max_new_tokens=1, stop_id=STOP, pad_id=PAD), **changes)
    return jax.jit(lambda p, b, k: generate(Bigram(), p, b, k, sampling))(params, batch, key)


TABLE = jnp.asarray(np.random.default_rng(0).normal(0, 1.2, (6, 6)), jnp.float32)


def softmax(z):
    weights = np.exp(z - z.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_twenty_thousand_draws_follow_the_softmax(temperature):
    # meant to catch a temperature that multiplies, and rows of a batch that share their noise
    count = 20_000
    params = jnp.broadcast_to(jnp.asarray(LOGITS)[None, :], (6, 6))
    drawn = sampled(params, prompts(count), jax.random.key(3), temperature=temperature)
    expected = softmax(LOGITS.astype(np.float64) / temperature)
    counts = np.bincount(drawn.response[:, 0], minlength=6)
    assert scipy.stats.chisquare(counts, expected * count).pvalue > 1e-3
    np.testing.assert_allclose(
        drawn.sampled_log_probs[:, 0], np.log(expected)[np.asarray(drawn.response[:, 0])], rtol=1e-5, atol=1e-6
    )


def test_transitions_of_long_samples_follow_the_table():
    # meant to catch a position that reuses the key of another, and decode given the wrong token
    drawn = sampled(TABLE, prompts(2_000), jax.random.key(4), max_new_tokens=12, stop_after=12)
    tokens = np.concatenate([np.zeros((2_000, 1), int), np.asarray(drawn.response)], axis=1)
    for before in range(6):
        after = np.bincount(tokens[:, 1:][tokens[:, :-1] == before], minlength=6)
        expected = softmax(np.asarray(TABLE[before], np.float64))
        assert scipy.stats.chisquare(after, expected * after.sum()).pvalue > 1e-4


def test_greedy_takes_the_largest_and_needs_no_luck():
    first = sampled(TABLE, prompts(3, last=2), jax.random.key(0), temperature=0.0, max_new_tokens=4, stop_after=9)
    token, wanted = 2, []
    for _ in range(4):
        token = int(np.argmax(TABLE[token]))
        wanted.append(token)
    assert first.response.tolist() == [wanted] * 3
    again = sampled(TABLE, prompts(3, last=2), jax.random.key(1), temperature=0.0, max_new_tokens=4, stop_after=9)
    np.testing.assert_array_equal(first.response, again.response)
    states = np.asarray([2, *wanted[:-1]])
    expected = [np.log(softmax(np.asarray(TABLE[s])))[w] for s, w in zip(states, wanted, strict=True)]
    np.testing.assert_allclose(first.sampled_log_probs[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "kept"),
    # probabilities .196 .088 .036 .533 .006 .108 ... in descending order 3, 0, 5, 1, 2, 4
    [({"top_k": 2}, {3, 0}), ({"top_p": 0.6}, {3, 0}), ({"top_p": 0.8}, {3, 0, 5}), ({"top_k": 1, "top_p": 1.0}, {3})],
)
def test_filters_cut_the_draw_but_not_its_log_probability(changes, kept):
    # not the log-probabilities of the filtered distribution: RL needs those of the policy
    params = jnp.broadcast_to(jnp.asarray(LOGITS)[None, :], (6, 6))
    drawn = sampled(params, prompts(400), jax.random.key(5), temperature=1.0, **changes)
    tokens = np.asarray(drawn.response[:, 0])
    assert set(tokens.tolist()) == kept
    expected = np.log(softmax(LOGITS.astype(np.float64)))
    np.testing.assert_allclose(drawn.sampled_log_probs[:, 0], expected[tokens], rtol=1e-5)


@pytest.mark.parametrize("stop_after", [0, 2])
def test_lengths_masks_and_padding(stop_after):
    """Against a loop over each row: it ends at its first stop token from `stop_after` on, which belongs to it.

    The id that pads is drawn as a token, too, and then counts. Meant to catch a mask from `ids != pad`, a stop token
    that is masked, a `stop_after` that is off by one, and padding that keeps a log-probability.
    """
    drawn = sampled(TABLE, prompts(300), jax.random.key(6), max_new_tokens=8, stop_after=stop_after)
    free = sampled(TABLE, prompts(300), jax.random.key(6), max_new_tokens=8, stop_after=99)
    padding_drawn, ended = 0, 0
    for row in range(300):
        tokens = np.asarray(free.response[row])
        ends = [t for t in range(stop_after, 8) if tokens[t] == STOP]
        length = ends[0] + 1 if ends else 8
        assert bool(drawn.finished[row]) == bool(ends)
        assert drawn.response_mask[row].tolist() == [t < length for t in range(8)]
        assert drawn.response[row].tolist() == [*tokens[:length].tolist(), *[PAD] * (8 - length)]
        np.testing.assert_array_equal(drawn.sampled_log_probs[row, :length], free.sampled_log_probs[row, :length])
        assert (np.asarray(drawn.sampled_log_probs[row, length:]) == 0).all()
        padding_drawn += int((tokens[: length - 1] == PAD).sum())
        ended += bool(ends)
    assert padding_drawn > 50
    assert 50 < ended < 300


def test_one_token_and_an_end_at_once():
    always = jnp.full((6, 6), -30.0).at[:, STOP].set(30.0)
    ended = sampled(always, prompts(2), jax.random.key(0), max_new_tokens=3)
    assert ended.response.tolist() == [[STOP, PAD, PAD]] * 2
    assert ended.response_mask.sum() == 2
    assert bool(ended.finished.all())
    never = sampled(-always, prompts(2), jax.random.key(0), max_new_tokens=1)
    assert never.response_mask.tolist() == [[True]] * 2
    assert not never.finished.any()


def test_rollout_carries_the_prompt_and_nothing_of_the_models():
    drawn = sampled(TABLE, prompts(2, last=3), jax.random.key(0))
    assert drawn.prompt.tolist() == [[3, 3]] * 2
    assert (drawn.scores, drawn.values, drawn.log_probs, drawn.ref_log_probs) == (None, None, None, None)
    dtypes = (drawn.response.dtype, drawn.response_mask.dtype, drawn.sampled_log_probs.dtype)
    assert dtypes == (jnp.int32, jnp.bool_, jnp.float32)


@pytest.fixture(scope="module")
def decoder():
    model = tiny()
    sampling = SamplingParams(max_new_tokens=6, stop_id=1, pad_id=0, temperature=0.7)
    return params_of(model, seed=5), jax.jit(lambda p, b, k: generate(model, p, b, k, sampling))


def four_prompts() -> PromptBatch:
    return PromptBatch(random_tokens(4, 5), left_mask([5, 3, 1, 4], 5), jnp.asarray([70, 3, 11, 4], jnp.int32))


def test_a_sample_depends_on_its_uid_and_the_key_alone(decoder):
    # meant to catch row numbers or one batch-wide draw in place of the uid
    params, run = decoder
    batch, key = four_prompts(), jax.random.key(9)
    together = run(params, batch, key)
    np.testing.assert_array_equal(together.response, run(params, batch, jax.random.key(9)).response)
    order = jnp.asarray([2, 0, 3, 1])
    shuffled = run(params, jax.tree.map(lambda x: x[order], batch), key)
    np.testing.assert_array_equal(shuffled.response, together.response[order])
    np.testing.assert_allclose(shuffled.sampled_log_probs, together.sampled_log_probs[order], rtol=1e-5, atol=1e-6)
    for row in range(4):
        alone = run(params, jax.tree.map(lambda x, i=row: x[i : i + 1], batch), key)
        np.testing.assert_array_equal(alone.response[0], together.response[row])
        np.testing.assert_array_equal(alone.response_mask[0], together.response_mask[row])


def test_other_keys_and_other_uids_draw_other_responses(decoder):
    params, run = decoder
    batch, key = four_prompts(), jax.random.key(9)
    together = run(params, batch, key)
    other_key = run(params, batch, jax.random.key(10))
    other_uid = run(params, replace(batch, uid=batch.uid + 1), key)
    same_prompt = run(params, jax.tree.map(lambda x: x[jnp.zeros(4, jnp.int32)], replace(batch, uid=batch.uid)), key)
    assert (other_key.response != together.response).any(axis=1).all()
    assert (other_uid.response != together.response).any(axis=1).all()
    np.testing.assert_array_equal(same_prompt.response, same_prompt.response[:1].repeat(4, axis=0))
