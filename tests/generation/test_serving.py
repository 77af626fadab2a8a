"""Programs and engines on a table of logits: one compilation for all settings, and responses that know no neighbour."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram import Bigram, some_settings
from tiny import params_of, tiny

from rlhfjax.errors import ConfigError
from rlhfjax.generation import Engine, Programs, Response, Room, SamplingParams, generate
from rlhfjax.models import EncoderDecoder, EncoderDecoderConfig
from rlhfjax.types import PromptBatch

STOP, WORDS = 5, 16
TABLE = jnp.asarray(np.random.default_rng(0).normal(0, 1.2, (WORDS, WORDS)), jnp.float32)
KEY = jax.random.key(7)


def asked(**changes) -> SamplingParams:
    return replace(SamplingParams(max_new_tokens=12, stop_id=STOP, pad_id=0), **changes)


def test_two_hundred_settings_are_one_program():
    programs, settings = Programs(Bigram(), TABLE), some_settings(200, WORDS, STOP)
    prompts = [[3], [1, 2, 6], [9, 4]]
    made = [programs.generate(prompts, KEY, one) for one in settings]
    assert programs.run._cache_size() == 1
    batch = PromptBatch(
        jnp.asarray([[0, 0, 3], [1, 2, 6], [0, 9, 4]], jnp.int32), jnp.ones((3, 3), bool), jnp.arange(3)
    )
    for drawn, one in list(zip(made, settings, strict=True))[:2]:
        wanted = generate(Bigram(), TABLE, batch, KEY, one)
        assert drawn.response.shape == (3, one.max_new_tokens)
        np.testing.assert_array_equal(np.where(drawn.response_mask, drawn.response, 0), wanted.response)
        np.testing.assert_array_equal(drawn.response_mask, wanted.response_mask)
        np.testing.assert_array_equal(drawn.finished, wanted.finished)
        np.testing.assert_allclose(drawn.sampled_log_probs, wanted.sampled_log_probs, atol=1e-5)

    # and the same tokens from an engine, two programs whoever is in it
    engine = Engine(programs, Room(4, 8, 16), block=2)
    answers = [engine.submit(Response([1, 2, 6], one, KEY, uid=1)) for one in settings]
    while engine.busy:
        engine.step()
    assert (programs.admit._cache_size(), programs.step._cache_size()) == (1, 1)
    for drawn, answer in zip(made, answers, strict=True):
        mask = drawn.response_mask[1]
        assert answer.tokens == drawn.response[1][mask].tolist()
        np.testing.assert_allclose(answer.log_probs, drawn.sampled_log_probs[1][mask], atol=1e-6)
        assert answer.finish_reason == ("stop" if drawn.finished[1] else "length")


@pytest.fixture(scope="module")
def programs():
    return Programs(Bigram(), TABLE)


def alone(programs: Programs, response: Response) -> Response:
    engine = Engine(programs, Room(3, 8, 16))
    copy = Response(response.prompt, response.sampling, response.key, response.uid, response.ends)
    assert list(engine.follow(engine.submit(copy))) == copy.tokens
    return copy


def test_a_response_does_not_depend_on_who_else_is_there_nor_on_when_it_came(programs):
    # fails when a slot keeps the noise, the settings or the position of the one before: seen
    rng = np.random.default_rng(3)
    asking = [
        Response(rng.integers(0, WORDS, rng.integers(1, 8)).tolist(), one, jax.random.key(i % 3), uid=i % 2)
        for i, one in enumerate(some_settings(14, WORDS, STOP))
    ]
    engine, waiting = Engine(programs, Room(3, 8, 16)), list(asking)
    while waiting or engine.busy:
        if waiting and rng.random() < 0.6:
            engine.submit(waiting.pop())
        engine.step()
    for response in asking:
        expected = alone(programs, response)
        assert (response.tokens, response.log_probs) == (expected.tokens, expected.log_probs)
        assert response.finish_reason == expected.finish_reason != "cancelled"


REAL = {
    "decoder": tiny("llama-gqa", layers=1),
    "encoder-decoder": EncoderDecoder(EncoderDecoderConfig(16, 1, 16, 2, 24, 32, start_id=2)),
}


@pytest.mark.parametrize("model", REAL.values(), ids=REAL)
def test_an_engine_writes_what_a_rollout_writes(model):
    # fails when a prompt is read into a slot that still has the tokens of another
    programs, sampling = Programs(model, params_of(model), narrowest=4), asked(max_new_tokens=8, stop_ids=(2, 3))
    prompts = [[6, 1, 3], [2, 9, 9, 4, 7], [3], [8, 8, 8, 8, 8, 8, 8]]
    made = programs.generate(prompts, KEY, sampling)
    engine = Engine(programs, Room(2, 8, 8))
    responses = [engine.submit(Response(prompt, sampling, KEY, uid)) for uid, prompt in enumerate(prompts)]
    while engine.busy:
        engine.step()
    for row, response in enumerate(responses):
        assert response.tokens == made.response[row][made.response_mask[row]].tolist()
    assert len({tuple(response.tokens) for response in responses}) == len(prompts)


def test_a_cancelled_response_frees_its_slot_at_the_next_step(programs):
    engine = Engine(programs, Room(2, 8, 16))
    endless = asked(max_new_tokens=16, stop_after=99)
    first, second, third = (engine.submit(Response([3], endless, KEY, uid)) for uid in range(3))
    engine.step()
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (2, 2, 0)  # one at admission, one of the step
    engine.cancel(first)
    engine.step()
    assert (len(first.tokens), first.finish_reason) == (2, "cancelled")
    assert (len(second.tokens), len(third.tokens)) == (3, 2)
    engine.cancel(third)
    never = engine.submit(Response([4], endless, KEY, 4))
    engine.cancel(never)
    last = engine.submit(Response([4], endless, KEY, 5))
    assert len(list(engine.follow(last))) == 16
    assert never.tokens == []
    for response in (second, last):
        assert (response.tokens, response.finish_reason) == (alone(programs, response).tokens, "length")
    assert third.tokens == alone(programs, third).tokens[:2]
    engine.cancel(last)
    assert last.finish_reason == "length"


def test_what_is_told_of_each_token_may_end_a_response_within_a_block(programs):
    free = alone(programs, Response([3], asked(max_new_tokens=16, stop_after=99), KEY))
    for block in (1, 4):
        engine, seen = Engine(programs, Room(1, 8, 16), block), []
        ended = Response([3], free.sampling, KEY, ends=lambda token, seen=seen: seen.append(token) or len(seen) == 3)
        after = engine.submit(ended), engine.submit(Response([3], free.sampling, KEY))
        while engine.busy:
            engine.step()
        assert (ended.tokens, seen, ended.finish_reason) == (free.tokens[:3], free.tokens[:3], "stop")
        assert after[1].tokens == free.tokens


def test_the_likeliest_tokens_of_an_engine(programs):
    engine = Engine(programs, Room(2, 8, 16, top_log_probs=4))
    response, none = (engine.submit(Response([3], asked(top_log_probs=count), KEY)) for count in (2, 0))
    list(engine.follow(response))
    before = [3, *response.tokens[:-1]]
    for token, top in zip(before, response.top_log_probs, strict=True):
        log_probs = np.asarray(jax.nn.log_softmax(TABLE[token]))
        assert list(top) == np.argsort(-log_probs)[:2].tolist()
        np.testing.assert_allclose(list(top.values()), log_probs[list(top)], atol=1e-5)
    assert none.top_log_probs == []


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "expected a prompt of 1 to 8 tokens .* got 0 and 12"),
        ([1] * 9, {}, "got 9 and 12"),
        ([1], {"max_new_tokens": 17}, "a response of 1 to 16, .* got 1 and 17"),
        ([1] * 8, {"max_new_tokens": 13}, "20 together, got 8 and 13"),
        ([1], {"stop_ids": tuple(range(8))}, "at most 8 stop ids, .* got 9"),
        ([1], {"top_log_probs": 1}, "0 top_log_probs"),
    ],
)
def test_more_than_there_is_room_for(programs, prompt, changes, message):
    engine = Engine(programs, Room(1, 8, 16, context=20))
    with pytest.raises(ConfigError, match=message):
        engine.submit(Response(prompt, asked(**changes), KEY))
    assert not engine.busy
