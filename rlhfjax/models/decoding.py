"""A decoder that samples: weights laid out for one token per row, a cache of keys and values, and `extend`.

The layers are unrolled, and the cache is updated in place: a scan over layers would copy both in every step of the loop
that samples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.activations import GATED, PLAIN
from rlhfjax.models.attention import softmax
from rlhfjax.models.cache import Cache
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.experts import Experts
from rlhfjax.models.layers import at_columns, by_heads, norm
from rlhfjax.models.quantized import Int8Vectors, read_vectors, vectors
from rlhfjax.models.rotary import rotate, turns
from rlhfjax.models.sampling_weights import Weights, apply, apply_all, columns
from rlhfjax.types import Params

Store = Callable[[int, Array, Array], tuple[Any, Any]]


def _norm(config: DecoderConfig, params: Params, name: str, x: Array) -> Array:
    return norm(config, name).apply({"params": params[name]}, x)  # pyright: ignore[reportReturnType]


def _attention(config: DecoderConfig, layer: Params, x: Array, turn: Any, mask: Array, store: Any, read: Any) -> Any:
    """Attention of T new tokens per row, or of those at `read`, to what `store` answers with once it has their keys and
    values.
    """
    c, batch = config, len(x)
    joined = apply_all(c, layer["qkv"], x).reshape(batch, x.shape[1], c.heads + 2 * c.kv_heads, c.head_dim)
    query, key, value = jnp.split(joined, [c.heads, c.heads + c.kv_heads], axis=2)
    if c.qk_norm:
        query = by_heads(c, lambda x: _norm(c, layer, "query_norm", x), query)
        key = by_heads(c, lambda x: _norm(c, layer, "key_norm", x), key)
    if turn is not None:
        query, key = rotate(query, turn), rotate(key, turn)
    keys, values = store(key.astype(c.compute_dtype), value.astype(c.compute_dtype))
    query, mask = _wanted(query, read), _wanted(mask, read)
    length = query.shape[1]
    grouped = query.reshape(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    numbers, scales = read_vectors(keys, query.dtype)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, numbers, preferred_element_type=jnp.float32)
    if scales is not None:
        scores = scores * scales[:, :, None, None, :, 0]
    scores = scores * c.score_scale
    if cap := c.attention_softcap:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = softmax(scores, layer.get("sinks"))
    numbers, scales = read_vectors(values, query.dtype)
    if scales is not None:
        weights = weights * scales[:, :, None, None, :, 0]
    out = jnp.einsum("bkgts,bksd->btkgd", weights.astype(numbers.dtype), numbers)
    return apply(c, layer["out"], out.reshape(batch, length, -1)), (keys, values)


def _wanted(x: Float[Array, "B T *D"], read: Int[Array, "B N"] | None) -> Float[Array, "B N *D"]:
    return x if read is None else at_columns(x, read)


def _fed(config: DecoderConfig, layer: Params, x: Array) -> Array:
    c = config
    if c.experts:
        return Experts(c).apply({"params": layer["experts"]}, x, jnp.ones(x.shape[:2], bool))  # pyright: ignore
    hidden = apply_all(c, layer["up"], x)
    if not c.gated:
        return apply(c, layer["down"], PLAIN[c.activation](hidden))
    return apply(c, layer["down"], GATED[c.activation](*jnp.split(hidden, 2, axis=-1)))


def _block(config: DecoderConfig, layer: Params, x: Array, turn: Any, mask: Array, store: Any, read: Any) -> Any:
    """One layer, its norms where `norm_place` says (`layers.Block`); nothing but keys and values beside `read`."""
    c = config

    def normed(y: Array, name: str, *places: str) -> Array:
        return _norm(c, layer, name, y) if c.norm_place in places else y

    def added(block: Array, name: str) -> Array:
        out = normed(block, name, "output", "sandwich")
        return out if c.residual_multiplier == 1 else c.residual_multiplier * out

    attended, kept = _attention(c, layer, normed(x, "attention_norm", "pre", "sandwich"), turn, mask, store, read)
    before = _wanted(x, read)
    x = normed(before + added(attended, "attention_post_norm"), "attention_norm", "post")
    fed = _fed(c, layer, normed(before if c.parallel else x, "mlp_norm", "pre", "sandwich"))
    return normed(x + added(fed, "mlp_post_norm"), "mlp_norm", "post"), kept


def _embedded(config: DecoderConfig, weights: Weights, tokens: Array, positions: Array) -> Array:
    c, embed = config, weights.ends["embed"]
    x = embed["embedding"][tokens]
    if "embedding_scale" in embed:
        x = x.astype(jnp.float32) * embed["embedding_scale"][tokens]
    if c.input_scale != 1:
        x = x * c.input_scale
    if c.positions == "learned":
        x = x + weights.ends["positions"]["embedding"][jnp.minimum(positions, c.context - 1)]
    return x.astype(c.compute_dtype)


def _forward(
    config: DecoderConfig,
    weights: Weights,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    slots: int,
    store: Store,
    read: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B T D"], tuple, tuple]:
    """Hidden states of T tokens per row that see the slots up to their own, and the keys and values of every layer.

    With `read` the states of these columns of each row alone, [B, N, D].
    """
    c = config
    distance = positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    everything = distance >= 0
    near = everything & (distance < c.window) if c.window else everything

    turned = turns(c, positions)
    x, kept = _embedded(c, weights, tokens, positions), []
    for i, (layer, local, rotated) in enumerate(zip(weights.layers, c.local_layers, c.rotated_layers, strict=True)):
        mask, last = near if local else everything, read if i == c.layers - 1 else None
        turn = turned[local] if rotated else None
        x, pair = _block(c, layer, x, turn, mask, lambda key, value, i=i: store(i, key, value), last)
        kept.append(pair)
    if c.norm_place != "post":
        x = _norm(c, weights.ends, "final_norm", x)
    return x, *zip(*kept, strict=True)  # pyright: ignore[reportReturnType]


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

    def store(layer: int, key: Array, value: Array) -> tuple[Any, Any]:
        keys, values = cache.keys[layer], cache.values[layer]
        int8 = isinstance(keys, Int8Vectors)

        def put(mine: Array, new: Array) -> Array:
            return mine.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

        return jax.tree.map(put, keys, vectors(key, int8)), jax.tree.map(put, values, vectors(value, int8))

    hidden, keys, values = _forward(config, weights, tokens, positions, cache.slots, store)
    return hidden, Cache(keys, values, cache.lengths + counts)


def prefill(
    config: DecoderConfig, weights: Weights, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], int8: bool = False
) -> tuple[Float[Array, "B D"], Cache]:
    """`extend` of empty rows by their first `lengths` tokens, with as many slots as there are columns; the hidden state
    of the last of them.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

    def store(_: int, key: Array, value: Array) -> Any:
        kept = vectors(key, int8), vectors(value, int8)
        return jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), kept)

    last = jnp.maximum(lengths - 1, 0)[:, None]
    hidden, keys, values = _forward(config, weights, tokens, positions, length, store, last)
    return hidden[:, 0], Cache(keys, values, lengths)


def unembed(config: DecoderConfig, weights: Weights, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Hidden states to float32 logits; products in the type of the computation, sums in float32."""
    linear, cap = weights.ends["unembed"], config.logit_softcap
    x = hidden.astype(config.compute_dtype)
    made = [jnp.matmul(x, block.astype(x.dtype), preferred_element_type=jnp.float32) for block in columns(linear)]
    logits = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    if "scale" in linear:
        logits = logits * linear["scale"].reshape((1,) * (logits.ndim - 1) + (-1,))
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    return cap * jnp.tanh(logits / cap) if cap else logits
