"""Log-probabilities and cross-entropy over a large vocabulary, some tokens at a time.

The logits of a batch are its largest array: 2,048 tokens over 128,000 words are 1 GB in float32. Here they exist for
one chunk of tokens only, in the backward pass too, and chunks without a target are not computed at all.

The functions read hidden states [B, T, D] that each predict the token of the same place in `tokens`, where `mask` is
True. Logits are hidden · table, float32 whatever the type of the hidden states; the table is [D, V], or [V, D] where
embeddings are `tied`. With `softcap` they are softcap · tanh(logits / softcap). `chunk` counts tokens whose logits a
device holds at a time.

On several devices each goes through the tokens of its own rows and its own part of the words: the table is gathered
once, its gradient reduced once, and numbers of a token alone travel while the chunks pass (`Layout.vocabulary`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax import layout
from rlhfjax.functional.chunks import chunked, over_chunks
from rlhfjax.functional.logits import LEAST_TEMPERATURE

_LEAST = -1e30


class _Static(NamedTuple):
    """Settings that a program is compiled for."""

    words: int  # of the whole vocabulary
    tied: bool
    softcap: float | None
    chunk: int
    temperature: float = 1.0
    smoothing: float = 0.0
    entropy_gradient: bool = False

    @property
    def axis(self) -> int:
        """That of the words in the table."""
        return 0 if self.tied else 1


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
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log p(token), entropy of the distribution), in nats, where `mask` is True, and 0 elsewhere.

    p = softmax(z / temperature) as in `token_log_probs` and `entropy`. The backward pass computes the logits again;
    that of the entropy is left out unless `entropy_gradient`.
    """
    temperature = max(temperature, LEAST_TEMPERATURE)
    static = _static(table, tied, softcap, chunk)._replace(temperature=temperature, entropy_gradient=entropy_gradient)
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
) -> Float[Array, ""]:
    """Σ over targets of the cross-entropy against (1-ε)·one-hot + ε/V, in nats (see `smoothed_cross_entropy`).

    Gradients are found in the forward pass, chunk by chunk, so that no logits are computed twice: with respect to the
    logits they are softmax(z) - (1-ε)·one-hot - ε/V whatever the sum is used for (e.g. Wijmans et al. 2024).
    """
    static = _static(table, tied, softcap, chunk)._replace(smoothing=label_smoothing)
    return _cross_entropy(static, table, hidden, tokens, mask)


def vocabulary_hits(
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int,
    tied: bool = True,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """How many targets are the likeliest token, of several the first; it has no gradient."""
    static = _static(table, tied, softcap, chunk)

    def program(words, table, *rows):
        def some(total, part):
            hidden, tokens, mask = part
            return total + (mask & (words.likeliest(_logits(static, table, hidden)) == tokens)).sum(), ()

        parts, used, _ = chunked(_at_a_time(static, table), *rows)
        return (over_chunks(some, jnp.int32(0), parts, used)[0].astype(jnp.float32),)

    return _by_device(static, program, ("number",), table, hidden, tokens, mask)[0]


def _static(table: Array, tied: bool, softcap: float | None, chunk: int) -> _Static:
    return _Static(table.shape[0 if tied else 1], tied, softcap, chunk)


def _at_a_time(static: _Static, table: Array) -> int:
    """Tokens of a chunk; a device that has a part of the words takes more of them."""
    return static.chunk * max(static.words // table.shape[static.axis], 1)


def _by_device(static: _Static, program: Any, outs: tuple[str, ...], table: Array, *rows: Array) -> tuple:
    """`program(words, table, *rows)` on every device, or once; `outs` as in `Layout.vocabulary`."""
    table, devices = table.astype(rows[0].dtype), layout.current()
    if devices is None:
        return program(_AllWords(static.words), table, *rows)
    return devices.vocabulary(program, static.axis, outs, table, *rows)


class _AllWords:
    """The vocabulary on one device (`rlhfjax.layout.Words`)."""

    def __init__(self, count: int):
        self.first, self.count, self.padded = 0, count, False

    def summed(self, x):
        return x

    def largest(self, x):
        return x

    def likeliest(self, logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(static, table, hidden, tokens, mask):
    def program(words, table, *rows):
        parts, used, back = chunked(_at_a_time(static, table), *rows)

        def some(_, part):
            hidden, tokens, mask = part
            logits = _real(words, _logits(static, table, hidden)) / static.temperature
            top, weights = _softmax_parts(words, logits)
            centered = logits - top[..., None]
            at, sums, inner = words.summed(
                (_at(words, centered, tokens), weights.sum(axis=-1), (weights * centered).sum(axis=-1))
            )
            log_prob, mean = at - jnp.log(sums), inner / sums
            return None, (jnp.where(mask, log_prob, 0.0), jnp.where(mask, jnp.log(sums) - mean, 0.0))

        return tuple(back(x) for x in over_chunks(some, None, parts, used)[1])

    return _by_device(static, program, ("rows", "rows"), table, hidden, tokens, mask)


def _log_probs_forward(static, table, hidden, tokens, mask):
    return _log_probs(static, table, hidden, tokens, mask), (table, hidden, tokens, mask)


def _log_probs_backward(static, residuals, gs):
    def program(words, table, *rows):
        parts, used, back = chunked(_at_a_time(static, table), *rows)

        def some(of_table, part):
            hidden, tokens, mask, g, g_entropy = part
            raw = _logits(static, table, hidden)
            logits = _real(words, raw) / static.temperature
            top, weights = _softmax_parts(words, logits)
            log_p = logits - (top + jnp.log(words.summed(weights.sum(axis=-1))))[..., None]
            p, g = jnp.exp(log_p), jnp.where(mask, g, 0.0)
            of_logits = jnp.where(_is_token(words, logits, tokens), g[..., None], 0.0) - g[..., None] * p
            if static.entropy_gradient:  # dH/dz = -p (log p + H)
                entropy = -words.summed((p * log_p).sum(axis=-1))[..., None]
                of_logits = of_logits - jnp.where(mask, g_entropy, 0.0)[..., None] * p * (log_p + entropy)
            return _pull(static, words, table, hidden, raw, of_logits / static.temperature, of_table)

        of_table, of_hidden = over_chunks(some, _no_gradient(static, table), parts, used)
        return _of_table(static, of_table), back(of_hidden)

    table, *rows = residuals
    of_table, of_hidden = _by_device(static, program, ("table", "rows"), table, *rows, *gs)
    return of_table.astype(table.dtype), of_hidden, None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, table, hidden, tokens, mask):
    def program(words, table, *rows):
        def some(total, part):
            hidden, tokens, mask = part
            return total + _losses(static, words, _logits(static, table, hidden), tokens, mask)[0].sum(), ()

        parts, used, _ = chunked(_at_a_time(static, table), *rows)
        return (over_chunks(some, jnp.float32(0.0), parts, used)[0],)

    return _by_device(static, program, ("number",), table, hidden, tokens, mask)[0]


def _cross_entropy_forward(static, table, hidden, tokens, mask):
    def program(words, table, *rows):
        parts, used, back = chunked(_at_a_time(static, table), *rows)

        def some(carry, part):
            (total, of_table), (hidden, tokens, mask) = carry, part
            logits = _logits(static, table, hidden)
            losses, weights, sums = _losses(static, words, logits, tokens, mask)
            p = weights * jnp.where(mask, 1.0 / sums, 0.0)[..., None]
            wanted = jnp.where(_is_token(words, logits, tokens), 1.0 - static.smoothing, 0.0)
            of_logits = p - jnp.where(mask[..., None], wanted + static.smoothing / static.words, 0.0)
            of_table, of_hidden = _pull(static, words, table, hidden, logits, of_logits, of_table)
            return (total + losses.sum(), of_table), of_hidden

        nothing = jnp.float32(0.0), _no_gradient(static, table)
        (total, of_table), of_hidden = over_chunks(some, nothing, parts, used)
        return total, _of_table(static, of_table), back(of_hidden)

    total, of_table, of_hidden = _by_device(static, program, ("number", "table", "rows"), table, hidden, tokens, mask)
    return total, (of_table.astype(table.dtype), of_hidden)


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


def _pull(static, words, table, hidden, logits, of_logits, of_table):
    """Gradients of a chunk: `of_table` with its share added, and that of its hidden states."""
    if static.softcap:
        of_logits = of_logits * (1.0 - jnp.square(logits / static.softcap))
    if words.padded:
        of_logits = jnp.where(_ids(words, logits) < words.count, of_logits, 0.0)
    of_logits = of_logits.astype(hidden.dtype)
    rows = tuple(range(hidden.ndim - 1))
    of_hidden = jax.lax.dot_general(of_logits, table, (((hidden.ndim - 1,), (0 if static.tied else 1,)), ((), ())))
    share = jax.lax.dot_general(hidden, of_logits, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return of_table + share, words.summed(of_hidden)


def _no_gradient(static, table):
    """Zeros to add to.

    Sums are [D, V] always: of the two operands of such a product one is transposed, and that is not the larger one.
    """
    return jnp.zeros(table.shape[::-1] if static.tied else table.shape, jnp.float32)


def _of_table(static, total):
    """The sum in the table's own layout."""
    return total.T if static.tied else total


def _losses(static, words, logits, tokens, mask):
    """Cross-entropies where `mask` is True, exp(z - max z), Σ exp(z - max z)."""
    top, weights = _softmax_parts(words, _real(words, logits))
    sums, at = words.summed((weights.sum(axis=-1), _at(words, logits, tokens)))
    losses = top + jnp.log(sums) - (1.0 - static.smoothing) * at
    if static.smoothing:
        real = jnp.where(_ids(words, logits) < words.count, logits, 0.0) if words.padded else logits
        losses = losses - static.smoothing * (words.summed(real.sum(axis=-1)) / static.words)
    return jnp.where(mask, losses, 0.0), weights, sums


def _softmax_parts(words, logits):
    """max z, and exp(z - max z)."""
    top = words.largest(logits.max(axis=-1))
    return top, jnp.exp(logits - top[..., None])


def _real(words, logits):
    """Logits of which those of padding have no weight; finite, so that 0 times them is 0."""
    return jnp.where(_ids(words, logits) < words.count, logits, _LEAST) if words.padded else logits


def _ids(words, logits):
    return words.first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _is_token(words, logits, tokens):
    # A comparison and not a gather: it is fused into what reads the logits.
    return tokens[..., None] == _ids(words, logits)


def _at(words, logits, tokens):
    """The logit of the token, 0 where another device has it."""
    return jnp.where(_is_token(words, logits, tokens), logits, 0.0).sum(axis=-1)
