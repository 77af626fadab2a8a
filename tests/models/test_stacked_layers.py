"""A sampler whose layers are scanned, as TPUs have it, against the one whose layers are written out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import left_mask, params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, Speculation, generate
from rlhfjax.models import interface, sampling_weights
from rlhfjax.types import PromptBatch


@pytest.fixture
def scanned(monkeypatch):
    def stack():
        for module in (interface, sampling_weights):
            monkeypatch.setattr(module, "stacks_layers", lambda: True)

    return stack


def numbers(model, params):
    """Logits of prompts, of a token after them and of two more, the second of which one row lacks."""
    tokens, mask = random_tokens(3, 6), left_mask([6, 1, 4], 6)

    @jax.jit
    def run(params):
        weights = model.arrange(params)
        first, cache = model.prefill(weights, tokens, mask, 4)
        second, cache = model.decode(weights, cache, jnp.array([5, 6, 7]))
        drafts, counts = jnp.array([[5, 8], [6, 9], [7, 7]]), jnp.array([2, 1, 2])
        hidden, cache = model.extend(weights, cache, drafts, counts)
        third = model.unembed(weights, hidden)
        rows = jnp.array([2, 0, 0, 1])
        fourth, cache = model.decode(weights, cache.take(rows), jnp.array([1, 2, 3, 4]))
        return first, second, third[0], third[1, :1], third[2], fourth, cache.lengths

    return jax.device_get(run(params))


@pytest.mark.parametrize(
    ("style", "precision"),
    [("gpt2", "full"), ("gpt_oss", "full"), ("mixed", "full"), ("gpt_oss", "int8"), ("mixed", "int8")]
    + [pytest.param(style, "full", marks=pytest.mark.slow) for style in ("llama-gqa", "gemma3")]
    + [pytest.param("gpt2", "int8", marks=pytest.mark.slow)],
)
def test_they_say_the_same(style, precision, scanned):
    # fails when a layer reads another's slots or kind, a head another's keys, or a scale is left out
    model = replace(tiny(style), precision=precision)
    params = params_of(model)
    wanted = numbers(model, params)
    scanned()
    made = numbers(model, params)
    for mine, theirs in zip(made, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"slots": 2}, {"speculation": Speculation("ngram", 2)}],
    ids=str,
)
def test_they_draw_the_same(settings, scanned):
    model = tiny("llama-gqa")
    params, uid = params_of(model), jnp.arange(4, dtype=jnp.int32)
    prompts = PromptBatch(random_tokens(4, 6), left_mask([6, 1, 3, 5], 6), uid)
    sampling = SamplingParams(max_new_tokens=6, stop_id=1, pad_id=0, **settings)

    def drawn():
        return jax.device_get(jax.jit(lambda p: generate(model, p, prompts, jax.random.key(3), sampling))(params))

    wanted = drawn()
    scanned()
    made = drawn()
    np.testing.assert_array_equal(made.response, wanted.response)
    np.testing.assert_array_equal(made.response_mask, wanted.response_mask)


def test_the_program_does_not_grow_with_depth(scanned):
    scanned()
    prompts = PromptBatch(random_tokens(2, 6), left_mask([6, 1], 6), jnp.arange(2, dtype=jnp.int32))
    sampling = SamplingParams(max_new_tokens=6, stop_id=1, pad_id=0)

    def lines(layers):
        model = tiny("llama-gqa", layers=layers)
        params = jax.eval_shape(model.init, jax.random.key(0))
        run = jax.jit(lambda p: generate(model, p, prompts, jax.random.key(3), sampling))
        return run.lower(params).as_text().count("\n")

    assert lines(12) == lines(3)
