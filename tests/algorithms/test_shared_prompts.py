"""Responses that share their prompt in a packed row, against rows of their own."""

import re
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experience, one_prompt_each, params_of, ranked_batch, scalar_params_of, tiny

from rlhfjax.algorithms import OnlineAlgorithm
from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.algorithms.likelihood import token_log_probs, token_scores, token_values
from rlhfjax.algorithms.packing import on_packed, pack, packed_experience, packed_ranking, row_width
from rlhfjax.algorithms.reward_modelling import RewardModelling
from rlhfjax.config import schema
from rlhfjax.functional import token_log_probs as log_probs_of
from rlhfjax.stages.objectives import preference_optimisation, reward_modelling
from rlhfjax.training.update import Passes, gradients, online_update
from rlhfjax.types import RankedBatch, Rollout, TokenBatch, TrainState

ROWS, PROMPT, RESPONSE, GROUP = 12, 5, 6, 3
MODEL = tiny()
MADE = experience(ROWS, PROMPT, RESPONSE)
FIRST = np.arange(ROWS) // GROUP * GROUP
ROLLOUT = replace(MADE.rollout, prompt=MADE.rollout.prompt[FIRST], prompt_mask=MADE.rollout.prompt_mask[FIRST])
MADE = replace(MADE, rollout=ROLLOUT)


def ids(i: int, what: str) -> list[int]:
    """The real tokens of a prompt or a response."""
    return np.asarray(getattr(ROLLOUT, what)[i])[np.asarray(getattr(ROLLOUT, f"{what}_mask")[i])].tolist()


def test_the_example_of_a_packed_row_is_what_packing_makes():
    prompts, responses = jnp.asarray([[5, 6, 7]] * 2), jnp.asarray([[8, 1], [9, 1]])
    real = [jnp.ones(shape, bool) for shape in ((2, 3), (2, 2), 2)]
    rollout = Rollout(prompts, real[0], responses, real[1], real[2], jnp.zeros((2, 2)))
    batch = jax.jit(lambda rollout: pack(rollout, 1, 2).tokens(rollout))(rollout)
    assert batch.most == 4
    shown = re.findall(r"^ +(tokens|segments|prefixes|positions|loss_mask) +(.*)$", TokenBatch.__doc__, re.MULTILINE)
    assert len(shown) == 5
    for name, values in shown:
        wanted = [int(value) for value in values.replace("x", "1").replace(".", "0").split()]
        assert np.asarray(getattr(batch, name), int).tolist() == [[wanted]]


@pytest.mark.parametrize("part", [1, 3])
def test_each_prompt_is_there_once_and_each_response_goes_on_from_it(part):
    # fails when every response brings its prompt, or a prompt's last token is missing: seen
    packing = jax.jit(pack, static_argnums=(1, 2))(ROLLOUT, part, GROUP)
    batch = packing.tokens(ROLLOUT)
    width = row_width(PROMPT, RESPONSE, GROUP)
    assert width == PROMPT - 1 + GROUP * (RESPONSE + 1)
    assert batch.tokens.shape == (-(-ROWS // GROUP // part), part, width)
    rows = [
        np.asarray(x).reshape(-1, width)
        for x in (batch.tokens, batch.segments, batch.prefixes, batch.positions, batch.loss_mask)
    ]
    found, total = [], 0
    for tokens, segments, prefixes, positions, targets in zip(*rows, strict=True):
        for prefix in sorted(set(prefixes[segments > 0])):
            prompt = np.flatnonzero(segments == prefix)
            total += len(prompt)
            assert not targets[prompt].any()
            for segment in sorted(set(segments[prefixes == prefix]) - {prefix}):
                own = np.flatnonzero(segments == segment)
                assert (np.diff(own) == 1).all()
                assert prompt.max(initial=-1) < own[0]
                assert [*positions[prompt], *positions[own]] == list(range(len(prompt) + len(own)))
                assert targets[own].tolist() == [False] + [True] * (len(own) - 1)
                total += len(own)
                found.append(([*tokens[prompt], *tokens[own[:1]]], tokens[own[1:]].tolist()))
    assert sorted(found) == sorted((ids(i, "prompt"), ids(i, "response")) for i in range(ROWS))
    assert (np.asarray(batch.segments) > 0).sum() == total
    assert np.asarray(batch.loss_mask).sum(axis=-1).max() <= batch.most


# fails without prefixes, with positions that go on from the response before, and with `place` of another group: seen
@pytest.mark.parametrize("layers", [2, 9])  # the last layer apart, and all in one loop
def test_what_models_say_of_responses_is_what_they_say_of_rows_of_their_own(layers):
    model = tiny(layers=layers)
    params, scalar = params_of(model, std=0.2), scalar_params_of(model, 1, std=0.2)

    def of_rows(batch):
        log_probs, entropies = token_log_probs(model, params, batch)
        return log_probs, entropies, token_values(model, scalar, batch), token_scores(model, scalar, batch)

    got = jax.jit(lambda rollout: on_packed(2, rollout, of_rows, group=GROUP))(ROLLOUT)
    sides = (ROLLOUT.prompt, ROLLOUT.prompt_mask, ROLLOUT.response, ROLLOUT.response_mask)
    wanted = log_probs_of(jax.jit(model.response_logits)(params, *sides), ROLLOUT.response)
    values = jax.jit(model.response_values)(scalar, *sides)
    mask = ROLLOUT.response_mask
    np.testing.assert_allclose(got[0], jnp.where(mask, wanted, 0.0), atol=1e-5)
    np.testing.assert_allclose(got[2], jnp.where(mask, values, 0.0), atol=1e-5)
    last = np.asarray(mask.sum(axis=1)) - 1
    scores = np.asarray(got[3])[np.arange(ROWS), last]
    np.testing.assert_allclose(scores, jax.jit(model.response_scores)(scalar, *sides), atol=1e-5)
    plain = jax.jit(lambda rollout: on_packed(2, rollout, of_rows))(ROLLOUT)
    np.testing.assert_allclose(got[1], plain[1], atol=1e-5)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_an_update_learns_the_same_from_groups_that_share_their_prompt(average):
    # fails when responses of a row count as one, which changes the share of each token: seen
    def log_probs(params, rows):
        return token_log_probs(MODEL, params["policy"], rows)

    algorithm = Grpo(log_probs, GROUP, beta=0.2, average=average)
    params = {"policy": params_of(MODEL, std=0.2)}

    def learned(group):
        packed = partial(packed_experience, 2, group=group)
        run = jax.jit(lambda p, made: gradients(algorithm, p, made, jax.random.key(0), pack=packed))
        return run(params, MADE)

    (grads, metrics), (wanted, wanted_metrics) = learned(GROUP), learned(1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), grads, wanted)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_minibatches_keep_groups_together():
    # fails when rows are shuffled one by one: seen
    seen = []

    class Watching(OnlineAlgorithm):
        def weight(self, rows):
            return jnp.float32(1.0)

        def loss(self, params, rows, weight, key):
            jax.debug.callback(lambda prompt: seen.append(np.asarray(prompt)), rows.rollout.prompt)
            loss = (params["policy"] ** 2).sum()
            return loss, {"val/ratio_err": loss, "policy/approxkl_avg": loss}

    params = {"policy": jnp.ones(2)}
    optimizer: object = SimpleNamespace(update=lambda g, s, p: (g, s))
    number = jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.int32)[:, None], ROLLOUT.prompt.shape)
    made = replace(MADE, rollout=replace(ROLLOUT, prompt=number))
    state = TrainState(params, (), jnp.int32(0))
    done = online_update(Watching(), optimizer, state, made, None, jax.random.key(1), Passes(2, 2), group=GROUP)
    jax.block_until_ready(done)
    jax.effects_barrier()
    orders = [batch[:, 0].tolist() for batch in seen]
    assert len(orders) == 4
    assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3]) == list(range(ROWS))
    assert orders[0] + orders[1] != orders[2] + orders[3]  # each pass has its own order
    for order in orders:
        firsts = order[::GROUP]
        assert order == [first + i for first in firsts for i in range(GROUP)]
        assert all(first % GROUP == 0 for first in firsts)


# Rankings ------------------------------------------------------------------------------------------------------------

BATCH = one_prompt_each(ranked_batch(5, 4, 9, seed=2))
BATCH = replace(BATCH, mask=BATCH.mask.at[1, 0].set(False))  # whoever is first brings the prompt
LONGEST = max(
    int(p) - 1 + sum(int(n) - int(p) + 1 for n, there in zip(lengths, mask, strict=True) if there)
    for p, lengths, mask in zip(BATCH.prompt_lengths, BATCH.token_mask.sum(-1), BATCH.mask, strict=True)
)


def reward():
    return reward_modelling(MODEL, schema.RankingLoss()), scalar_params_of(MODEL, std=0.2), True


def dpo():
    params = params_of(MODEL, std=0.2)
    reference = jax.tree.map(lambda x: 1.2 * x, params)
    return preference_optimisation(MODEL, schema.PreferenceLoss(beta=0.5)), params | {"reference": reference}, False


def learned(algorithm, params, pack):
    run = jax.jit(lambda p, batch: gradients(algorithm, p, batch, jax.random.key(0), pack=pack))
    return run(params, BATCH)


@cache
def in_rows_of_their_own(method):
    """What candidates teach that share no row, once for all ways of sharing one."""
    algorithm, params, _ = method()
    return learned(algorithm, params, None)


# fails when a comparison is counted in every part, when absent candidates bring tokens, and without prefixes: seen
@pytest.mark.parametrize(("width", "part"), [(LONGEST, 1), (LONGEST, 5), (LONGEST + 17, 2)])
@pytest.mark.parametrize("method", [reward, dpo])
def test_rankings_teach_the_same_with_each_prompt_read_once(method, width, part):
    algorithm, params, ends = method()
    grads, metrics = learned(algorithm, params, partial(packed_ranking, part, width, ends=ends))
    wanted, wanted_metrics = in_rows_of_their_own(method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), grads, wanted)
    for name in wanted_metrics:
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_packed_rankings_hold_each_prompt_once():
    rows, used = jax.jit(lambda batch: packed_ranking(1, LONGEST, batch))(BATCH)
    there, prompts = np.asarray(BATCH.mask), np.asarray(BATCH.prompt_lengths)
    responses = np.asarray(BATCH.token_mask.sum(-1)) - prompts[:, None]
    assert int(rows.batch.loss_mask.sum()) == responses[there].sum()
    assert int(rows.batch.real_tokens()) == (prompts - 1).sum() + (responses + 1)[there].sum()
    assert int(used) < len(prompts)  # some rows hold two comparisons
    np.testing.assert_array_equal(rows.mask.sum(axis=0), there)  # each in one part
    ends, _ = jax.jit(lambda batch: packed_ranking(1, LONGEST, batch, ends=True))(BATCH)
    assert int(ends.batch.loss_mask.sum()) == there.sum()
    assert int(ends.batch.loss_mask.sum(-1).max()) <= ends.batch.most == 8


def test_a_comparison_counts_in_the_part_that_holds_it_and_in_no_other():
    # fails when what other parts hold counts as pairs of equal scores in every part: seen
    tokens = jnp.asarray([[[7, 1, 8], [7, 1, 5]], [[9, 1, 2], [9, 1, 6]]], jnp.int32)
    there = jnp.ones((2, 2), bool)
    ranks = jnp.asarray([[1, 2], [1, 2]], jnp.int32)
    batch = RankedBatch(tokens, jnp.ones(tokens.shape, bool), ranks, there, jnp.ones(2, jnp.int32))
    pack = partial(packed_ranking, 1, 6, ends=True)  # a row of 6 has room for one comparison: 1 - 1 + 2 * 3 tokens
    assert int(jax.jit(pack)(batch)[1]) == 2

    def scores(params, rows, key):  # a tenth of the last token
        return rows.of_candidates(params["gain"] * rows.batch.tokens.astype(jnp.float32))

    gain = {"gain": jnp.float32(0.1)}
    run = jax.jit(lambda gain: gradients(RewardModelling(scores), gain, batch, jax.random.key(0), pack=pack))
    grads, metrics = run(gain)
    # margins 0.8 - 0.5 and 0.2 - 0.6: the first pair is in order, the second is not
    loss = (np.log1p(np.exp(-0.3)) + np.log1p(np.exp(0.4))) / 2
    np.testing.assert_allclose(metrics["train/rm/loss"], loss, rtol=1e-6)
    assert metrics["train/rm/accuracy"] == 0.5
    wanted = (-3 / (1 + np.exp(0.3)) + 4 / (1 + np.exp(-0.4))) / 2
    np.testing.assert_allclose(grads["gain"], wanted, rtol=1e-5)
