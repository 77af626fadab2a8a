"""Self-speculative decoding: guess some tokens, read them all in one call, keep those that would have been drawn.

The sampler's own draw decides: token t is what the plain sampler draws with the noise of position t from the
probabilities at position t, and a guess is kept when it is that token. So the responses are those of plain decoding,
token for token, greedy or sampled, whatever is guessed; guesses only change how many calls they take. For a guess
without randomness this is the rule of Leviathan et al. 2023 (accept with min(1, p/q), else draw from what is left): q
is one point. Heads draw their guesses with the noise of the position that they guess, which makes equal draws likely:
Gumbel coupling keeps a guess with probability at least (1 - TV) / (1 + TV), TV the total variation between p and q
(Daliri, Musco and Suresh 2024, theorem 2), against 1 - TV of the rule, which would make responses depend on guesses.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.generation.engine import SamplingParams, draw
from rlhfjax.generation.lookup import lookup
from rlhfjax.types import Params, PromptBatch, Rollout


@dataclass(frozen=True)
class Speculation:
    """How to guess: `tokens` at a time, by `ngram` (lookup of the last `longest` … 1 tokens in the row) or `heads`."""

    kind: str
    tokens: int
    longest: int = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """What guessing did for each row: calls of the model after the prompt's, tokens guessed, guesses kept."""

    calls: Int[Array, "B"]
    guessed: Int[Array, "B"]
    kept: Int[Array, "B"]


def verify(
    guesses: Int[Array, "B k"], drawn: Int[Array, "B K"], stops: Bool[Array, "B K"], room: Int[Array, "B"]
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """How many of the k + 1 drawn tokens a row keeps, and whether it ends with the last one.

    The token drawn after a guess counts if all guesses before it are what was drawn, no token before it ended the row,
    and the row has room for it.
    """
    right = (guesses == drawn[:, :-1]) & ~stops[:, :-1]
    going_on = jnp.cumprod(right.astype(jnp.int32), axis=1)
    count = jnp.minimum(1 + going_on.sum(axis=1), room)
    last = jnp.take_along_axis(stops, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    return count, last & (count > 0)


class _State(NamedTuple):
    """Rows under way. `context` holds prompt and response from slot 0, `count` counts the response's tokens.

    The cache holds all of a row's tokens but the last.
    """

    cache: Any
    context: Int[Array, "B S"]
    log_probs: Float[Array, "B L"]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]
    ended: Bool[Array, "B"]
    guesses: Int[Array, "B k"]
    counts: Counts


def speculate(
    model: Any,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: SamplingParams,
    speculation: Speculation,
) -> tuple[Rollout, Counts]:
    """The responses that `generate` gives at the same key, and what guessing did; one compiled loop.

    Every row goes on by itself: slots of its cache beyond what it kept are written again by the next call.
    """
    length, size = sampling.max_new_tokens, speculation.tokens
    rows = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, prompts.uid)
    asked = prompts.mask.sum(axis=1, dtype=jnp.int32)

    def step(state: _State) -> _State:
        lengths = asked + state.count
        guesses = state.guesses
        if speculation.kind == "ngram":
            guesses = lookup(state.context, lengths, size, speculation.longest)
        last = jnp.take_along_axis(state.context, lengths[:, None] - 1, axis=1)
        hidden, cache = model.extend(params, state.cache, jnp.concatenate([last, jnp.maximum(guesses, 0)], axis=1))
        drawn, log_probs = _draws(rows, state.count, model.unembed(params, hidden), sampling)
        stops = (drawn == sampling.stop_id) & (_from(state.count, size + 1) >= sampling.stop_after)
        kept, ended = verify(guesses, drawn, stops, jnp.where(state.done, 0, length - state.count))
        count = state.count + kept
        if speculation.kind == "heads":
            seen = jnp.take_along_axis(hidden, jnp.maximum(kept - 1, 0)[:, None, None], axis=1)[:, 0]
            guesses = _guesses(model, params, seen, rows, count, sampling, size)
        return _State(
            replace(cache, lengths=state.cache.lengths + kept),
            _put(state.context, lengths, drawn),
            _put(state.log_probs, state.count, log_probs),
            count,
            state.done | ended | (count >= length),
            state.ended | ended,
            guesses,
            _counted(state.counts, guesses, kept),
        )

    start = _start(model, params, prompts, rows, sampling, speculation)
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, start)
    slots = jnp.arange(length, dtype=jnp.int32)
    mask = slots[None] < state.count[:, None]
    response = jnp.take_along_axis(state.context, asked[:, None] + slots[None], axis=1)
    response = jnp.where(mask, response, sampling.pad_id)
    log_probs = jnp.where(mask, state.log_probs[:, :length], 0.0)
    return Rollout(prompts.tokens, prompts.mask, response, mask, state.ended, log_probs), state.counts


def _from(start: Int[Array, "B"], size: int) -> Int[Array, "B N"]:
    return start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]


def _put(rows: Array, start: Int[Array, "B"], values: Array) -> Array:
    return jax.vmap(lambda row, at, new: jax.lax.dynamic_update_slice(row, new, (at,)))(rows, start, values)


def _draws(
    rows: jax.Array, start: Int[Array, "B"], logits: Float[Array, "B K V"], sampling: SamplingParams
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """What the sampler draws at positions start, start + 1 … with the noise of each."""
    shape = logits.shape[:2]
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(rows, _from(start, shape[1]))
    token, log_prob = draw(keys.reshape(-1), logits.reshape(-1, logits.shape[-1]), sampling)
    return token.reshape(shape), log_prob.reshape(shape)


def _guesses(
    model: Any,
    params: Params,
    hidden: Float[Array, "B D"],
    rows: jax.Array,
    start: Int[Array, "B"],
    sampling: SamplingParams,
    size: int,
) -> Int[Array, "B k"]:
    """What the heads draw at positions start … start + size - 1, from the state that predicted the token before."""
    logits = model.unembed(params, model.ahead(params, hidden)[:size])
    return _draws(rows, start, jnp.swapaxes(logits, 0, 1), sampling)[0]


def _counted(counts: Counts, guesses: Int[Array, "B k"], kept: Int[Array, "B"]) -> Counts:
    called = (kept > 0).astype(jnp.int32)
    guessed = called * (guesses >= 0).sum(axis=1, dtype=jnp.int32)
    return Counts(counts.calls + called, counts.guessed + guessed, counts.kept + jnp.maximum(kept - 1, 0))


def _start(
    model: Any,
    params: Params,
    prompts: PromptBatch,
    rows: jax.Array,
    sampling: SamplingParams,
    speculation: Speculation,
) -> _State:
    """The prompts in the cache and the first token of every response drawn."""
    batch, size = len(prompts.tokens), speculation.tokens
    length = sampling.max_new_tokens
    # Guesses of a row that is about to end are written beyond it: there is room for them, and nobody reads them.
    hidden, cache = model.start(params, prompts.tokens, prompts.mask, length + size)
    nothing = jnp.zeros(batch, jnp.int32)
    first, log_prob = _draws(rows, nothing, model.unembed(params, hidden[:, None]), sampling)
    ended = (first[:, 0] == sampling.stop_id) & (sampling.stop_after <= 0)
    asked = prompts.mask.sum(axis=1, dtype=jnp.int32)
    slots = jnp.arange(prompts.tokens.shape[1], dtype=jnp.int32)[None] + prompts.tokens.shape[1] - asked[:, None]
    moved = jnp.take_along_axis(prompts.tokens, slots, axis=1, mode="clip")
    context = jnp.pad(moved, ((0, 0), (0, length + size + 1)))
    guesses = jnp.zeros((batch, size), jnp.int32)
    if speculation.kind == "heads":
        guesses = _guesses(model, params, hidden, rows, nothing + 1, sampling, size)
    return _State(
        cache,
        _put(context, asked, first),
        jnp.pad(log_prob, ((0, 0), (0, length + size))),
        nothing + 1,
        ended | (length == 1),
        ended,
        guesses,
        Counts(nothing, nothing, nothing),
    )
