"""What models say of packed batches against the logits and heads of each sequence by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_equal_gradients, params_of, right_mask, scalar_params_of, tiny, token_batch

from rlhfjax.algorithms.likelihood import (
    cross_entropy,
    log_probs_and_values,
    next_targets,
    token_log_probs,
    token_scores,
    token_values,
)
from rlhfjax.models import LanguageModel
from rlhfjax.types import TokenBatch

MODELS = {
    "tied": ("llama-gqa", {}),
    "own unembedding": ("gpt2", {"tied": False}),
    "soft cap": ("llama", {"logit_softcap": 2.0}),
}
BATCH, TEMPERATURE = token_batch(5, 9), 0.7
# The same with a row that has no targets; the row with most targets has so many, and all others fewer.
ANY = replace(BATCH, loss_mask=BATCH.loss_mask.at[3].set(False))
KNOWN = replace(ANY, most=int(ANY.loss_mask.sum(axis=1).max()))


def documents():
    """(row, slots) of each document."""
    for row in range(5):
        for number in (1, 2):
            at = np.flatnonzero(np.asarray(BATCH.segments[row]) == number)
            if len(at):
                yield row, at


def apart():
    """Each document in a row of its own, so that one program reads them all: tokens and mask [D, 9], positions."""
    each = [BATCH.tokens[row, at] for row, at in documents()]
    mask = right_mask([len(tokens) for tokens in each], 9)
    tokens = jnp.stack([jnp.pad(tokens, (0, 9 - len(tokens))) for tokens in each])
    return tokens, mask, jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), mask.shape)


def test_nothing_comes_after_the_last_token_of_a_row_that_one_document_fills():
    # windows of pretraining are such rows; fails when the row's first token is the last one's target: seen
    tokens = jnp.asarray([[5, 6, 7], [8, 9, 3]], jnp.int32)
    ones = jnp.ones_like(tokens)
    following, mask = next_targets(TokenBatch(tokens, ones, jnp.broadcast_to(jnp.arange(3), (2, 3)), ones > 0))
    assert mask.tolist() == [[True, True, False]] * 2
    assert following[:, :2].tolist() == [[6, 7], [9, 3]]


@pytest.mark.parametrize("style", MODELS)
def test_log_probs_entropies_and_cross_entropy(style):
    # meant to catch a result one place off, and a document's first token that counts
    family, changes = MODELS[style]
    model = tiny(family, **changes)
    params = params_of(model)
    wanted, spread, total = np.zeros((5, 9)), np.zeros((5, 9)), 0.0
    logits = np.asarray(jax.jit(model.logits)(params, *apart()[:2]), np.float64)
    for (row, at), z in zip(documents(), logits, strict=True):
        for before, slot in enumerate(at[1:]):
            if BATCH.loss_mask[row, slot]:
                for temperature in (TEMPERATURE, 1.0):
                    log_p = z[before] / temperature - np.log(np.exp(z[before] / temperature).sum())
                    if temperature == TEMPERATURE:
                        wanted[row, slot] = log_p[int(BATCH.tokens[row, slot])]
                        spread[row, slot] = -(np.exp(log_p) * log_p).sum()
                total -= log_p[int(BATCH.tokens[row, slot])]
    log_probs, entropies = jax.jit(lambda p: token_log_probs(model, p, BATCH, TEMPERATURE))(params)
    np.testing.assert_allclose(log_probs, wanted, atol=2e-5)
    np.testing.assert_allclose(entropies, spread, atol=2e-5)
    got = jax.jit(lambda p: cross_entropy(model, p, BATCH, model.batch_hidden(p, BATCH)))(params)
    np.testing.assert_allclose(got, total, rtol=1e-5)


def test_values_are_of_the_state_before_and_scores_of_the_token():
    model = tiny("llama-gqa")
    params = scalar_params_of(model)
    values = jax.jit(lambda p: token_values(model, p, BATCH))(params)
    scores = jax.jit(lambda p: token_scores(model, p, BATCH))(params)
    head, decoder = params["head"], params["decoder"]
    tokens, mask, positions = apart()
    hidden = jax.jit(model.hidden)(decoder, tokens, positions, mask.astype(jnp.int32))
    for (row, at), state in zip(documents(), np.asarray(hidden), strict=True):
        each = state[: len(at)] @ np.asarray(head["kernel"]) + float(head["bias"])
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


def before_targets(batch):
    """Where a result is about a target that has a predecessor."""
    return jnp.roll(next_targets(batch)[1], 1, axis=1)


def weighted(results):
    """A loss that reads each number of these results differently, and the results."""
    rng = np.random.default_rng(0)
    return sum((x * jnp.asarray(rng.normal(size=x.shape), x.dtype)).sum() for x in results), results


def assert_same_known_and_not(loss, params, name):
    """Results and gradients of `loss(params, batch)`, to the rounding of products of other shapes."""
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    ((_, got), grads), ((_, wanted), wanted_grads) = run(params, KNOWN), run(params, ANY)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        assert (np.abs(theirs) > 0.01).sum() > 10
    assert_equal_gradients(grads, wanted_grads, name)


def test_the_rows_of_these_tests_are_of_every_kind():
    counts, targets = (np.asarray(mask.sum(axis=1)) for mask in (KNOWN.loss_mask, next_targets(KNOWN)[1]))
    assert KNOWN.most == counts.max() < BATCH.tokens.shape[1]
    assert counts[3] == 0 < counts[counts > 0].min() < KNOWN.most
    assert (targets < counts).any()  # a document's first token is marked, and is no target
    assert (np.asarray(KNOWN.segments).max(axis=1) == 2).sum() > 1


# fails with results at the columns of other targets, or one place off: seen
@pytest.mark.parametrize("style", ["tied", "own unembedding", "soft cap"])
def test_how_many_targets_there_may_be_changes_no_result(style):
    family, changes = MODELS[style]
    model = tiny(family, **changes)

    def loss(params, batch):
        how = {"entropy_gradient": True}
        alone = token_log_probs(model, params["decoder"], batch, TEMPERATURE, **how)
        *joint, values = log_probs_and_values(model, params["decoder"], params["head"], batch, TEMPERATURE, **how)
        return weighted([*alone, *joint, jnp.where(before_targets(batch), values, 0.0)])

    params = {"decoder": params_of(model), "head": scalar_params_of(model, seed=3)["head"]}
    assert_same_known_and_not(loss, params, style)


def test_how_many_targets_there_may_be_changes_no_value_before_one_and_no_score_at_one():
    model = tiny("llama-gqa")

    def values(params, batch):
        return weighted([jnp.where(before_targets(batch), token_values(model, params, batch), 0.0)])

    def scores(params, batch):
        return weighted([jnp.where(batch.loss_mask, token_scores(model, params, batch), 0.0)])

    for loss in (values, scores):
        assert_same_known_and_not(loss, scalar_params_of(model), loss.__name__)


def test_no_more_columns_are_read_than_there_may_be_targets(monkeypatch):
    recorded, inner = [], LanguageModel.batch_hidden

    def spy(*args, read=None):
        recorded.append(read)
        return inner(*args, read=read)

    monkeypatch.setattr(LanguageModel, "batch_hidden", spy)
    model = tiny("llama-gqa")
    params, scalar = params_of(model), scalar_params_of(model)
    for batch in (KNOWN, ANY, replace(KNOWN, most=9)):
        jax.eval_shape(lambda b: token_log_probs(model, params, b), batch)
        jax.eval_shape(lambda b: log_probs_and_values(model, params, scalar["head"], b), batch)
        jax.eval_shape(lambda b: token_values(model, scalar, b), batch)
        jax.eval_shape(lambda b: token_scores(model, scalar, b), batch)
    assert [columns.shape for columns in recorded[:4]] == [(5, KNOWN.most)] * 4
    assert recorded[4:] == [None] * 8  # all of them
