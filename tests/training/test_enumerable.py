"""The real online loop on a world small enough to know the answer: π_ref(y|x) · exp(r(x, y) / β) / Z(x).

Two prompts, four tokens one of which ends the response, at most three tokens: 40 responses a prompt, each with a reward
of its own, fractional, of either sign, also where the end is missing. The policy is a table of logits, sampled and
trained at temperature 0.7. The optimum is that of Ouyang et al. 2022, eq. 2 without ptx (e.g. Rafailov et al. 2023,
eq. 4).
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import lenient, log_probs_from

from rlhfjax.algorithms import Ppo
from rlhfjax.functional import token_log_probs
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.online import OnlineSteps, train_online
from rlhfjax.training.update import online_update
from rlhfjax.types import OnlineState, PromptBatch, Rollout, TrainState

PROMPTS, TOKENS, LENGTH, STOP, PAD = 2, 4, 3, 3, 0  # the id that pads is also a token that is sampled
TEMPERATURE, BETA = 0.7, 0.5
ITERATIONS, ROWS, EPOCHS, MINIBATCHES = 120, 2048, 2, 4
NODES = sum(TOKENS**depth for depth in range(LENGTH))  # what can have been said before a token
RESPONSES = [
    tokens
    for length in range(1, LENGTH + 1)
    for tokens in itertools.product(range(TOKENS), repeat=length)
    if STOP not in tokens[:-1] and (tokens[-1] == STOP or length == LENGTH)
]


def node_of(tokens) -> int:
    """Number of a string of tokens: children of node n are n x TOKENS + 1 …"""
    node = 0
    for token in tokens:
        node = node * TOKENS + token + 1
    return node


@dataclass(frozen=True)
class Table:
    """Logits by prompt and by what has been said."""

    def arrange(self, params, rows=None):
        return params

    def prefill(self, params, prompt, prompt_mask, new_tokens):
        state = prompt[:, -1], jnp.zeros_like(prompt[:, -1])
        return params[state], state

    def decode(self, params, cache, tokens):
        state = cache[0], jnp.minimum(cache[1] * TOKENS + tokens + 1, NODES - 1)
        return params[state], state


def states(rollout: Rollout):
    """The table's index at each response token."""
    nodes = [jnp.zeros_like(rollout.response[:, 0])]
    for t in range(LENGTH - 1):
        nodes.append(jnp.minimum(nodes[-1] * TOKENS + rollout.response[:, t] + 1, NODES - 1))
    return rollout.prompt[:, -1:].repeat(LENGTH, axis=1), jnp.stack(nodes, axis=1)


def world():
    """Reference logits, and rewards by prompt and response."""
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 0.7, (PROMPTS, NODES, TOKENS)).astype(np.float32)
    rewards = rng.normal(0, 1, (PROMPTS, len(RESPONSES)))
    return reference, rewards


def distribution(table, prompt) -> np.ndarray:
    """Exact probabilities of all responses."""
    z = np.asarray(table, np.float64)[prompt] / TEMPERATURE
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return np.exp([sum(log_p[node_of(y[:t]), y[t]] for t in range(len(y))) for y in RESPONSES])


def make_steps(rewards, optimizer, **settings) -> OnlineSteps:
    by_node = np.zeros((PROMPTS, NODES * TOKENS + 1), np.float32)
    for i, response in enumerate(RESPONSES):
        by_node[:, node_of(response)] = rewards[:, i]
    by_node = jnp.asarray(by_node)
    algorithm = Ppo(
        log_probs_from(lambda params, rollout: params["policy"][states(rollout)], TEMPERATURE),
        lambda params, made: params["value"][states(made.rollout)],
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
            algorithm, optimizer, state.train, experience, pretraining, key, epochs=EPOCHS, minibatches=MINIBATCHES
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
    writer.write = lambda step, metrics: rows.append(write(step, metrics)) or rows[-1]
    state = train_online(
        steps,
        state,
        jnp.asarray(reference),
        itertools.repeat(batch),
        itertools.repeat(None),
        iterations=ITERATIONS,
        key=jax.random.key(0),
        stage="ppo",
        writer=writer,
        learning_rate=lambda step: 0.0,
        updates=EPOCHS * MINIBATCHES,
        episodes=ROWS,
        samples=lambda rollout: [],
        samples_every=ITERATIONS,
        save=lambda state, iteration: None,
        save_every=ITERATIONS,
    )
    writer.close()
    return steps, state, rows


@pytest.mark.parametrize("whiten", [True, False], ids=["whitened", "plain"])
def test_the_policy_becomes_the_reference_times_exp_reward_over_beta(tmp_path, whiten):
    # meant to catch a reference at temperature 1, half or twice the penalty, no EOS in the loss, and the score replaced
    # where the end is missing
    reference, rewards = world()
    steps, state, rows = train(tmp_path, whiten_advantages=whiten)
    assert len(RESPONSES) == 40
    expected_kl, expected_reward = [], []
    for prompt in range(PROMPTS):
        before = distribution(reference, prompt)
        optimum = before * np.exp(rewards[prompt] / BETA)
        optimum /= optimum.sum()
        learned = distribution(state.train.params["policy"], prompt)
        assert learned.sum() == pytest.approx(1)
        assert np.abs(before - optimum).sum() / 2 > 0.5
        assert np.abs(learned - optimum).sum() / 2 < 0.01
        expected_kl.append((optimum * np.log(optimum / before)).sum())
        expected_reward.append((optimum * rewards[prompt]).sum())
    # what the loop logs are the exact expectations, up to sampling noise of 2,048 responses
    assert rows[-1]["objective/kl"] == pytest.approx(np.mean(expected_kl), abs=0.1)
    assert rows[-1]["objective/scores"] == pytest.approx(np.mean(expected_reward), abs=0.1)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    # 0 where programs of other tests have driven it out of the cache that all share
    assert all(step._cache_size() <= 1 for step in (steps.rollout, steps.score, steps.estimate, steps.update))
