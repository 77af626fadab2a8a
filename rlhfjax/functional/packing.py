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


def first_fit(lengths: Int[Array, "B"], width: int, rows: int) -> Places:
    """First-fit decreasing: the longest sequence first, each into the first row that has room for it.

    At most 11/9 of the fewest rows + 6/9 (Dósa 2007). `lengths` are at most `width`; `rows` at least B never overflow.
    """
    order = jnp.argsort(-lengths, stable=True)

    def put(state, length):
        filled, count = state
        row = jnp.argmax(filled + length <= width).astype(jnp.int32)
        place = row, filled[row], count[row] + 1
        return (filled.at[row].add(length), count.at[row].add(1)), place

    empty = jnp.zeros(rows, jnp.int32)
    (filled, _), places = jax.lax.scan(put, (empty, empty), lengths[order])
    row, offset, number = (jnp.zeros_like(place).at[order].set(place) for place in places)
    return Places(row, offset, number, (filled > 0).sum(dtype=jnp.int32))
