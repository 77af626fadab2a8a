"""Keys and values of the tokens that a decoder has read, a slot for each."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhfjax.layout import lay
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.quantized import empty_vectors


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [B, kv_heads, S, head_dim], or of the stack of them, [B, L, S, kv_heads ·
    head_dim]; a token's slot is its position. Each is an array, or integers and scales (`quantized.Int8Vectors`).

    The first `lengths` slots of a row are its own. What the others hold is never read. `routes` are the experts that
    each layer sent these tokens to, -1 where nobody asked; None where they are not kept.
    """

    keys: Any
    values: Any
    lengths: Int[Array, "B"]
    routes: Int[Array, "B S L K"] | None = None

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[2]

    def take(self, rows: Int[Array, "N"]) -> "Cache":
        """The cache of these rows, in this order; a row may come several times."""
        return jax.tree.map(lambda x: x[rows], self)

    def repeat(self, count: int) -> "Cache":
        """The cache with every row `count` times, beside each other."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self)

    def put(self, part: "Cache", rows: Int[Array, "N"]) -> "Cache":
        """This cache with the rows of one with at most as many slots at `rows`, distinct; those beyond the end go
        nowhere.
        """

        def write(mine: Array, theirs: Array) -> Array:
            place = (rows, *(slice(0, size) for size in theirs.shape[1:]))
            return mine.at[place].set(theirs, mode="drop", unique_indices=True)

        return jax.tree.map(write, self, part)


def padded(cache: Cache, room: int) -> Cache:
    """The cache of layers with `room` more slots in each row."""

    def wider(x: Array) -> Array:
        return lay("cache", jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))) if room else x)

    return replace(cache, keys=jax.tree.map(wider, cache.keys), values=jax.tree.map(wider, cache.values))


def unknown_routes(config: DecoderConfig, rows: int, slots: int) -> Int[Array, "B S L K"]:
    """Routes of tokens that nobody sent anywhere."""
    return lay("routes", jnp.full((rows, slots, config.layers, config.experts_per_token), -1, jnp.int16))


def layer_routes(config: DecoderConfig, tokens: Array, chosen: Any, read: Array | None) -> Int[Array, "B T L K"]:
    """The experts of all layers; those of the last are of the columns `read`, where there are such."""
    *others, last = chosen
    if read is not None:
        rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
        last = jnp.full((*tokens.shape, config.experts_per_token), -1, last.dtype).at[rows, read].set(last)
    return lay("routes", jnp.stack([*others, last], axis=2))


def empty_cache(
    config: DecoderConfig, rows: int, slots: int, int8: bool = False, stacked: bool = False, routed: bool = False
) -> Cache:
    """A cache of so many rows without a token."""
    c, lengths = config, lay("rows", jnp.zeros((rows,), jnp.int32))

    def of_layer() -> Any:
        shape = rows, c.kv_heads, slots, c.head_dim
        return jax.tree.map(lambda x: lay("cache", x), empty_vectors(shape, 3, c.compute_dtype, int8))

    def of_stack() -> Any:
        made = empty_vectors((rows, c.layers, slots, c.kv_heads, c.head_dim), 4, c.compute_dtype, int8)
        return jax.tree.map(lambda x: lay("caches", x).reshape(*x.shape[:3], -1), made)

    keys, values = (of_stack() if stacked else tuple(of_layer() for _ in range(c.layers)) for _ in range(2))
    return Cache(keys, values, lengths, unknown_routes(c, rows, slots) if routed else None)
