"""A decoder that samples: weights laid out for one token per row, a cache of keys and values, and `extend`.

Where the layers are unrolled, the cache of each is updated in place: a scan over layers would copy both in every step
of the loop that samples. TPUs read a layer where it lies in a stack, so there they are scanned, and a program of eighty
layers is compiled as fast as one of two.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax import layout
from rlhfjax.layout import lay
from rlhfjax.models.attention import Scoring, attend, softmax
from rlhfjax.models.cache import Cache, empty_cache, layer_routes, padded, unknown_routes
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.layers import at_columns, by_heads, kinds, norm
from rlhfjax.models.quantized import plain_vectors, read_vectors, vectors
from rlhfjax.models.rotary import Turn, rotate, turn_of, turns
from rlhfjax.models.sampling_weights import Weights, columns, fed, projected, put_out
from rlhfjax.models.sampling_weights import routed as through_experts
from rlhfjax.models.stacked_cache import through_stack
from rlhfjax.target import current
from rlhfjax.types import Params

Local = bool | Array  # whether a layer has the window; traced where layers of both kinds are in one scan
Heads = tuple[Array, Array, Array]  # query [B, T, H, D], key and value [B, T, K, D] of new tokens


class Attention(Protocol):
    """What new tokens of layer `i` mix, [B, T, H, D] or at the columns `read` alone; and what is kept of them."""

    def __call__(
        self, i: Any, layer: Params, local: Local, heads: Heads, *, kept: Any, read: Any
    ) -> tuple[Array, Any]: ...


def _norm(config: DecoderConfig, params: Params, name: str, x: Array) -> Array:
    return norm(config, name).apply({"params": params[name]}, x)  # pyright: ignore[reportReturnType]


def _attended(
    config: DecoderConfig, layer: Params, x: Array, turn: Turn | None, attention: Callable[..., tuple[Array, Any]]
) -> tuple[Array, Any]:
    """What attention of T new tokens per row adds, and what is kept of them."""
    c = config
    query, key, value = projected(c, layer, x)
    if c.qk_norm:
        norms = layer.get("attention", layer)
        query = by_heads(c, lambda x: _norm(c, norms, "query_norm", x), query)
        key = by_heads(c, lambda x: _norm(c, norms, "key_norm", x), key)
    if turn is not None:
        query, key = rotate(query, turn), rotate(key, turn)
    key, value = (lay("heads", x.astype(c.compute_dtype)) for x in (key, value))
    out, kept = attention((lay("heads", query), key, value))
    return put_out(c, layer, out), kept


def _mixed(config: DecoderConfig, layer: Params, query: Array, mask: Array, keys: Any, values: Any) -> Array:
    """Attention of tokens [B, T, H, D] to the vectors of a cache that the mask shows them, [B, T, H, D]."""
    c, (batch, length) = config, query.shape[:2]
    grouped = query.reshape(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    numbers, scales = read_vectors(keys, query.dtype)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, numbers, preferred_element_type=jnp.float32)
    if scales is not None:
        scores = scores * scales[:, :, None, None, :, 0]
    scores = scores * c.score_scale
    if cap := c.attention_softcap:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = softmax(scores, _sinks(layer))
    numbers, scales = read_vectors(values, query.dtype)
    if scales is not None:
        weights = weights * scales[:, :, None, None, :, 0]
    return jnp.einsum("bkgts,bksd->btkgd", weights.astype(numbers.dtype), numbers).reshape(query.shape)


def _sinks(layer: Params) -> Array | None:
    return layer.get("attention", layer).get("sinks")


def _wanted(x: Float[Array, "B T *D"], read: Int[Array, "B N"] | None) -> Float[Array, "B N *D"]:
    return x if read is None else at_columns(x, read)


def _block(
    config: DecoderConfig, layer: Params, x: Array, turn: Turn | None, attention: Any, read: Any, routed: bool
) -> tuple[Array, Any, Array | None]:
    """One layer, its norms where `norm_place` says (`layers.Block`); nothing but keys and values beside `read`.

    With `routed` also the experts that these tokens were sent to.
    """
    c = config

    def normed(y: Array, name: str, *places: str) -> Array:
        return _norm(c, layer, name, y) if c.norm_place in places else y

    def added(block: Array, name: str) -> Array:
        out = normed(block, name, "output", "sandwich")
        return out if c.residual_multiplier == 1 else c.residual_multiplier * out

    attended, kept = _attended(c, layer, normed(x, "attention_norm", "pre", "sandwich"), turn, attention)
    before = _wanted(x, read)
    x = lay("residual", normed(before + added(attended, "attention_post_norm"), "attention_norm", "post"))
    into, chosen = normed(before if c.parallel else x, "mlp_norm", "pre", "sandwich"), None
    if routed:
        out, chosen = through_experts(c, layer, into)
    else:
        out = fed(c, layer, into)
    return lay("residual", normed(x + added(out, "mlp_post_norm"), "mlp_norm", "post")), kept, chosen


def _embedded(config: DecoderConfig, weights: Weights, tokens: Array, positions: Array) -> Array:
    c, embed = config, weights.ends["embed"]
    x = embed["embedding"][tokens]
    if "embedding_scale" in embed:
        x = x.astype(jnp.float32) * embed["embedding_scale"][tokens]
    if c.input_scale != 1:
        x = x * c.input_scale
    if c.positions == "learned":
        x = x + weights.ends["positions"]["embedding"][jnp.minimum(positions, c.context - 1)]
    return lay("residual", x.astype(c.compute_dtype))


def _forward(
    config: DecoderConfig,
    weights: Weights,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attention: Attention,
    kept: Any = None,
    read: Int[Array, "B N"] | None = None,
    routed: bool = False,
) -> tuple[Float[Array, "B T D"], Any, Int[Array, "B T L K"] | None]:
    """Hidden states of T tokens per row, and what `attention` keeps: of each layer, or of the stack that it is given;
    with `routed` the experts that each layer sent the tokens to, -1 where it was not asked.

    With `read` the states of these columns of each row alone, [B, N, D].
    """
    c = config
    turned = turns(c, positions)
    x = _embedded(c, weights, tokens, positions)
    if weights.stacked:
        x, kept, chosen = _scanned(c, weights, x, turned, attention, kept, read, routed)
    else:
        each, chosen = [], []
        for i, (layer, local, rotated) in enumerate(zip(weights.layers, c.local_layers, c.rotated_layers, strict=True)):
            last, turn = read if i == c.layers - 1 else None, turned[local] if rotated else None
            own = partial(attention, i, layer, local, kept=kept, read=last)
            x, pair, sent = _block(c, layer, x, turn, own, last, routed)
            each.append(pair)
            chosen.append(sent)
        kept = tuple(zip(*each, strict=True))
    routes = layer_routes(c, tokens, chosen, read) if routed else None
    return x if c.norm_place == "post" else _norm(c, weights.ends, "final_norm", x), kept, routes


def _scanned(
    c: DecoderConfig,
    weights: Weights,
    x: Array,
    turned: Any,
    attention: Attention,
    kept: Any,
    read: Array | None,
    routed: bool,
) -> tuple[Array, Any, list[Array]]:
    """The layers as one loop, in which what is kept is updated in place; with `read` the last stands apart."""
    stack = weights.layers, kinds(c)

    def body(carry: tuple[Array, Any], i: Any, read: Array | None = None) -> tuple[tuple[Array, Any], Array | None]:
        layer, kind = jax.tree.map(partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False), stack)
        local: Local = all(c.local_layers) if kind.local is None else kind.local
        turn = turn_of(turned, local, c.rotated_layers[0] if kind.rotated is None else kind.rotated)
        own = partial(attention, i, layer, local, kept=carry[1], read=read)
        made, new, chosen = _block(c, layer, carry[0], turn, own, read, routed)
        return (made, new), chosen

    looped = c.layers if read is None else c.layers - 1
    carry, chosen = jax.lax.scan(body, (x, kept), jnp.arange(looped, dtype=jnp.int32))
    each = [] if chosen is None else list(chosen)
    if read is not None:
        carry, last = body(carry, jnp.int32(c.layers - 1), read)
        each.append(last)
    return *carry, each


def _masks(config: DecoderConfig, positions: Int[Array, "B T"], slots: int) -> Callable[[Local], Bool[Array, "B T S"]]:
    """Which slots tokens at these positions see in a layer: those up to their own, near ones alone in a window."""
    c = config
    distance = positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    everything = distance >= 0
    near = everything & (distance < c.window) if c.window else everything
    return lambda local: (
        (near if local else everything) if isinstance(local, bool) else jnp.where(local, near, everything)
    )


def extend(
    config: DecoderConfig, weights: Weights, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], Cache]:
    """Append the first `counts` of T tokens to each row, behind its own end; their hidden states.

    Every token sees its row up to itself. The states of the others mean nothing, and nothing is kept of them. With T 1
    this is decoding, with more the verification of draft tokens.
    """
    batch, length = tokens.shape
    steps = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = cache.lengths[:, None] + steps
    # Those that are not kept go to slots beyond the end, a different one each.
    slots = jnp.where(steps < counts[:, None], positions, cache.slots + steps)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    masks = _masks(config, positions, cache.slots)
    int8 = any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(cache.keys))

    def put(mine: Array, new: Array) -> Array:
        return lay("cache", mine.at[rows, :, slots].set(new, mode="drop", unique_indices=True))

    def of_layer(i: int, layer: Params, local: Local, heads: Heads, *, kept: Any, read: Any) -> Any:
        query = heads[0]
        keys, values = (
            jax.tree.map(put, mine[i], vectors(new, int8)) for mine, new in zip(kept, heads[1:], strict=True)
        )
        return _mixed(config, layer, query, masks(local), keys, values), (keys, values)

    def of_stack(i: Array, layer: Params, local: Local, heads: Heads, *, kept: Any, read: Any) -> Any:
        program, devices = partial(through_stack, config), layout.current()
        program = program if devices is None else devices.cached(program)
        return program(*heads, kept, i, slots, masks(local), _sinks(layer))

    kept, attention = (cache.keys, cache.values), of_stack if weights.stacked else of_layer
    routed = cache.routes is not None
    hidden, (keys, values), routes = _forward(config, weights, tokens, positions, attention, kept, routed=routed)
    if cache.routes is not None:
        routes = lay("routes", cache.routes.at[rows, slots].set(routes, mode="drop", unique_indices=True))
    return hidden, Cache(keys, values, cache.lengths + counts, routes)


def prefill(
    config: DecoderConfig,
    weights: Weights,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    int8: bool = False,
    room: int = 0,
    routed: bool = False,
) -> tuple[Float[Array, "B D"], Cache]:
    """`extend` of empty rows by their first `lengths` tokens, with `room` for so many more than there are columns; the
    hidden state of the last of them.
    """
    c, (batch, length) = config, tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    masks = _masks(c, positions, length)
    segments = (positions < lengths[:, None]).astype(jnp.int32)

    def mixed(layer: Params, local: Local, query: Array, keys: Any, values: Any, read: Any) -> Array:
        """`keys` and `values` as they are kept, [B, T, K, D]."""
        if current().platform == "cpu" and not weights.whole:
            keys, values = by_slot(keys), by_slot(values)
            return _mixed(c, layer, _wanted(query, read), _wanted(masks(local), read), keys, values)
        arrays = query, plain_vectors(keys, query.dtype), plain_vectors(values, query.dtype)
        scoring = Scoring(c.window, c.score_scale, c.attention_softcap)
        how: dict[str, Any] = {"scoring": scoring, "sinks": _sinks(layer), "implementation": c.attention}
        return _wanted(lay("heads", attend(*arrays, segments, local, **how)), read)

    def by_slot(kept: Any) -> Any:
        return jax.tree.map(lambda x: lay("cache", x.transpose(0, 2, 1, 3)), kept)

    def of_layer(i: int, layer: Params, local: Local, heads: Heads, *, kept: Any, read: Any) -> Any:
        query, key, value = heads
        keys, values = vectors(key, int8), vectors(value, int8)
        return mixed(layer, local, query, keys, values, read), (by_slot(keys), by_slot(values))

    def of_stack(i: Array, layer: Params, local: Local, heads: Heads, *, kept: Any, read: Any) -> Any:
        query, key, value = heads
        new = vectors(key, int8), vectors(value, int8)

        def put(mine: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(mine, new.reshape(batch, 1, length, -1), (0, i, 0, 0))

        return mixed(layer, local, query, *new, read), jax.tree.map(put, kept, new)

    last = jnp.maximum(lengths - 1, 0)[:, None]
    if weights.stacked:
        empty = empty_cache(c, batch, length + room, int8, stacked=True)
        arrays = empty.keys, empty.values
        hidden, kept, routes = _forward(c, weights, tokens, positions, of_stack, arrays, last, routed)
        made = replace(empty, keys=kept[0], values=kept[1], lengths=lengths)
    else:
        hidden, (keys, values), routes = _forward(c, weights, tokens, positions, of_layer, None, last, routed)
        made = padded(Cache(keys, values, lengths), room)
    if routes is not None:
        made = replace(made, routes=jnp.concatenate([routes, unknown_routes(c, batch, room)], axis=1))
    return hidden[:, 0], made


def unembed(config: DecoderConfig, weights: Weights, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Hidden states to float32 logits; products in the type of the computation, sums in float32."""
    linear, cap = weights.ends["unembed"], config.logit_softcap
    x = hidden.astype(config.compute_dtype)
    made = [jnp.matmul(x, block.astype(x.dtype), preferred_element_type=jnp.float32) for block in columns(linear)]
    logits = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    if "scale" in linear:
        logits = logits * linear["scale"].reshape((1,) * (logits.ndim - 1) + (-1,))
    if logits.ndim == 2:
        logits = lay("logits", logits)
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    return cap * jnp.tanh(logits / cap) if cap else logits
