"""Prompts that are read in chunks, some of them by others before: the same bits, from fewer tokens."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import params_of, tiny

from rlhfjax.errors import ConfigError
from rlhfjax.generation import Engine, Programs, Response, Room, SamplingParams
from rlhfjax.generation.shelf import Place, Shelf

ROOM = Room(3, 60, 60, 60, biases=2, chunk=20)  # chunks wide enough that short rests have a program of their own
MODEL = tiny("llama-gqa", layers=2, context=64)
HOW = SamplingParams(8, 5, 0, temperature=0.8, stop_after=99)


def test_a_prompt_goes_where_most_of_it_is():
    shelf = Shelf(3, chunk=2)
    assert shelf.place([1, 2, 3, 4, 5], [0, 1, 2]) == Place(0, 0, 0)
    for part in ([1, 2], [3, 4], [5]):
        shelf.read(0, part)
    assert shelf.place([1, 2, 3, 4, 9], [1, 2]) == Place(1, 0, 4)  # its slot is taken: a copy of it
    shelf.read(1, [9])
    assert shelf.place([1, 2, 3, 4], [0, 1, 2]) == Place(2, 0, 2)  # the last token is always read; an unused slot
    shelf.read(2, [3, 4])
    assert shelf.place([1, 2, 3, 4, 5, 5], [0, 1, 2]) == Place(0, 0, 4)  # goes on where all of it is its beginning
    assert shelf.place([8, 8, 8], [0, 1, 2]) == Place(1, 1, 0)  # nothing alike: where the oldest was
    assert shelf.shared == 4 + 2 + 4


@pytest.fixture(scope="module")
def programs():
    return Programs(MODEL, params_of(MODEL))


def written(engine, *asked):
    """Responses to prompts one after the other, each ended before the next."""
    made = []
    for place, prompt in enumerate(asked):
        response = engine.submit(Response(prompt, HOW, jax.random.key(place), 0))
        list(engine.follow(response))
        made.append((response.tokens, response.log_probs))
    return made


def test_a_shared_prefix_changes_no_bit_of_a_response(programs):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 16, 45).tolist()
    chats = [first, [*first, 3, 7, 1], first[:41], [*first[:20], *rng.integers(0, 16, 30).tolist()], first]
    alone = [written(Engine(programs, ROOM), prompt)[0] for prompt in chats[:1]]
    for place, prompt in enumerate(chats[1:], 1):
        engine = Engine(programs, ROOM)
        response = engine.submit(Response(prompt, HOW, jax.random.key(place), 0))
        list(engine.follow(response))
        assert engine.shared == 0
        alone.append((response.tokens, response.log_probs))
    engine = Engine(programs, ROOM)
    assert written(engine, *chats) == alone
    assert engine.shared == 40 + 40 + 20 + 40
    whole = Engine(programs, replace(ROOM, chunk=None))
    for (tokens, log_probs), (others, their_log_probs) in zip(written(whole, *chats), alone, strict=True):
        assert tokens == others  # read at once, in other sums
        np.testing.assert_allclose(log_probs, their_log_probs, atol=1e-4)


def test_all_together_share_with_those_that_are_still_being_written(programs):
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, 16, 50).tolist()
    engine = Engine(programs, ROOM)
    samples = [engine.submit(Response(prompt, HOW, jax.random.key(0), uid)) for uid in range(5)]
    gone = engine.submit(Response(prompt[:30], HOW, jax.random.key(0), 9))
    engine.cancel(gone)
    while engine.busy:
        engine.step()
    assert engine.shared == 4 * 40
    for uid, one in enumerate(samples):
        alone = Engine(programs, ROOM)
        assert list(alone.follow(alone.submit(Response(prompt, HOW, jax.random.key(0), uid)))) == one.tokens
    assert len({tuple(one.tokens) for one in samples}) == 5


def test_a_prompt_given_up_half_read_leaves_what_was_read(programs):
    rng = np.random.default_rng(2)
    prompt, engine = rng.integers(0, 16, 50).tolist(), Engine(programs, ROOM)
    other = engine.submit(Response([1], replace(HOW, max_new_tokens=40), jax.random.key(0), 0))
    engine.step()
    half = engine.submit(Response(prompt, HOW, jax.random.key(0), 0))
    engine.step()  # two chunks, while another is under way
    assert (half.tokens, engine.free) == ([], 1)
    engine.cancel(half)
    assert engine.free == 2
    again = engine.submit(Response(prompt, HOW, jax.random.key(0), 0))
    list(engine.follow(again))
    assert engine.shared == 40
    fresh = Engine(programs, ROOM)
    assert list(fresh.follow(fresh.submit(Response(prompt, HOW, jax.random.key(0), 0)))) == again.tokens
    assert other.finish_reason is None


def test_biases_are_added_to_the_logits_and_are_no_other_program(programs):
    engine = Engine(programs, ROOM)
    plain, pushed, barred = (
        engine.submit(Response([3, 4], replace(HOW, temperature=0.0, bias=bias), jax.random.key(0)))
        for bias in ((), ((9, 100.0),), ((9, -100.0), (2, 1.5)))
    )
    while engine.busy:
        engine.step()
    assert pushed.tokens == [9] * 8
    assert 9 not in barred.tokens
    logits = jax.jit(MODEL.logits)
    ids = np.asarray([[3, 4, *barred.tokens]], np.int32)
    known = np.array(logits(params_of(MODEL), ids, np.ones(ids.shape, bool))[0, 1:-1])
    known[:, 9] -= 100
    known[:, 2] += 1.5
    np.testing.assert_array_equal(known.argmax(-1), barred.tokens)
    np.testing.assert_allclose(barred.log_probs, np.asarray(jax.nn.log_softmax(known)).max(-1), atol=1e-4)
    assert (programs.begin._cache_size(), programs.step._cache_size()) == (1, 1)
    assert plain.tokens != barred.tokens
    with pytest.raises(ConfigError, match="at most 2 tokens"):
        engine.submit(Response([3], replace(HOW, bias=((1, 1.0), (2, 1.0), (3, 1.0))), jax.random.key(0)))
