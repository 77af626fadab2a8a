"""What models say of packed batches against the logits and heads of each sequence by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_equal_gradients, params_of, scalar_params_of, tiny, token_batch

from rlhfjax.algorithms.likelihood import (
    cross_entropy,
    log_probs_and_values,
    token_log_probs,
    token_scores,
    token_values,
)

MODELS = {
    "tied": ("llama-gqa", {}),
    "own unembedding": ("gpt2", {"tied": False}),
    "soft cap": ("llama", {"logit_softcap": 2.0}),
}
BATCH, TEMPERATURE = token_batch(5, 9), 0.7


def documents():
    """(row, slots) of each document."""
    for row in range(5):
        for number in (1, 2):
            at = np.flatnonzero(np.asarray(BATCH.segments[row]) == number)
            if len(at):
                yield row, at


def alone(model, params, row, at):
    """Logits of one document that is read by itself."""
    tokens = BATCH.tokens[row, at][None]
    return np.asarray(model.logits(params, tokens, jnp.ones(tokens.shape, bool))[0], np.float64)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("style", MODELS)
def test_log_probs_entropies_and_cross_entropy(style, gather):
    # meant to catch a result one place off, and a document's first token that counts
    family, changes = MODELS[style]
    model = tiny(family, **changes)
    params = params_of(model)
    wanted, spread, total = np.zeros((5, 9)), np.zeros((5, 9)), 0.0
    for row, at in documents():
        z = alone(model, params, row, at)
        for before, slot in enumerate(at[1:]):
            if BATCH.loss_mask[row, slot]:
                for temperature in (TEMPERATURE, 1.0):
                    log_p = z[before] / temperature - np.log(np.exp(z[before] / temperature).sum())
                    if temperature == TEMPERATURE:
                        wanted[row, slot] = log_p[int(BATCH.tokens[row, slot])]
                        spread[row, slot] = -(np.exp(log_p) * log_p).sum()
                total -= log_p[int(BATCH.tokens[row, slot])]
    log_probs, entropies = jax.jit(lambda p: token_log_probs(model, p, BATCH, TEMPERATURE, gather=gather))(params)
    np.testing.assert_allclose(log_probs, wanted, atol=2e-5)
    np.testing.assert_allclose(entropies, spread, atol=2e-5)
    got = jax.jit(lambda p: cross_entropy(model, p, BATCH, model.batch_hidden(p, BATCH), gather=gather))(params)
    np.testing.assert_allclose(got, total, rtol=1e-5)


def test_values_are_of_the_state_before_and_scores_of_the_token():
    model = tiny("llama-gqa")
    params = scalar_params_of(model)
    values = jax.jit(lambda p: token_values(model, p, BATCH))(params)
    scores = jax.jit(lambda p: token_scores(model, p, BATCH))(params)
    head, decoder = params["head"], params["decoder"]
    for row, at in documents():
        tokens = BATCH.tokens[row, at][None]
        ones = jnp.ones(tokens.shape, jnp.int32)
        hidden = model.hidden(decoder, tokens, jnp.arange(len(at), dtype=jnp.int32)[None], ones)[0]
        each = np.asarray(hidden) @ np.asarray(head["kernel"]) + float(head["bias"])
        np.testing.assert_allclose(scores[row, at], each, atol=1e-5)
        np.testing.assert_allclose(values[row, at[1:]], each[:-1], atol=1e-5)


def test_one_pass_gives_what_two_give_on_the_same_trunk():
    # meant to catch a head that reads other states, and a gradient that reaches one half only
    model = tiny("gpt2")
    params, head = params_of(model), scalar_params_of(model, seed=3)["head"]
    trunk = {name: tree for name, tree in params.items() if name != "unembed"}

    def one(params, head):
        log_probs, entropies, values = log_probs_and_values(model, params, head, BATCH, TEMPERATURE)
        return (log_probs + values).sum() + entropies.sum()

    def two(params, head):
        log_probs, entropies = token_log_probs(model, params, BATCH, TEMPERATURE)
        decoder = {name: params[name] for name in trunk}
        return (log_probs + token_values(model, {"decoder": decoder, "head": head}, BATCH)).sum() + entropies.sum()

    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, head) for f in (one, two))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for mine, theirs in zip(got[1], wanted[1], strict=True):
        assert_equal_gradients(mine, theirs, "shared trunk")
