"""What a sampler keeps of the experts of its tokens, against a forward pass of each sequence alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SHAPE, params_of, random_tokens

from rlhfjax.algorithms.packing import on_packed
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.decoder import Decoder
from rlhfjax.types import PromptBatch

MODEL = LanguageModel(decoder_config("mixtral", **SHAPE, kv_heads=2, experts=4), routed=True)
LENGTHS, WIDTH, NEW = (5, 2, 4, 3), 5, 6


def prompts():
    tokens = np.asarray(random_tokens(len(LENGTHS), WIDTH))
    mask = np.arange(WIDTH)[None, :] >= WIDTH - np.array(LENGTHS)[:, None]
    return PromptBatch(tokens, mask, np.arange(len(LENGTHS), dtype=np.int32))


def sampled(**how):
    params = params_of(MODEL)
    sampling = SamplingParams(NEW, stop_id=3, stop_ids=(1, 4, 8), pad_id=0, **how)
    run = jax.jit(lambda params, prompts, key: generate(MODEL, params, prompts, key, sampling))
    return params, run(params, prompts(), jax.random.key(1))


def chosen_alone(params, tokens):
    """[T, L, K], by a pass of one sequence without padding."""
    ids = jnp.asarray(tokens)[None]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    inputs = ids, positions, jnp.ones_like(ids)
    _, sown = Decoder(MODEL.config).apply({"params": params}, *inputs, method="hidden", mutable=["chosen"])
    return np.asarray(jax.tree.leaves(sown)[0])[:, 0].swapaxes(0, 1)


@pytest.mark.parametrize("how", [{}, {"slots": 2}], ids=["all at once", "in slots"])
def test_the_sampler_keeps_the_experts_of_its_tokens(how):
    # fails when slots are taken over before they are read, and when left padding is not taken off
    params, made = sampled(**how)
    assert len(set(np.asarray(made.response_mask).sum(axis=1).tolist())) > 1
    for row, length in enumerate(LENGTHS):
        count = int(made.response_mask[row].sum())
        tokens = np.concatenate([made.prompt[row, WIDTH - length :], made.response[row, :count]])
        kept = np.asarray(made.routes)[row]
        assert (kept[: WIDTH - length] == -1).all()
        assert (kept[WIDTH + count :] == -1).all()
        kept, wanted = kept[WIDTH - length : WIDTH + count], chosen_alone(params, tokens)
        known = kept >= 0
        # The last layer is asked for a prompt's last token alone; in slots, a response's last token is never read.
        assert known[:, :-1].all() if not how else known[:-1, :-1].all()
        assert known[length - 1 : length + count - 1].all()
        np.testing.assert_array_equal(np.where(known, kept, wanted), wanted)


def test_a_rollout_that_is_replayed_says_what_it_said():
    params, made = sampled()

    def of_rows(rows):
        hidden = MODEL.batch_hidden(params, rows)
        free = MODEL.batch_hidden(params, rows.unrouted())
        return jnp.abs(hidden - free).max(axis=-1), MODEL.rerouted(params, rows)

    moved, shares = jax.jit(lambda made: on_packed(2, made, of_rows))(made)
    np.testing.assert_allclose(moved, np.zeros_like(moved), atol=1e-5)
    assert not np.asarray(shares).any()
    other = replace(made, routes=(made.routes + 1) % 4)
    moved, shares = jax.jit(lambda made: on_packed(2, made, of_rows))(other)
    mask = np.asarray(made.response_mask)
    assert np.asarray(moved)[mask].min() > 1e-3
    assert np.asarray(shares)[mask].max() > 0
