"""Drawing a token: filters, one inversion of the cumulative probabilities, log-probabilities of what was drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhfjax import layout
from rlhfjax.functional.logits import apply_temperature, filter_logits
from rlhfjax.types import Params

_NO_TOKEN = -1
_BEYOND = 2**31 - 1  # an id that no vocabulary has; a negative one would count from its end


class Sampler(Protocol):
    """What can be sampled from: a decoder, or anything else with these functions.

    `arrange` puts parameters into the order in which the others read them; it is called once, outside of the loop,
    with the number of rows that will decode.
    """

    def arrange(self, params: Params, rows: int | None = None) -> Any: ...

    def prefill(self, params: Any, prompt: Array, prompt_mask: Array, new_tokens: int) -> tuple[Array, Any]: ...

    def decode(self, params: Any, cache: Any, tokens: Array) -> tuple[Array, Any]: ...

    def empty_cache(self, rows: int, prompt: int, new_tokens: int) -> Any: ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class SamplingParams:
    """How to draw; `temperature` 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    As an argument of a compiled function it is static: what is off costs nothing there, and other settings are another
    program. Rows that differ, and settings that may change, are `RowSampling`.

    `stop_id` and each of `stop_ids` end a response from position `stop_after` on, `pad_id` fills what follows. The
    `top_log_probs` likeliest tokens are reported for every position. `bias` is added to the logits of ids before all
    else. `speculation` says where draft tokens come from. With `slots`, at most so many responses are written at a
    time, and one that ends makes room for the next.
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
    bias: tuple[tuple[int, float], ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """How to draw for each of B rows: the settings of `SamplingParams` as arrays, which no program is compiled for.

    `stops` are the ids that end a row's response, -1 where there are fewer. What is reported of each token has a shape,
    so `top_log_probs` is one static number for all rows; those that are not `reported` may get zeros. `bias` is added
    to the logits of `biased` ids; where there are fewer, they are beyond any vocabulary.
    """

    max_new_tokens: Int[Array, "B"]
    stops: Int[Array, "B E"]
    stop_after: Int[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    reported: Bool[Array, "B"]
    biased: Int[Array, "B N"]
    bias: Float[Array, "B N"]
    top_log_probs: int = field(default=0, metadata={"static": True})

    @property
    def filtered(self) -> Bool[Array, "B"]:
        """Which rows draw from less than the whole distribution."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


Sampling = SamplingParams | RowSampling


def by_row(
    settings: Sequence[SamplingParams], stops: int, top_log_probs: int = 0, biases: int | None = None
) -> RowSampling:
    """Settings of one row each, in numpy, with room for so many stop ids and biases (None: as many as there are)."""
    ends = np.full((len(settings), stops), _NO_TOKEN, np.int32)
    most = max((len(one.bias) for one in settings), default=0) if biases is None else biases
    biased = np.full((len(settings), most), _BEYOND, np.int32)
    bias = np.zeros((len(settings), most), np.float32)
    for row, one in enumerate(settings):
        ids = dict.fromkeys((one.stop_id, *one.stop_ids))
        ends[row, : len(ids)] = list(ids)
        for place, pair in enumerate(one.bias):
            biased[row, place], bias[row, place] = pair

    def column(name: str, dtype: type) -> Any:
        return np.asarray([getattr(one, name) for one in settings], dtype)

    return RowSampling(
        column("max_new_tokens", np.int32),
        ends,  # pyright: ignore[reportArgumentType]
        column("stop_after", np.int32),
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        column("top_log_probs", np.int32) > 0,  # pyright: ignore[reportArgumentType]
        biased,  # pyright: ignore[reportArgumentType]
        bias,  # pyright: ignore[reportArgumentType]
        top_log_probs,
    )


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


def draw(noise: Float[Array, "B 2"], logits: Float[Array, "B V"], sampling: Sampling) -> Drawn:
    """One token per row by `noise`."""
    greedy = sampling.temperature == 0
    logits = _biased(logits, sampling)
    if isinstance(sampling, RowSampling):
        # From the largest on, so that at any temperature it stays the largest however a division is rounded.
        logits = logits - logits.max(axis=-1, keepdims=True)
        logits = apply_temperature(logits, jnp.where(greedy, 1.0, sampling.temperature))
    elif not greedy:
        logits = apply_temperature(logits, sampling.temperature)
    plain = isinstance(sampling, SamplingParams) and not (sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    if (devices := layout.current()) is not None:
        if plain and not sampling.top_log_probs:
            return _drawn_in_parts(devices, noise, logits, greedy is True)
        logits = layout.lay("whole_logits", logits)  # to sort them, a device needs rows that are whole
    blocks = _blocks(logits)
    largest = blocks.max(axis=1).max(axis=-1, keepdims=True)
    sums = jnp.exp(blocks - largest[:, None, :]).sum(axis=1)
    normalizer = largest[:, 0] + jnp.log(sums.sum(axis=-1))
    if isinstance(sampling, RowSampling):
        token = _drawn_by_row(noise, logits, _inverted(noise, blocks, largest, sums), sampling)
    elif greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    elif not plain:
        kept = filter_logits(logits, 1.0, sampling.top_k, sampling.top_p, sampling.min_p)
        token = categorical(noise, kept)
    else:
        token = _inverted(noise, blocks, largest, sums)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    top, ids = _likeliest(logits, sampling)
    return Drawn(token, chosen - normalizer, ids.astype(jnp.int32), top - normalizer[:, None])


def _biased(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits with what is added to some, which costs nothing where no row asks for it."""
    if isinstance(sampling, SamplingParams):
        if not sampling.bias:
            return logits
        ids, values = zip(*sampling.bias, strict=True)
        return logits.at[:, jnp.asarray(ids, jnp.int32)].add(jnp.asarray(values, logits.dtype)[None])
    if not sampling.biased.shape[1]:
        return logits
    rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]

    def added() -> Array:
        return logits.at[rows, sampling.biased].add(sampling.bias.astype(logits.dtype), mode="drop")

    return jax.lax.cond((sampling.biased < logits.shape[1]).any(), added, lambda: logits)


def _likeliest(logits: Float[Array, "B V"], sampling: Sampling) -> tuple[Array, Array]:
    """The largest logits and their ids, which are not looked for where no row tells them."""
    if isinstance(sampling, SamplingParams) or not sampling.top_log_probs:
        top, ids = jax.lax.top_k(logits, sampling.top_log_probs)
        return top, ids
    shape = len(logits), sampling.top_log_probs

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros(shape, logits.dtype), jnp.zeros(shape, jnp.int32)

    return jax.lax.cond(sampling.reported.any(), lambda: tuple(jax.lax.top_k(logits, sampling.top_log_probs)), nothing)


def _drawn_in_parts(devices: layout.Layout, noise: Float[Array, "B 2"], logits: Float[Array, "B V"], greedy: bool):
    """`draw` from the whole distribution, each device reading its own ids: what they exchange are sums of blocks.

    The blocks are those of one device, so the same noise draws the same token.
    """
    vocabulary = logits.shape[-1]

    def program(words: layout.Words, logits: Array, noise: Array) -> tuple[Array, Array]:
        count, size = _block_sizes(vocabulary)
        largest = words.largest(logits.max(axis=-1, keepdims=True))
        # Rows of blocks that begin where those of the whole vocabulary do, and end behind the last word.
        rows = -(-logits.shape[1] // count) + 1
        top = words.first // count
        mine = jnp.full((len(logits), rows * count), -jnp.inf, logits.dtype)
        mine = jax.lax.dynamic_update_slice_in_dim(mine, logits, words.first - top * count, axis=1)
        weights = jnp.exp(mine - largest).reshape(-1, rows, count)
        sums = words.summed(weights.sum(axis=1))
        if greedy:
            token = words.likeliest(logits)
        else:
            block = _invert(noise[:, 0], sums)
            inside = jnp.take_along_axis(weights, block[:, None, None], axis=2)[:, :, 0]
            whole = jnp.zeros((len(logits), size + rows), inside.dtype)
            inside = jax.lax.dynamic_update_slice_in_dim(whole, inside, top, axis=1)
            token = _invert(noise[:, 1], words.summed(inside)[:, :size]) * count + block
        own = token[:, None] == words.first + jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
        chosen = words.summed(jnp.where(own, logits, 0.0).sum(axis=-1))
        return token, chosen - (largest[:, 0] + jnp.log(sums.sum(axis=-1)))

    token, log_prob = devices.by_vocabulary(program)(logits, noise)
    nothing = jnp.zeros((len(token), 0))
    return Drawn(token, log_prob, nothing.astype(jnp.int32), nothing)


def _drawn_by_row(noise: Array, logits: Array, drawn: Int[Array, "B"], rows: RowSampling) -> Int[Array, "B"]:
    """Each row's token by its own settings; `drawn` is what the whole distribution gives.

    Rows without filters keep `drawn` whatever their neighbours ask for, and no row is filtered where none asks for it.
    """

    def filtered() -> Array:
        kept = filter_logits(logits, 1.0, rows.top_k, rows.top_p, rows.min_p)
        return jnp.where(rows.filtered, categorical(noise, kept), drawn)

    token = jax.lax.cond(rows.filtered.any(), filtered, lambda: drawn)
    return jnp.where(rows.temperature == 0, jnp.argmax(logits, axis=-1).astype(jnp.int32), token)


def categorical(noise: Float[Array, "B 2"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """A token of softmax(logits) per row, by inversion in two steps: first a block of tokens, then one of the block.

    Each step has a uniform number of its own, so that rare tokens are drawn as precisely as frequent ones. It reads
    the logits once; Gumbel noise would need as many random numbers as there are logits.
    """
    blocks = _blocks(logits)
    largest = blocks.max(axis=1).max(axis=-1, keepdims=True)
    return _inverted(noise, blocks, largest, jnp.exp(blocks - largest[:, None, :]).sum(axis=1))


def _blocks(logits: Float[Array, "B V"]) -> Float[Array, "B M N"]:
    """About √V blocks of M tokens, block n being n, n + N, n + 2N …: sums over M then run along memory."""
    count, size = _block_sizes(logits.shape[-1])
    padded = jnp.pad(logits, ((0, 0), (0, count * size - logits.shape[-1])), constant_values=-jnp.inf)
    return padded.reshape(-1, size, count)


def _block_sizes(vocabulary: int) -> tuple[int, int]:
    """How many blocks, and how many tokens each has."""
    count = max(16, 1 << round(math.log2(vocabulary) / 2))
    return count, -(-vocabulary // count)


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


def stops(token: Int[Array, "B"], position: Array, sampling: Sampling) -> Bool[Array, "B"]:
    """Whether a token at this position of its response ends it."""
    if isinstance(sampling, RowSampling):
        ids = sampling.stops
    else:
        ids = jnp.asarray((sampling.stop_id, *sampling.stop_ids), jnp.int32)[None, :]
    return (token[:, None] == ids).any(axis=1) & (position >= sampling.stop_after)
