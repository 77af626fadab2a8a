"""Log-probabilities and cross-entropy over a large vocabulary, some tokens at a time.

The logits of a batch are its largest array: 2,048 tokens over 128,000 words are 1 GB in float32. Here they exist for
one chunk of tokens only, in the backward pass too, and chunks without a target are not computed at all.

Both functions read hidden states [B, T, D] that each predict the token of the same place in `tokens`, where `mask` is
True. Logits are hidden · table, float32 whatever the type of the hidden states; the table is [D, V], or [V, D] where
embeddings are `tied`. With `softcap` they are softcap · tanh(logits / softcap).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.logits import LEAST_TEMPERATURE


class _Static(NamedTuple):
    """Settings that a program is compiled for."""

    tied: bool
    softcap: float | None
    chunk: int
    gather: bool
    temperature: float = 1.0
    smoothing: float = 0.0
    entropy_gradient: bool = False


def vocabulary_log_probs(
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    temperature: float = 1.0,
    *,
    chunk: int,
    tied: bool = True,
    softcap: float | None = None,
    gather: bool = True,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log p(token), entropy of the distribution), in nats, where `mask` is True, and 0 elsewhere.

    p = softmax(z / temperature) as in `token_log_probs` and `entropy`. The backward pass computes the logits again;
    that of the entropy is left out unless `entropy_gradient`. `chunk` counts tokens. With `gather` targets are moved
    together first; without, chunks are slices of T, which rows that lie on several devices need.
    """

    static = _Static(
        tied, softcap, chunk, gather, max(temperature, LEAST_TEMPERATURE), entropy_gradient=entropy_gradient
    )
    return _log_probs(static, table, hidden, tokens, mask)


def vocabulary_cross_entropy(
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    label_smoothing: float = 0.0,
    *,
    chunk: int,
    tied: bool = True,
    softcap: float | None = None,
    gather: bool = True,
) -> Float[Array, ""]:
    """Σ over targets of the cross-entropy against (1-ε)·one-hot + ε/V, in nats (see `smoothed_cross_entropy`).

    Gradients are found in the forward pass, chunk by chunk, so that no logits are computed twice: with respect to the
    logits they are softmax(z) - (1-ε)·one-hot - ε/V whatever the sum is used for (e.g. Wijmans et al. 2024).
    """
    static = _Static(tied, softcap, chunk, gather, smoothing=label_smoothing)
    return _cross_entropy(static, table, hidden, tokens, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(static, table, hidden, tokens, mask):
    parts, used, back = _chunked(static, hidden, tokens, mask)
    table = table.astype(hidden.dtype)

    def some(_, part):
        hidden, tokens, mask = part
        logits = _logits(static, table, hidden) / static.temperature
        top, sums = _softmax_parts(logits)
        centered = logits - top[..., None]
        mean = (jnp.exp(centered) * centered).sum(axis=-1) / sums
        log_prob = _at(centered, tokens) - jnp.log(sums)
        return None, (jnp.where(mask, log_prob, 0.0), jnp.where(mask, jnp.log(sums) - mean, 0.0))

    return jax.tree.map(back, _over_chunks(some, None, parts, used)[1])


def _log_probs_forward(static, table, hidden, tokens, mask):
    return _log_probs(static, table, hidden, tokens, mask), (table, hidden, tokens, mask)


def _log_probs_backward(static, residuals, gs):
    table, hidden, tokens, mask = residuals
    parts, used, back = _chunked(static, hidden, tokens, mask, *gs)
    cast = table.astype(hidden.dtype)

    def some(of_table, part):
        hidden, tokens, mask, g, g_entropy = part
        raw = _logits(static, cast, hidden)
        logits = raw / static.temperature
        top, sums = _softmax_parts(logits)
        log_p = logits - (top + jnp.log(sums))[..., None]
        p, g = jnp.exp(log_p), jnp.where(mask, g, 0.0)
        of_logits = jnp.where(_is_token(logits, tokens), g[..., None], 0.0) - g[..., None] * p
        if static.entropy_gradient:  # dH/dz = -p (log p + H)
            entropy = -(p * log_p).sum(axis=-1, keepdims=True)
            of_logits = of_logits - jnp.where(mask, g_entropy, 0.0)[..., None] * p * (log_p + entropy)
        return _pull(static, cast, hidden, raw, of_logits / static.temperature, of_table)

    of_table, of_hidden = _over_chunks(some, _table_gradient(table, static), parts, used)
    return _table_gradient(of_table, static, table.dtype), back(of_hidden), None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def over_targets(
    function: Callable[[Array, Array, Array], Array],
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int,
    tied: bool = True,
    softcap: float | None = None,
    gather: bool = True,
) -> Float[Array, ""]:
    """Σ over chunks of function(logits, tokens, mask), a number; it has no gradient."""
    return _over_targets(function, _Static(tied, softcap, chunk, gather), table, hidden, tokens, mask)


def _over_targets(function, static, table, hidden, tokens, mask):
    parts, used, _ = _chunked(static, hidden, tokens, mask)
    table = table.astype(hidden.dtype)

    def some(total, part):
        return total + function(_logits(static, table, part[0]), *part[1:]), ()

    return _over_chunks(some, jnp.float32(0.0), parts, used)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, table, hidden, tokens, mask):
    return _over_targets(lambda *part: _losses(static, *part)[0].sum(), static, table, hidden, tokens, mask)


def _cross_entropy_forward(static, table, hidden, tokens, mask):
    parts, used, back = _chunked(static, hidden, tokens, mask)
    cast = table.astype(hidden.dtype)

    def some(carry, part):
        (total, of_table), (hidden, tokens, mask) = carry, part
        logits = _logits(static, cast, hidden)
        losses, top, sums = _losses(static, logits, tokens, mask)
        p = jnp.exp(logits - top[..., None]) * jnp.where(mask, 1.0 / sums, 0.0)[..., None]
        wanted = jnp.where(_is_token(logits, tokens), 1.0 - static.smoothing, 0.0) + static.smoothing / logits.shape[-1]
        of_logits = p - jnp.where(mask[..., None], wanted, 0.0)
        of_table, of_hidden = _pull(static, cast, hidden, logits, of_logits, of_table)
        return (total + losses.sum(), of_table), of_hidden

    nothing = jnp.float32(0.0), _table_gradient(table, static)
    (total, of_table), of_hidden = _over_chunks(some, nothing, parts, used)
    return total, (_table_gradient(of_table, static, table.dtype), back(of_hidden))


def _cross_entropy_backward(static, grads, g):
    of_table, of_hidden = (g.astype(x.dtype) * x for x in grads)
    return of_table, of_hidden, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _logits(static, table, hidden):
    logits = jax.lax.dot_general(
        hidden,
        table,
        (((hidden.ndim - 1,), (1 if static.tied else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return static.softcap * jnp.tanh(logits / static.softcap) if static.softcap else logits


def _pull(static, table, hidden, logits, of_logits, of_table):
    """Gradients of a chunk: `of_table` with its share added, and that of its hidden states."""
    if static.softcap:
        of_logits = of_logits * (1.0 - jnp.square(logits / static.softcap))
    of_logits = of_logits.astype(hidden.dtype)
    rows = tuple(range(hidden.ndim - 1))
    of_hidden = jax.lax.dot_general(of_logits, table, (((hidden.ndim - 1,), (0 if static.tied else 1,)), ((), ())))
    share = jax.lax.dot_general(hidden, of_logits, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return of_table + share, of_hidden


def _table_gradient(table, static, dtype=None):
    """Zeros to add to or, with a type, the sum in the table's own layout.

    Sums are [D, V] always: of the two operands of such a product one is transposed, and that is not the larger one.
    """
    if dtype is None:
        return jnp.zeros(table.shape[::-1] if static.tied else table.shape, jnp.float32)
    return (table.T if static.tied else table).astype(dtype)


def _losses(static, logits, tokens, mask):
    """Cross-entropies where `mask` is True, max z, Σ exp(z - max z)."""
    top, sums = _softmax_parts(logits)
    losses = top + jnp.log(sums) - (1.0 - static.smoothing) * _at(logits, tokens)
    if static.smoothing:
        losses = losses - static.smoothing * logits.mean(axis=-1)
    return jnp.where(mask, losses, 0.0), top, sums


def _softmax_parts(logits):
    top = logits.max(axis=-1)
    return top, jnp.exp(logits - top[..., None]).sum(axis=-1)


def _is_token(logits, tokens):
    # A comparison and not a gather: it is fused into what reads the logits, and needs no communication where the
    # vocabulary is split over devices.
    return tokens[..., None] == jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)


def _at(logits, tokens):
    return jnp.where(_is_token(logits, tokens), logits, 0.0).sum(axis=-1)


def _over_chunks(some, carry, parts, used):
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


def _chunked(static, hidden, tokens, mask, *more):
    """(hidden, tokens, mask, *more) with an axis of chunks in front, how many hold targets, and the way back.

    Hidden states that predict no target are 0: of what they held nothing reaches a sum, as 0 · infinity would.
    """
    hidden = jnp.where(mask[..., None], hidden, jnp.zeros((), hidden.dtype))
    arrays, (batch, length) = (hidden, tokens, mask, *more), tokens.shape
    if not static.gather:
        count = -(-length // max(static.chunk // batch, 1))
        size = -(-length // count)
        return tuple(_split(x, count, size) for x in arrays), count, partial(_joined, length=length)
    total = tokens.size
    count = -(-total // static.chunk)
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
