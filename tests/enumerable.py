"""A world small enough to know the answer: π_ref(y|x) · exp(r(x, y) / β) / Z(x).

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
from tiny import lenient, log_probs_from

from rlhfjax.types import Rollout

PROMPTS, TOKENS, LENGTH, STOP, PAD = 2, 4, 3, 3, 0  # the id that pads is also a token that is sampled
TEMPERATURE, BETA = 0.7, 0.5
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


def optimum(reference, rewards, prompt) -> np.ndarray:
    """Exact probabilities of all responses under the best policy."""
    weights = distribution(reference, prompt) * np.exp(rewards[prompt] / BETA)
    return weights / weights.sum()


def learned(algorithm, rows: int = 1024, steps: int = 400):
    """(policy, objective of each step) of an algorithm without a value model, one update a rollout.

    `algorithm(log_probs)` makes it. Responses are drawn from their exact distribution, which costs nothing here.
    """
    reference, rewards = world()
    algorithm = algorithm(log_probs_from(lambda params, rollout: params["policy"][states(rollout)], TEMPERATURE))
    tokens, mask = np.zeros((len(RESPONSES), LENGTH), np.int32), np.zeros((len(RESPONSES), LENGTH), bool)
    nodes = np.zeros((len(RESPONSES), LENGTH), np.int32)
    for i, y in enumerate(RESPONSES):
        tokens[i, : len(y)], mask[i, : len(y)] = y, True
        nodes[i, : len(y)] = [node_of(y[:t]) for t in range(len(y))]
    tokens, mask, nodes, by_response = map(jnp.asarray, (tokens, mask, nodes, rewards.astype(np.float32)))
    assert nodes.max() < NODES
    prompts = jnp.repeat(jnp.arange(rows // algorithm.group, dtype=jnp.int32) % PROMPTS, algorithm.group)
    optimizer = lenient(optax.adam(optax.linear_schedule(0.1, 0.0, steps)))

    def by_token(table):
        """log p of each token of each response to each prompt."""
        log_p = jax.nn.log_softmax(table / TEMPERATURE, axis=-1)
        return jnp.where(mask[None], log_p[:, nodes, tokens], 0.0)

    def step(carry, key):
        params, state = carry
        own, ref = by_token(params["policy"]), by_token(jnp.asarray(reference))
        choice = jax.random.categorical(key, own.sum(axis=2)[prompts])
        said, log_probs = (tokens[choice], mask[choice]), own[prompts, choice]
        rollout = Rollout(
            prompts[:, None], jnp.ones((rows, 1), bool), *said, (tokens == STOP).any(axis=1)[choice], log_probs
        ).scored(log_probs, ref[prompts, choice], jnp.zeros((rows, LENGTH)), by_response[prompts, choice])
        made, metrics = algorithm.estimate(rollout, jnp.float32(BETA))
        slope = jax.grad(lambda p: algorithm.loss(p, made, algorithm.weight(made))[0])(params)
        updates, state = optimizer.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), metrics["objective/rlhf_reward"]

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps))

    (params, _), objective = train({"policy": jnp.asarray(reference)})
    return params["policy"], objective


def assert_optimal(policy, within: float) -> None:
    """Total variation to the optimum, which is far from where learning starts."""
    reference, rewards = world()
    for prompt in range(PROMPTS):
        best = optimum(reference, rewards, prompt)
        now = distribution(policy, prompt)
        np.testing.assert_allclose(now.sum(), 1, rtol=1e-6)
        assert np.abs(distribution(reference, prompt) - best).sum() / 2 > 0.5
        assert np.abs(now - best).sum() / 2 < within
