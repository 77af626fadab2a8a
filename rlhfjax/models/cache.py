"""Keys and values of the tokens that a decoder has read, a slot for each."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.quantized import empty_vectors


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [B, kv_heads, S, head_dim]; a token's slot is its position. Each is an array, or
    integers and scales (`quantized.Int8Vectors`).

    The first `lengths` slots of a row are its own. What the others hold is never read.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    lengths: Int[Array, "B"]

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[2]

    def take(self, rows: Int[Array, "N"]) -> "Cache":
        """The cache of these rows, in this order; a row may come several times."""
        return jax.tree.map(lambda x: x[rows], self)

    def put(self, part: "Cache", rows: Int[Array, "N"]) -> "Cache":
        """This cache with the rows of one with at most as many slots at `rows`, distinct; those beyond the end go
        nowhere.
        """

        def write(mine: Array, theirs: Array) -> Array:
            place = (rows, *(slice(0, size) for size in theirs.shape[1:]))
            return mine.at[place].set(theirs, mode="drop", unique_indices=True)

        return jax.tree.map(write, self, part)


def empty_cache(config: DecoderConfig, rows: int, slots: int, int8: bool = False) -> Cache:
    """A cache of so many rows without a token."""
    c, lengths = config, jnp.zeros((rows,), jnp.int32)
    shape = rows, c.kv_heads, slots, c.head_dim
    keys, values = (tuple(empty_vectors(shape, 3, c.compute_dtype, int8) for _ in range(c.layers)) for _ in range(2))
    return Cache(keys, values, lengths)
