"""Attention of new tokens through the cache of a stack of layers, as TPUs read it: in place, and without a copy.

All heads of a token lie beside each other, [B, L, S, K · D], so that it is written as one row of a tile, and a product
reads a layer's slots where they are. A query then meets all heads at once, with zeros where they are not its own. That
is K times the arithmetic of a step which waits for memory. (With heads apart XLA copies a layer's slots for every
token, which takes three times as long as reading them, by the compiler's own estimate for v5p.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models.attention import softmax
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.quantized import Int8Vectors, read_vectors, vectors


def through_stack(
    config: DecoderConfig,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    kept: tuple[Any, Any],
    layer: Int[Array, ""],
    slots: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, "H"] | None,
) -> tuple[Float[Array, "B T H D"], tuple[Any, Any]]:
    """Keys and values put into these slots of a layer, those beyond the end nowhere, and what the queries mix of the
    slots that the mask shows them.

    Heads may be some of the model's; `kept` are the keys and values of all layers, [B, L, S, K · D], or integers and
    their scales [B, L, S, K].
    """
    c, (batch, length, heads, size), kinds = config, query.shape, key.shape[2]
    int8 = isinstance(kept[0], Int8Vectors)

    def put(mine: Array, new: Array) -> Array:
        def row(mine: Array, slots: Array, new: Array) -> Array:
            return mine.at[layer, slots].set(new, mode="drop", unique_indices=True)

        return jax.vmap(row)(mine, slots, new.reshape(batch, length, -1))

    kept = jax.tree.map(put, kept, (vectors(key, int8), vectors(value, int8)))
    keys, values = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 1, keepdims=False), kept)
    own = jnp.eye(kinds, dtype=query.dtype)[:, None, :, None]
    wide = (query.reshape(batch, length, kinds, -1, 1, size) * own[None, None]).reshape(batch, length * heads, -1)
    numbers, scales = read_vectors(keys, query.dtype)
    scores = jnp.einsum("bhc,bsc->bhs", wide, numbers, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, length, heads, -1)
    if scales is not None:
        scores = scores * _by_head(scales, heads)
    scores = scores * c.score_scale
    if cap := c.attention_softcap:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1) if sinks is None else _with_sinks(scores, sinks)
    numbers, scales = read_vectors(values, query.dtype)
    if scales is not None:
        weights = weights * _by_head(scales, heads)
    weights = weights.astype(numbers.dtype).reshape(batch, length * heads, -1)
    mixed = jnp.einsum("bhs,bsc->bhc", weights, numbers).reshape(batch, length, kinds, -1, kinds, size)
    return (mixed * own[None, None]).sum(axis=4).reshape(query.shape), kept


def _by_head(scales: Float[Array, "B S K"], heads: int) -> Float[Array, "B 1 H S"]:
    """The scales of the vectors that each head reads."""
    return jnp.repeat(scales.transpose(0, 2, 1), heads // scales.shape[2], axis=1)[:, None]


def _with_sinks(scores: Float[Array, "B T H S"], sinks: Float[Array, "H"]) -> Float[Array, "B T H S"]:
    return softmax(scores.transpose(0, 2, 1, 3)[:, :, None], sinks)[:, :, 0].transpose(0, 2, 1, 3)
