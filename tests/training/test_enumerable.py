"""The real online loop on a world small enough to know the answer (`enumerable`)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from enumerable import (
    BETA,
    LENGTH,
    NODES,
    PAD,
    PROMPTS,
    RESPONSES,
    STOP,
    TEMPERATURE,
    TOKENS,
    Table,
    assert_optimal,
    distribution,
    node_of,
    optimum,
    states,
    world,
)
from tiny import lenient, log_probs_from

from rlhfjax.algorithms.ppo import Ppo
from rlhfjax.functional import token_log_probs
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.training.loop import Beside
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.online import OnlineSteps, train_online
from rlhfjax.training.update import Passes, online_update
from rlhfjax.types import OnlineState, PromptBatch, TrainState

ITERATIONS, ROWS, EPOCHS, MINIBATCHES = 120, 2048, 2, 4


def make_steps(rewards, optimizer, **settings) -> OnlineSteps:
    by_node = np.zeros((PROMPTS, NODES * TOKENS + 1), np.float32)
    for i, response in enumerate(RESPONSES):
        by_node[:, node_of(response)] = rewards[:, i]
    by_node = jnp.asarray(by_node)
    algorithm = Ppo(
        log_probs_from(lambda params, rollout: params["policy"][states(rollout)], TEMPERATURE),
        lambda params, made: params["value"][states(made)],
        value_coef=0.5,
        value_clip=10.0,
        missing_eos="keep",
        **settings,
    )
    sampling = SamplingParams(LENGTH, STOP, PAD, TEMPERATURE)

    def score(params, reference, rollout):
        prompt, nodes = states(rollout)
        last = rollout.response_mask.sum(axis=1)[:, None] - 1
        end = (jnp.take_along_axis(nodes, last, 1) * TOKENS + jnp.take_along_axis(rollout.response, last, 1) + 1)[:, 0]
        log_probs, ref_log_probs = (
            token_log_probs(table[prompt, nodes], rollout.response, TEMPERATURE)
            for table in (params["policy"], reference)
        )
        return rollout.scored(log_probs, ref_log_probs, params["value"][prompt, nodes], by_node[prompt[:, 0], end])

    def update(state, experience, pretraining, measured, key):
        train, metrics = online_update(
            algorithm, optimizer, state.train, experience, pretraining, key, Passes(EPOCHS, MINIBATCHES)
        )
        return OnlineState(train, state.kl_coef, state.iteration + 1), metrics

    return OnlineSteps(
        rollout=jax.jit(lambda params, prompts, key: generate(Table(), params["policy"], prompts, key, sampling)),
        score=jax.jit(score),
        estimate=jax.jit(algorithm.estimate),
        update=jax.jit(update, donate_argnums=0),
    )


def train(directory, **settings):
    """(steps, final policy, metrics) of a run from the reference on."""
    reference, rewards = world()
    total = ITERATIONS * EPOCHS * MINIBATCHES
    each = {
        "policy": optax.adam(optax.linear_schedule(0.05, 0.0, total)),
        "value": optax.adam(optax.linear_schedule(0.2, 0.0, total)),
    }
    optimizer = lenient(optax.partition(each, lambda params: {name: name for name in params}))
    params = {"policy": jnp.asarray(reference), "value": jnp.zeros((PROMPTS, NODES))}
    state = OnlineState(TrainState(params, optimizer.init(params), jnp.int32(0)), jnp.float32(BETA), jnp.int32(0))
    uid = jnp.arange(ROWS, dtype=jnp.int32)
    batch = PromptBatch((uid % PROMPTS)[:, None], jnp.ones((ROWS, 1), bool), uid)
    steps, rows = make_steps(rewards, optimizer, **settings), []
    writer = MetricsWriter(directory, 0, tensorboard=False)
    write = writer.write
    writer.write = lambda step, metrics, taken=None: rows.append(write(step, metrics)) or rows[-1]
    state = train_online(
        steps,
        state,
        jnp.asarray(reference),
        itertools.repeat(batch),
        itertools.repeat(None),
        iterations=ITERATIONS,
        key=jax.random.key(0),
        beside=Beside("ppo", writer, lambda step: 0.0),
        sampled=lambda iteration, rollout: None,
        keep=lambda state, iteration, stop: None,
    )
    writer.close()
    return steps, state, rows


@pytest.mark.parametrize("whiten", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["whitened", "plain"])
def test_the_policy_becomes_the_reference_times_exp_reward_over_beta(tmp_path, whiten):
    # meant to catch a reference at temperature 1, half or twice the penalty, no EOS in the loss, and the score replaced
    # where the end is missing
    reference, rewards = world()
    steps, state, rows = train(tmp_path, whiten_advantages=whiten)
    assert len(RESPONSES) == 40
    assert_optimal(state.train.params["policy"], within=0.01)
    best = [optimum(reference, rewards, prompt) for prompt in range(PROMPTS)]
    kl = [(p * np.log(p / distribution(reference, prompt))).sum() for prompt, p in enumerate(best)]
    reward = [(p * rewards[prompt]).sum() for prompt, p in enumerate(best)]
    # what the loop logs are the exact expectations, up to sampling noise of 2,048 responses
    assert rows[-1]["objective/kl"] == pytest.approx(np.mean(kl), abs=0.1)
    assert rows[-1]["objective/scores"] == pytest.approx(np.mean(reward), abs=0.1)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    # 0 where programs of other tests have driven it out of the cache that all share
    assert all(step._cache_size() <= 1 for step in (steps.rollout, steps.score, steps.estimate, steps.update))
