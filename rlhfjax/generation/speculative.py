"""Self-speculative decoding: draft some tokens, read them all in one call, keep those that would have been drawn.

The sampler's own draw decides: token t is what the plain sampler draws with the noise of position t from the
probabilities at position t, and a draft token is kept when it is that token. So the responses are those of plain
decoding, token for token, greedy or sampled, whatever the draft; it only changes how many calls they take. A draft by
lookup has no randomness, and is kept as often as by the rule of Leviathan et al. 2023 (with probability min(1, p/q),
else a draw from what is left; q is one point). Heads draw theirs with the noise of the position that they draft, so
that equal distributions draw equal tokens (the coupling of Daliri, Musco and Suresh 2024, here by inversion). That rule
would keep 1 - TV(p, q) of these, a bit more, but what a row says would then depend on the draft.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.generation.lookup import lookup
from rlhfjax.generation.sampling import Drawn, SamplingParams, Speculation, draw, stops, uniforms
from rlhfjax.types import Params, PromptBatch, Rollout


def verify(
    guesses: Int[Array, "B k"], drawn: Int[Array, "B K"], stops: Bool[Array, "B K"], room: Int[Array, "B"]
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """How many of the k + 1 drawn tokens a row keeps, and whether it ends with the last one.

    The token drawn after a draft token counts if all of those before it are what was drawn, no token before it
    ended the row, and the row has room for it.
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
    drawn: Drawn  # [B, L], [B, L], [B, L, K], [B, L, K]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]
    ended: Bool[Array, "B"]
    guesses: Int[Array, "B k"]
    counts: Int[Array, "B 3"]


def speculate(
    model: Any,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: SamplingParams,
    speculation: Speculation,
    rows: Int[Array, ""] | int | None = None,
) -> Rollout:
    """The responses that `generate` gives at the same key, and what drafts did (`Rollout.counts`); one compiled loop.

    Every row goes on by itself: slots of its cache beyond what it kept are written again by the next call. Only the
    first `rows` are answered (None: all).
    """
    params = model.arrange(params)
    length, size = sampling.max_new_tokens, speculation.tokens
    noise = uniforms(key, prompts.uid, length)
    asked = prompts.mask.sum(axis=1, dtype=jnp.int32)

    def step(state: _State) -> _State:
        lengths = asked + state.count
        guesses = state.guesses
        if speculation.kind == "ngram":
            guesses = lookup(state.context, lengths, size, speculation.longest)
        last = jnp.take_along_axis(state.context, lengths[:, None] - 1, axis=1)
        read = jnp.concatenate([last, jnp.maximum(guesses, 0)], axis=1)
        hidden, cache = model.extend(params, state.cache, read, jnp.where(state.done, 0, size + 1))
        drawn = _draws(noise, state.count, model.unembed(params, hidden), sampling)
        ends = stops(drawn.token.ravel(), _from(state.count, size + 1).ravel(), sampling).reshape(drawn.token.shape)
        room = jnp.where(state.done, 0, length - state.count)
        kept, ended = verify(guesses, drawn.token, ends, room)
        count = state.count + kept
        if speculation.kind == "heads":
            seen = jnp.take_along_axis(hidden, jnp.maximum(kept - 1, 0)[:, None, None], axis=1)[:, 0]
            guesses = _guesses(model, params, seen, noise, count, sampling, size)
        return _State(
            replace(cache, lengths=state.cache.lengths + kept),
            _put(state.context, lengths, drawn.token),
            Drawn(*(_put(mine, state.count, new) for mine, new in zip(state.drawn, drawn, strict=True))),
            count,
            state.done | ended | (count >= length),
            state.ended | ended,
            guesses,
            _counted(state.counts, guesses, kept, room),
        )

    start = _start(model, params, prompts, noise, sampling, speculation)
    if rows is not None:
        start = start._replace(done=start.done | (jnp.arange(len(asked), dtype=jnp.int32) >= rows))
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, start)
    return _rollout(prompts, state, sampling)


def _rollout(prompts: PromptBatch, state: _State, sampling: SamplingParams) -> Rollout:
    token, log_prob, top_ids, top_log_probs = (x[:, : sampling.max_new_tokens] for x in state.drawn)
    mask = jnp.arange(sampling.max_new_tokens, dtype=jnp.int32)[None, :] < state.count[:, None]
    token, log_prob = jnp.where(mask, token, sampling.pad_id), jnp.where(mask, log_prob, 0.0)
    made = Rollout(prompts.tokens, prompts.mask, token, mask, state.ended, log_prob, counts=state.counts)
    return replace(made, top_ids=top_ids, top_log_probs=top_log_probs) if sampling.top_log_probs else made


def _from(start: Int[Array, "B"], size: int) -> Int[Array, "B N"]:
    return start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]


def _put(rows: Array, start: Int[Array, "B"], values: Array) -> Array:
    return jax.vmap(lambda row, at, new: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))(rows, start, values)


def _draws(
    noise: Float[Array, "B T 2"], start: Int[Array, "B"], logits: Float[Array, "B K V"], sampling: SamplingParams
) -> Drawn:
    """What the sampler draws at positions start, start + 1 … with the noise of each; beyond the last, anything."""
    batch, size, _ = logits.shape
    own = jnp.take_along_axis(noise, _from(start, size)[:, :, None], axis=1, mode="clip")
    drawn = draw(own.reshape(batch * size, 2), logits.reshape(batch * size, -1), sampling)
    return Drawn(*(x.reshape(batch, size, *x.shape[1:]) for x in drawn))


def _guesses(
    model: Any,
    params: Params,
    hidden: Float[Array, "B D"],
    noise: Float[Array, "B T 2"],
    start: Int[Array, "B"],
    sampling: SamplingParams,
    size: int,
) -> Int[Array, "B k"]:
    """What the heads draw at positions start … start + size - 1, from the state that predicted the token before."""
    logits = model.unembed(params, model.ahead(params, hidden)[:size])
    return _draws(noise, start, jnp.swapaxes(logits, 0, 1), sampling).token


def _counted(
    counts: Int[Array, "B 3"], guesses: Int[Array, "B k"], kept: Int[Array, "B"], room: Int[Array, "B"]
) -> Int[Array, "B 3"]:
    guessed = jnp.minimum((guesses >= 0).sum(axis=1, dtype=jnp.int32), jnp.maximum(room - 1, 0))
    return counts + jnp.stack([(room > 0).astype(jnp.int32), guessed, jnp.maximum(kept - 1, 0)], axis=1)


def _start(
    model: Any,
    params: Params,
    prompts: PromptBatch,
    noise: Float[Array, "B T 2"],
    sampling: SamplingParams,
    speculation: Speculation,
) -> _State:
    """The prompts in the cache and the first token of every response drawn."""
    batch, size = len(prompts.tokens), speculation.tokens
    length = sampling.max_new_tokens
    hidden, cache = model.start(params, prompts.tokens, prompts.mask, length)
    nothing = jnp.zeros(batch, jnp.int32)
    first = _draws(noise, nothing, model.unembed(params, hidden[:, None]), sampling)
    ended = stops(first.token[:, 0], nothing, sampling)
    asked = prompts.mask.sum(axis=1, dtype=jnp.int32)
    slots = jnp.arange(prompts.tokens.shape[1], dtype=jnp.int32)[None] + prompts.tokens.shape[1] - asked[:, None]
    moved = jnp.take_along_axis(prompts.tokens, slots, axis=1, mode="clip")
    # What is drawn after the end of a row is written behind it, where there is room and nobody reads.
    context = jnp.pad(moved, ((0, 0), (0, length + size + 1)))
    guesses = jnp.zeros((batch, size), jnp.int32)
    if speculation.kind == "heads":
        guesses = _guesses(model, params, hidden, noise, nothing + 1, sampling, size)
    return _State(
        cache,
        _put(context, asked, first.token),
        Drawn(*(jnp.pad(x, ((0, 0), (0, length + size)) + ((0, 0),) * (x.ndim - 2)) for x in first)),
        nothing + 1,
        ended | (length == 1),
        ended,
        guesses,
        jnp.zeros((batch, 3), jnp.int32),
    )
