"""GRPO against hand-worked advantages, gradients by loops, and the optimum of a small world."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import experience, first_part, lenient, log_probs_from
from training.test_enumerable import (
    BETA,
    LENGTH,
    NODES,
    PROMPTS,
    RESPONSES,
    STOP,
    TEMPERATURE,
    TOKENS,
    distribution,
    node_of,
    states,
    world,
)

from rlhfjax.algorithms import Grpo
from rlhfjax.functional import token_log_probs
from rlhfjax.types import Rollout

ROWS, WIDTH, GROUP = 12, 5, 4
ROLLOUT = experience(ROWS, 3, WIDTH).rollout
MASK = np.asarray(ROLLOUT.response_mask)
LENGTHS = MASK.sum(axis=1)


def grpo(**settings) -> Grpo:
    """GRPO over a table: logits of each position of each row are the parameters themselves."""
    return Grpo(log_probs_from(lambda params, rollout: params["policy"]), **({"group": GROUP} | settings))


def estimated(scores, kl_coef=0.0, **settings):
    rollout = replace(ROLLOUT, scores=jnp.asarray(scores, jnp.float32))
    return jax.jit(grpo(missing_eos="keep", **settings).estimate)(rollout, jnp.float32(kl_coef))


SCORES = [1, 2, 3, 6, 5, 5, 5, 5, -1, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # deviations (14 / 3)^½ = 2.16025 and (2 / 3)^½ = 0.81650 within the groups
        ({}, [-0.92582, -0.46291, 0, 1.38873, 0, 0, 0, 0, -1.22474, 0, 0, 1.22474]),
        # (14 / 4)^½ = 1.87083 and (2 / 4)^½ = 0.70711
        ({"deviation": "population"}, [-1.06904, -0.53452, 0, 1.60357, 0, 0, 0, 0, -1.41421, 0, 0, 1.41421]),
        ({"deviation": "none"}, [-2, -1, 0, 3, 0, 0, 0, 0, -1, 0, 0, 1]),
    ],
)
def test_advantages_by_hand(settings, wanted):
    # fails with a mean over the batch, and groups of rows that are not neighbours: seen
    made, metrics = estimated(SCORES, **settings)
    np.testing.assert_allclose(made.advantages, np.where(MASK, np.asarray(wanted)[:, None], 0), atol=1e-5)
    assert metrics["objective/groups_alike"] == pytest.approx(1 / 3)
    assert metrics["objective/scores"] == pytest.approx(np.mean(SCORES))


def test_the_penalty_is_taken_from_the_score_of_the_whole_response():
    kl = np.where(MASK, np.asarray(ROLLOUT.log_probs - ROLLOUT.ref_log_probs, np.float64), 0).sum(axis=1)
    rewards = (np.asarray(SCORES) - 0.3 * kl).reshape(-1, GROUP)
    made, metrics = estimated(SCORES, kl_coef=0.3, deviation="none")
    wanted = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(made.advantages, np.where(MASK, wanted[:, None], 0), atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], -0.3 * kl.mean(), rtol=1e-5)


def logits():
    return {"policy": jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, WIDTH, 16)), jnp.float32)}


def on_policy(made):
    """The experience as if this table had sampled it: ratios are 1."""
    log_probs = token_log_probs(logits()["policy"], made.rollout.response)
    return replace(made, rollout=replace(made.rollout, log_probs=log_probs))


def loss_and_gradient(algorithm, made, params=None):
    compute = jax.jit(jax.value_and_grad(lambda p: algorithm.loss(p, made, algorithm.weight(made)), has_aux=True))
    (loss, metrics), gradient = compute(logits() if params is None else params)
    return float(loss), metrics, np.asarray(gradient["policy"])


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("score", [0.5, 10000.1])
def test_groups_of_equal_scores_teach_nothing(average, score):
    # fails at 10000.1 with a deviation from the mean, which is rounded: seen
    made, metrics = estimated([score] * ROWS)
    assert metrics["objective/groups_alike"] == 1
    assert metrics["objective/scores_std"] == 0
    assert (np.asarray(made.advantages) == 0).all()
    loss, _, gradient = loss_and_gradient(grpo(beta=0.0, average=average), on_policy(made))
    assert (loss, np.abs(gradient).max()) == (0, 0)


# fails with k3 of the wrong sign: seen; meant to catch a mean over padding and the other average
@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_first_gradient_is_that_of_reinforce(average, beta):
    made = on_policy(estimated(SCORES)[0])
    p = np.asarray(jax.nn.softmax(logits()["policy"]), np.float64)
    ref, response = np.asarray(ROLLOUT.ref_log_probs, np.float64), np.asarray(ROLLOUT.response)
    wanted, penalty = np.zeros((ROWS, WIDTH, 16)), 0.0
    for row, length in enumerate(LENGTHS):
        share = 1 / (ROWS * length) if average == "sequence" else 1 / LENGTHS.sum()
        for t in range(length):
            x = ref[row, t] - np.log(p[row, t, response[row, t]])
            penalty += share * (np.exp(x) - 1 - x)
            slope = -float(made.advantages[row, t]) + beta * (1 - np.exp(x))
            wanted[row, t] = share * slope * (np.eye(16)[response[row, t]] - p[row, t])
    loss, metrics, gradient = loss_and_gradient(grpo(average=average, beta=beta), made)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/kl_avg"], penalty, rtol=1e-4)
    np.testing.assert_allclose(loss, float(metrics["loss/policy_avg"]) + beta * penalty, rtol=1e-4)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert (float(metrics["policy/clipfrac_avg"]), float(metrics["val/ratio_err"])) == (0, pytest.approx(0, abs=1e-6))


def test_ratios_are_clipped_by_their_own_bound_on_each_side():
    # rows of one token; ratios 1.25 and 1.5 against 1.3 above, 0.9 and 0.7 against 0.8 below; advantages of both signs
    ratios, advantages = np.asarray([1.25, 1.5, 1.5, 0.9, 0.7, 0.7]), np.asarray([1, 1, -1, -1, -1, 1.0])
    wanted = -np.asarray([1.25, 1.3, -1.5, -0.9, -0.8, 0.7])
    some = jax.tree.map(lambda x: x[:6], estimated(SCORES)[0])
    mask = jnp.zeros((6, WIDTH), bool).at[:, 0].set(True)
    rollout = replace(some.rollout, response_mask=mask, log_probs=jnp.full((6, WIDTH), -3.0))
    made = replace(
        some, rollout=rollout, advantages=jnp.where(mask, jnp.asarray(advantages, jnp.float32)[:, None], 0.0)
    )
    algorithm = Grpo(lambda params, made: (params["policy"], params["policy"]), GROUP, clip_high=0.3, beta=0.0)
    params = {"policy": jnp.broadcast_to(jnp.asarray(np.log(ratios) - 3, jnp.float32)[:, None], (6, WIDTH))}
    loss, metrics, gradient = loss_and_gradient(algorithm, made, params)
    assert loss == pytest.approx(wanted.mean(), rel=1e-5)
    assert metrics["policy/clipfrac_avg"] == pytest.approx(2 / 6)
    np.testing.assert_allclose(gradient[:, 0], [-1.25 / 6, 0, 1.5 / 6, 0.9 / 6, 0, -0.7 / 6], rtol=1e-4)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_it_does_not_matter_how_tokens_lie_in_rows(average):
    # fails when the tokens of a response are counted by row: seen
    made = estimated(SCORES)[0]
    shift = jnp.float32(0.1)
    algorithm = Grpo(
        lambda shift, made: (made.log_probs + shift * made.advantages, made.log_probs), GROUP, average=average
    )
    packed = first_part(made)
    assert (np.asarray(packed.batch.segments) > 1).any()
    np.testing.assert_allclose(algorithm.weight(packed), algorithm.weight(made), rtol=1e-6)
    assert algorithm.weight(made) == pytest.approx(ROWS if average == "sequence" else LENGTHS.sum(), rel=1e-6)
    whole = algorithm.loss(shift, made, algorithm.weight(made))
    other = algorithm.loss(shift, packed, algorithm.weight(packed))
    for mine, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 3], made) for i in range(0, ROWS, 3)]
    summed = sum(algorithm.loss(shift, part, algorithm.weight(made))[0] for part in parts)
    np.testing.assert_allclose(summed, whole[0], rtol=1e-5)


def test_another_average_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        grpo(average="mean").weight(estimated(SCORES)[0])


def test_the_policy_becomes_the_reference_times_exp_reward_over_beta():
    # meant to catch half or twice the penalty, and groups that mix prompts
    reference, rewards = world()
    tokens = np.zeros((len(RESPONSES), LENGTH), np.int32)
    mask = np.asarray([[t < len(y) for t in range(LENGTH)] for y in RESPONSES])
    for i, y in enumerate(RESPONSES):
        tokens[i, : len(y)] = y
    nodes = jnp.asarray([[node_of(y[:t]) if t < len(y) else 0 for t in range(LENGTH)] for y in RESPONSES])
    algorithm = Grpo(
        log_probs_from(lambda params, rollout: params["policy"][states(rollout)], TEMPERATURE),
        group=8,
        beta=0.0,
        deviation="none",
        average="token",  # with 1 / length short responses would count more, and the optimum be another
        missing_eos="keep",
    )
    rows, steps = 1024, 400
    prompts = jnp.repeat(jnp.arange(rows // 8, dtype=jnp.int32) % PROMPTS, 8)
    optimizer = lenient(optax.adam(optax.linear_schedule(0.1, 0.0, steps)))
    tokens, mask, by_response = jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(rewards, jnp.float32)
    assert nodes.max() < NODES
    assert tokens.max() < TOKENS

    def by_token(table):
        """log p of each token of each response to each prompt."""
        log_p = jax.nn.log_softmax(table / TEMPERATURE, axis=-1)
        return jnp.where(mask[None], log_p[:, nodes, tokens], 0.0)

    def step(carry, key):
        params, state = carry
        own, ref = by_token(params["policy"]), by_token(jnp.asarray(reference))
        choice = jax.random.categorical(key, own.sum(axis=2)[prompts])
        rollout = Rollout(
            prompts[:, None],
            jnp.ones((rows, 1), bool),
            tokens[choice],
            mask[choice],
            (tokens == STOP).any(axis=1)[choice],
            own[prompts, choice],
            own[prompts, choice],
            ref[prompts, choice],
            jnp.zeros((rows, LENGTH)),
            by_response[prompts, choice],
        )
        made, metrics = algorithm.estimate(rollout, jnp.float32(BETA))
        slope = jax.grad(lambda p: algorithm.loss(p, made, algorithm.weight(made))[0])(params)
        updates, state = optimizer.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), metrics["objective/rlhf_reward"]

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps))

    (params, _), objective = train({"policy": jnp.asarray(reference)})
    assert objective[-20:].mean() > objective[:20].mean() + 0.3
    for prompt in range(PROMPTS):
        before = distribution(reference, prompt)
        optimum = before * np.exp(rewards[prompt] / BETA)
        optimum /= optimum.sum()
        assert np.abs(before - optimum).sum() / 2 > 0.5
        assert np.abs(distribution(params["policy"], prompt) - optimum).sum() / 2 < 0.02
