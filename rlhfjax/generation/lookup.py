"""Draft tokens looked up in what a row holds already (prompt lookup decoding, Saxena 2023)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def suffix_match(context: Int[Array, "B S"], lengths: Int[Array, "B"], longest: int) -> Int[Array, "B S"]:
    """How many tokens that end at each slot equal the tokens that end the row, at most `longest`; 0 at its last slot.

    A row holds its first `lengths` tokens.
    """
    slots = jnp.arange(context.shape[1], dtype=jnp.int32)
    equal = jnp.ones(context.shape, bool)
    matched = jnp.zeros(context.shape, jnp.int32)
    for back in range(longest):
        last = jnp.take_along_axis(context, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
        # What left the row on one side comes back on the other; `slots >= back` and the row's length rule it out.
        equal &= (jnp.roll(context, back, axis=1) == last) & (slots >= back)[None] & (lengths > back)[:, None]
        matched += equal.astype(jnp.int32)
    return jnp.where(slots[None] < lengths[:, None] - 1, matched, 0)


def lookup(context: Int[Array, "B S"], lengths: Int[Array, "B"], count: int, longest: int) -> Int[Array, "B N"]:
    """`count` tokens that may come next; -1 where the row's last token occurs nowhere before.

    They are those that followed the longest earlier occurrence of the row's last tokens, of `longest` … 1 tokens, and
    of occurrences of one length the latest. Where what followed reaches the end of the row it goes on with its own
    beginning, so a row that repeats itself is taken to go on doing so.
    """
    matched = suffix_match(context, lengths, longest)
    slots = jnp.arange(context.shape[1], dtype=jnp.int32)
    best = jnp.argmax(matched * context.shape[1] + slots[None], axis=1).astype(jnp.int32)
    found = jnp.take_along_axis(matched, best[:, None], axis=1)[:, 0] > 0
    period = jnp.maximum(lengths - 1 - best, 1)
    steps = jax.lax.broadcasted_iota(jnp.int32, (len(context), count), 1) % period[:, None]
    guesses = jnp.take_along_axis(context, best[:, None] + 1 + steps, axis=1, mode="clip")
    return jnp.where(found[:, None], guesses, -1)
