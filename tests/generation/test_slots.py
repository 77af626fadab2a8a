"""Continuous batching against the plain sampler: the same tokens, whatever shares the batch and whenever."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import left_mask, params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, generate, rollout, slots
from rlhfjax.models import EncoderDecoder, EncoderDecoderConfig
from rlhfjax.types import PromptBatch

ROWS, WIDTH = 7, 6
# Four of sixteen tokens end a response, so lengths differ and slots change hands in mid batch.
SAMPLING = SamplingParams(max_new_tokens=9, stop_id=1, pad_id=0, temperature=0.8, stop_ids=(2, 3, 4))
MODELS = {
    "decoder": tiny("llama-gqa"),
    "encoder-decoder": EncoderDecoder(EncoderDecoderConfig(16, 1, 16, 2, 24, 32, start_id=2)),
}


def prompts() -> PromptBatch:
    mask = left_mask([6, 1, 3, 2, 5, 3, 4], WIDTH)
    return PromptBatch(random_tokens(ROWS, WIDTH), mask, jnp.asarray([70, 3, 11, 4, 0, 8, 2], jnp.int32))


@cache
def plain(name: str):
    model = MODELS[name]
    made = jax.jit(lambda p, b, k: generate(model, p, b, k, SAMPLING))(params_of(model), prompts(), jax.random.key(5))
    return jax.device_get(made)


def in_slots(name: str, count: int | None, batch: PromptBatch | None = None, sampling=SAMPLING, samples: int = 1):
    model = MODELS[name]
    run = jax.jit(lambda p, b, k: rollout(model, p, b, k, sampling, count, samples))
    return jax.device_get(run(params_of(model), prompts() if batch is None else batch, jax.random.key(5)))


def assert_same(made, wanted):
    np.testing.assert_array_equal(made.response, wanted.response)
    np.testing.assert_array_equal(made.response_mask, wanted.response_mask)
    np.testing.assert_array_equal(made.finished, wanted.finished)
    np.testing.assert_array_equal(made.prompt, wanted.prompt)
    np.testing.assert_allclose(made.sampled_log_probs, wanted.sampled_log_probs, rtol=1e-4, atol=1e-5)


# fails when a slot keeps the position or the last token of the response before it, or when results lie in slot order
@pytest.mark.parametrize(("name", "count"), [("decoder", 1), ("decoder", 3), ("decoder", None), ("encoder-decoder", 3)])
def test_slots_draw_what_the_plain_sampler_draws(name, count):
    wanted = plain(name)
    lengths = wanted.response_mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 2
    assert wanted.finished.any()
    assert_same(in_slots(name, count), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_reading_short_prompts_at_half_of_the_width_changes_nothing(name, monkeypatch):
    monkeypatch.setattr(slots, "_WIDE", 2)
    assert_same(in_slots(name, 2), plain(name))


def test_samples_of_a_prompt_are_those_of_its_copies():
    # meant to catch copies that share their noise, and a response that is given the prompt of another
    model, few = MODELS["decoder"], jax.tree.map(lambda x: x[:3], prompts())
    made = in_slots("decoder", 4, few, samples=3)
    copies = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), few)
    copies = replace(copies, uid=few.uid.repeat(3) * 3 + jnp.tile(jnp.arange(3, dtype=jnp.int32), 3))
    run = jax.jit(lambda p, b, k: generate(model, p, b, k, SAMPLING))
    assert_same(made, jax.device_get(run(params_of(model), copies, jax.random.key(5))))
    assert len({tuple(row) for row in made.response.tolist()}) == 9


def test_the_likeliest_tokens_are_those_of_the_forward_pass():
    model = MODELS["decoder"]
    made = in_slots("decoder", 3, sampling=replace(SAMPLING, top_log_probs=4, top_k=2))
    parts = (made.prompt, made.prompt_mask, made.response, made.response_mask)
    logits = np.asarray(jax.jit(model.response_logits)(params_of(model), *(jnp.asarray(x) for x in parts)))
    log_probs = np.asarray(jax.nn.log_softmax(logits / 0.8, axis=-1))
    for row, position in zip(*np.nonzero(made.response_mask), strict=True):
        order = np.argsort(-log_probs[row, position])[:4]
        np.testing.assert_array_equal(made.top_ids[row, position], order)
        np.testing.assert_allclose(made.top_log_probs[row, position], log_probs[row, position, order], atol=1e-4)
        assert made.response[row, position] in order[:2]
