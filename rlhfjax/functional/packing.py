"""Sequences into rows of one width, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Places(NamedTuple):
    """Where each sequence begins, which one of its row it is (from 1 on), and how many rows hold any."""

    row: Int[Array, "B"]
    offset: Int[Array, "B"]
    number: Int[Array, "B"]
    used: Int[Array, ""]


def first_fit(
    lengths: Int[Array, "B"], width: int, rows: int, parts: Int[Array, "B"] | None = None, most: int = 0
) -> Places:
    """First-fit decreasing: the longest sequence first, each into the first row that has room for it.

    At most 11/9 of the fewest rows + 6/9 (Dósa 2007). `lengths` are at most `width`; `rows` at least B never overflow.
    With `parts`, so many tokens of each sequence are of a kind of which a row has room for `most`.
    """
    order = jnp.argsort(-lengths, stable=True)
    parts = jnp.zeros_like(lengths) if parts is None else parts

    def put(state, sequence):
        (filled, held, count), (length, part) = state, sequence
        row = jnp.argmax((filled + length <= width) & (held + part <= most)).astype(jnp.int32)
        place = row, filled[row], count[row] + 1
        return (filled.at[row].add(length), held.at[row].add(part), count.at[row].add(1)), place

    empty = jnp.zeros(rows, jnp.int32)
    (filled, *_), places = jax.lax.scan(put, (empty, empty, empty), (lengths[order], parts[order]))
    row, offset, number = (jnp.zeros_like(place).at[order].set(place) for place in places)
    return Places(row, offset, number, (filled > 0).sum(dtype=jnp.int32))
