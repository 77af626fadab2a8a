"""Tokens in chunks, those that are targets first, and a loop over the chunks that hold some."""

import jax
import jax.numpy as jnp


def over_chunks(some, carry, parts, used):
    """`some(carry, part)` on the first `used` chunks: the last carry, and what it gave for each chunk, else 0."""
    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes = jax.eval_shape(some, carry, first)
    count = parts[1].shape[0]
    outs = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)

    def body(i, state):
        carry, outs = state
        carry, out = some(carry, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), parts))
        return carry, jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), outs, out)

    return jax.lax.fori_loop(0, used, body, (carry, outs))


def chunked(most, hidden, tokens, mask, *more):
    """(hidden, tokens, mask, *more) with an axis of chunks in front, how many hold targets, and the way back.

    A chunk has `most` tokens. Hidden states that predict no target are 0: of what they held nothing reaches a sum, as
    0 · infinity would.
    """
    hidden = jnp.where(mask[..., None], hidden, jnp.zeros((), hidden.dtype))
    arrays, (batch, length) = (hidden, tokens, mask, *more), tokens.shape
    total = tokens.size
    count = -(-total // most)
    size = -(-total // count)
    order = jnp.argsort(~mask.reshape(-1), stable=True)  # targets first, in their order
    place = jnp.argsort(order)  # the inverse: where each token went
    parts = tuple(_split(x.reshape(1, total, *x.shape[2:])[:, order], count, size) for x in arrays)
    used = -(-mask.sum(dtype=jnp.int32) // size)
    return parts, used, lambda x: _joined(x, total)[0, place].reshape(batch, length, *x.shape[3:])


def _split(x, count, size):
    """[B, T, …] to [count, B, size, …]."""
    x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _joined(x, length):
    """[count, B, size, …] to [B, length, …]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
