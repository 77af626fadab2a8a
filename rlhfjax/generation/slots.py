"""Sampling with continuous batching: a row that ends makes room for the next prompt, inside one compiled program.

All prompts are read first, in groups of like length. Then `slots` rows decode, and one that ends takes the keys and
values of the next response's prompt, which are a copy away. Samples of one prompt share what was read of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.generation.routes import routes_of, with_routes
from rlhfjax.generation.sampling import Drawn, RowSampling, Sampler, Sampling, SamplingParams, uniforms
from rlhfjax.generation.session import Slots, Step, admit, empty_slots, step
from rlhfjax.generation.speculative import speculate
from rlhfjax.types import Params, PromptBatch, Rollout

_WIDE = 64  # tokens from which on reading a prompt at half of the width saves more than it costs to compile


class Made(NamedTuple):
    """Responses so far: N rows of R tokens, and of what was reported of each token."""

    drawn: Drawn  # [N R], [N R], [N R K], [N R K]
    lengths: Int[Array, "N"]
    finished: Bool[Array, "N"]
    routes: Int[Array, "N S L K"] | None = None  # of their caches, where these keep any


class _Queue(NamedTuple):
    """N responses to write, `samples` of each prompt beside each other, of which the first `wanted` are written."""

    read: Any  # the model's cache of all prompts
    logits: Float[Array, "P V"]  # what follows each prompt
    noise: Float[Array, "N R 2"]
    sampling: Sampling  # of each prompt, or one static setting
    samples: int
    wanted: Array | int


_Carry = tuple[Array, Array, Slots, Made]  # responses admitted, each slot's response, the slots, what was written


def rollout(
    model: Sampler,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: SamplingParams,
    slots: int | None = None,
    samples: int = 1,
    asked: Int[Array, ""] | None = None,
    rows: RowSampling | None = None,
) -> Rollout:
    """What `generate` returns, token for token, with at most `slots` rows decoding at a time (None: all of them).

    With `samples` n, each prompt has n rows beside each other, and sample j of a prompt has the uid n · uid + j.
    Only the first `asked` prompts are answered (None: all), so that one program serves any number of them. With `rows`
    each prompt's responses are drawn as its row says, within the shapes of `sampling`.
    """
    if sampling.speculation:  # rows advance unevenly as it is, and none is read again
        limit = None if asked is None else asked * samples
        return speculate(model, params, each_sample(prompts, samples), key, sampling, sampling.speculation, limit)
    count = len(prompts.tokens) * samples
    slots = min(slots or count, count)
    params = model.arrange(params, slots)
    noise = uniforms(key, _uids(prompts, samples), sampling.max_new_tokens)
    wanted = count if asked is None else asked * samples
    logits, read = _read(model, params, prompts, slots, asked)
    settings = sampling if rows is None else rows
    queue = _Queue(read, logits, noise, settings, samples, wanted)
    at_once = max(1, slots // 4) if slots < count else count

    def fill_and_decode(carry: _Carry) -> _Carry:
        waiting, owner, state, made = _fill(_routed(carry), queue, at_once)

        def goes_on(inner: tuple[Slots, Made]) -> Array:
            active = inner[0].active
            return active.any() & (active.all() | (waiting >= wanted))

        def decode(inner: tuple[Slots, Made]) -> tuple[Slots, Made]:
            state, made = inner
            after, new = step(model, params, state)
            return after, _record(made, new, owner, state.position)

        return waiting, owner, *jax.lax.while_loop(goes_on, decode, (state, made))

    def unfinished(carry: _Carry) -> Array:
        waiting, _, state, _ = carry
        return (waiting < wanted) | state.active.any()

    cache = model.empty_cache(slots, prompts.tokens.shape[1], sampling.max_new_tokens)
    some = jnp.zeros(slots, jnp.int32)
    state = empty_slots(cache, noise[some], jax.tree.map(lambda x: x[some], settings))
    start = jnp.int32(0), some, state, _nothing(count, sampling, cache)
    *_, made = _routed(jax.lax.while_loop(unfinished, fill_and_decode, start))
    return _rollout(prompts, made, samples, sampling)


def _routed(carry: _Carry) -> _Carry:
    """The same, and what is in the slots now is kept of the routes of their responses."""
    waiting, owner, state, made = carry
    if made.routes is None:
        return carry
    nobody = len(made.lengths) + jnp.arange(len(owner), dtype=jnp.int32)
    owned = jnp.where(state.cache.lengths > 0, owner, nobody)
    routes = made.routes.at[owned].set(routes_of(state.cache), mode="drop", unique_indices=True)
    return waiting, owner, state, made._replace(routes=routes)


def _fill(carry: _Carry, queue: _Queue, at_once: int) -> _Carry:
    """Give up to so many free slots the next responses, and draw the first token of each."""
    waiting, owner, state, made = carry
    count, slots = len(queue.noise), len(state.active)
    free = jnp.argsort(state.active, stable=True)[:at_once].astype(jnp.int32)
    mine = waiting + jnp.arange(at_once, dtype=jnp.int32)
    taken = ~state.active[free] & (mine < queue.wanted)
    # One that nobody is there for, or that finds no free slot, goes to a place where nothing is written.
    place = jnp.where(taken, free, slots + jnp.arange(at_once, dtype=jnp.int32))
    known = jnp.minimum(mine, count - 1)
    source = known // queue.samples
    own = jax.tree.map(lambda x: x[source], queue.sampling)
    state, new = admit(state, place, queue.read.take(source), queue.logits[source], queue.noise[known], own)
    made = _record(made, new, mine, jnp.zeros(at_once, jnp.int32))
    owner = owner.at[place].set(mine, mode="drop", unique_indices=True)
    return waiting + taken.sum(dtype=jnp.int32), owner, state, made


def _uids(prompts: PromptBatch, samples: int) -> Int[Array, "N"]:
    return (prompts.uid[:, None] * samples + jnp.arange(samples, dtype=jnp.int32)[None, :]).ravel()


def each_sample(prompts: PromptBatch, samples: int) -> PromptBatch:
    """A row for every sample of every prompt."""
    tokens, mask = (jnp.repeat(x, samples, axis=0) for x in (prompts.tokens, prompts.mask))
    return PromptBatch(tokens, mask, _uids(prompts, samples))


def _read(model: Sampler, params: Any, prompts: PromptBatch, slots: int, asked: Array | None) -> tuple:
    """Logits after each prompt, and the cache of them all, read `slots` at a time.

    Prompts are taken by length, so that a group of short ones is read at half of the width.
    """
    count, width = prompts.tokens.shape
    group = min(slots, count)
    wanted = count if asked is None else asked
    lengths = jnp.where(
        jnp.arange(count, dtype=jnp.int32) < wanted, prompts.mask.sum(axis=1, dtype=jnp.int32), width + 1
    )
    order = jnp.argsort(lengths, stable=True).astype(jnp.int32)
    widths = (width // 2, width) if width >= _WIDE else (width,)
    if group == count and len(widths) == 1:
        logits, read = model.prefill(params, prompts.tokens, prompts.mask, 0)
        return logits, read

    def read_group(carry: tuple) -> tuple:
        start, logits, read = carry
        place = start + jnp.arange(group, dtype=jnp.int32)
        chosen = order[jnp.minimum(place, count - 1)]
        tokens, mask = prompts.tokens[chosen], prompts.mask[chosen]
        place = jnp.where(place < count, chosen, place)

        def within(size: int) -> Callable[[tuple], tuple]:
            def run(kept: tuple) -> tuple:
                made, part = model.prefill(params, tokens[:, width - size :], mask[:, width - size :], 0)
                return kept[0].at[place].set(made, mode="drop", unique_indices=True), kept[1].put(part, place)

            return run

        longest = mask.sum(axis=1).max()
        branch = sum(((longest > size).astype(jnp.int32) for size in widths[:-1]), jnp.int32(0))
        logits, read = jax.lax.switch(branch, [within(size) for size in widths], (logits, read))
        return start + group, logits, read

    shapes = jax.eval_shape(lambda: model.prefill(params, prompts.tokens[:1], prompts.mask[:1], 0))
    logits = jnp.zeros((count, shapes[0].shape[1]), jnp.float32)
    start = jnp.int32(0), logits, model.empty_cache(count, width, 0)
    return jax.lax.while_loop(lambda carry: carry[0] < wanted, read_group, start)[1:]


def _nothing(count: int, sampling: SamplingParams, cache: Any) -> Made:
    shape = (count, sampling.max_new_tokens)
    top = (*shape, sampling.top_log_probs)
    drawn = Drawn(
        jnp.full(shape, sampling.pad_id, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top, jnp.float32),
    )
    routes = routes_of(cache)
    if routes is not None:
        routes = jnp.full((count, *routes.shape[1:]), -1, routes.dtype)
    return Made(drawn, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool), routes)


def _record(made: Made, new: Step, owner: Int[Array, "S"], position: Int[Array, "S"]) -> Made:
    """The responses with one token more in those that `owner` names, of the rows that wrote one."""
    nobody = len(made.lengths) + jnp.arange(len(owner), dtype=jnp.int32)  # beyond the end, where nothing is written
    owner = jnp.where(new.written, owner, nobody)
    drawn = jax.tree.map(
        lambda rows, values: rows.at[owner, position].set(values, mode="drop", unique_indices=True),
        made.drawn,
        new.drawn,
    )
    lengths = made.lengths.at[owner].set(position + 1, mode="drop", unique_indices=True)
    finished = made.finished.at[owner].set(new.stopped, mode="drop", unique_indices=True)
    return made._replace(drawn=drawn, lengths=lengths, finished=finished)


def _rollout(prompts: PromptBatch, made: Made, samples: int, sampling: SamplingParams) -> Rollout:
    mask = jnp.arange(sampling.max_new_tokens, dtype=jnp.int32)[None, :] < made.lengths[:, None]
    asked, asked_mask = (jnp.repeat(x, samples, axis=0) for x in (prompts.tokens, prompts.mask))
    top: dict[str, Any] = {}
    if sampling.top_log_probs:
        top = {"top_ids": made.drawn.top_ids, "top_log_probs": made.drawn.top_log_probs}
    rollout = Rollout(asked, asked_mask, made.drawn.token, mask, made.finished, made.drawn.log_prob, **top)
    return with_routes(rollout, made.routes)
