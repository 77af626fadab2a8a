"""Drawing a token: filters, one inversion of the cumulative probabilities, log-probabilities of what was drawn."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.logits import apply_temperature, filter_logits
from rlhfjax.types import Params


class Sampler(Protocol):
    """What can be sampled from: a decoder, or anything else with these functions.

    `arrange` puts parameters into the order in which the others read them; it is called once, outside of the loop,
    with the number of rows that will decode.
    """

    def arrange(self, params: Params, rows: int | None = None) -> Any: ...

    def prefill(self, params: Any, prompt: Array, prompt_mask: Array, new_tokens: int) -> tuple[Array, Any]: ...

    def decode(self, params: Any, cache: Any, tokens: Array) -> tuple[Array, Any]: ...

    def empty_cache(self, rows: int, prompt: int, new_tokens: int) -> Any: ...


@dataclass(frozen=True)
class SamplingParams:
    """How to draw; `temperature` 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    `stop_id` and each of `stop_ids` end a response from position `stop_after` on, `pad_id` fills what follows. The
    `top_log_probs` likeliest tokens are reported for every position. `speculation` says where draft tokens come from.
    With `slots`, at most so many responses are written at a time, and one that ends makes room for the next.
    """

    max_new_tokens: int
    stop_id: int
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_after: int = 0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    top_log_probs: int = 0
    speculation: "Speculation | None" = None
    slots: int | None = None


@dataclass(frozen=True)
class Speculation:
    """Draft tokens: `tokens` per call, by `ngram` (lookup of the last `longest` … 1 tokens in the row) or `heads`."""

    kind: str
    tokens: int
    longest: int = 3


class Drawn(NamedTuple):
    """A token per row, its log-probability in nats, and the likeliest tokens with theirs.

    Log-probabilities are those of the unfiltered policy at the sampling temperature (greedy: 1).
    """

    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    top_ids: Int[Array, "B K"]
    top_log_probs: Float[Array, "B K"]


def uniforms(key: jax.Array, uid: Int[Array, "B"], count: int) -> Float[Array, "B T 2"]:
    """Two numbers in [0, 1) for each position of each response, from fold_in(fold_in(key, uid), position) alone."""
    rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, uid)
    steps = jnp.arange(count, dtype=jnp.int32)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))(rows, steps)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)


def draw(noise: Float[Array, "B 2"], logits: Float[Array, "B V"], sampling: SamplingParams) -> Drawn:
    """One token per row by `noise`."""
    greedy = sampling.temperature == 0
    logits = logits if greedy else apply_temperature(logits, sampling.temperature)
    blocks = _blocks(logits)
    largest = blocks.max(axis=1).max(axis=-1, keepdims=True)
    sums = jnp.exp(blocks - largest[:, None, :]).sum(axis=1)
    normalizer = largest[:, 0] + jnp.log(sums.sum(axis=-1))
    if greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    elif sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        kept = filter_logits(logits, 1.0, sampling.top_k, sampling.top_p, sampling.min_p)
        token = categorical(noise, kept)
    else:
        token = _inverted(noise, blocks, largest, sums)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    top, ids = jax.lax.top_k(logits, sampling.top_log_probs)
    return Drawn(token, chosen - normalizer, ids.astype(jnp.int32), top - normalizer[:, None])


def categorical(noise: Float[Array, "B 2"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """A token of softmax(logits) a row, by inversion in two steps: first a block of tokens, then one of the block.

    Each step has a uniform number of its own, so that rare tokens are drawn as precisely as frequent ones. It reads
    the logits once; Gumbel noise would need as many random numbers as there are logits.
    """
    blocks = _blocks(logits)
    largest = blocks.max(axis=1).max(axis=-1, keepdims=True)
    return _inverted(noise, blocks, largest, jnp.exp(blocks - largest[:, None, :]).sum(axis=1))


def _blocks(logits: Float[Array, "B V"]) -> Float[Array, "B M N"]:
    """About √V blocks of M tokens, block n being n, n + N, n + 2N …: sums over M then run along memory."""
    count = max(16, 1 << round(math.log2(logits.shape[-1]) / 2))
    size = -(-logits.shape[-1] // count)
    padded = jnp.pad(logits, ((0, 0), (0, count * size - logits.shape[-1])), constant_values=-jnp.inf)
    return padded.reshape(-1, size, count)


def _inverted(noise: Array, blocks: Array, largest: Array, sums: Array) -> Int[Array, "B"]:
    block = _invert(noise[:, 0], sums)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=2)[:, :, 0]
    return _invert(noise[:, 1], jnp.exp(inside - largest)) * blocks.shape[2] + block


def _invert(u: Float[Array, "B"], weights: Float[Array, "B N"]) -> Int[Array, "B"]:
    """The first place where the sum of the weights up to it exceeds u times their sum; never one of weight 0."""
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    until = (places[:, None] <= places[None, :]).astype(weights.dtype)
    # One small product in place of a scan, whose many steps cost more than the sums.
    sums = jnp.matmul(weights, until, precision="highest")
    reached = (sums > u[:, None] * sums[:, -1:]) & (weights > 0)
    # Sums are rounded, each in its own order: where none is over, the largest weight.
    place = jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
    return place.astype(jnp.int32)


def stops(token: Int[Array, "B"], position: Array, sampling: SamplingParams) -> Bool[Array, "B"]:
    """Whether a token at this position of its response ends it."""
    ids = jnp.asarray((sampling.stop_id, *sampling.stop_ids), jnp.int32)
    return (token[:, None] == ids[None, :]).any(axis=1) & (position >= sampling.stop_after)
