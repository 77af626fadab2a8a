"""Likelihoods of the targets of a packed batch: log-probabilities, entropies, cross-entropy, values, scores.

A target is a token that the batch marks and whose predecessor belongs to the same sequence. Results have the place of
the token they are about, and are 0 where there is none.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.vocabulary import vocabulary_cross_entropy, vocabulary_log_probs
from rlhfjax.target import current
from rlhfjax.types import Params, TokenBatch

_LEAST_TOKENS = 96  # of a chunk


class Predictor(Protocol):
    """A decoder, or an encoder–decoder, on packed batches."""

    @property
    def config(self) -> Any: ...

    def batch_hidden(
        self,
        params: Params,
        batch: TokenBatch,
        dropout: float = 0.0,
        key: jax.Array | None = None,
        read: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B T D"]: ...

    def unembedding(self, params: Params) -> tuple[Array, dict[str, Any]]: ...

    def scalar(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]: ...


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens have float32 logits at a time: as many as the target has bytes for."""
    return max(current().chunk_bytes // (4 * vocab_size), _LEAST_TOKENS)


def next_targets(batch: TokenBatch) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token after each one, and whether it is a target; nothing comes after the last."""
    ahead = jnp.roll(batch.segments, -1, axis=1)
    inside = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32) < batch.tokens.shape[1] - 1
    mask = jnp.roll(batch.loss_mask, -1, axis=1) & (ahead == batch.segments) & (ahead > 0) & inside[None, :]
    return jnp.roll(batch.tokens, -1, axis=1), mask


def token_log_probs(
    model: Predictor,
    params: Params,
    batch: TokenBatch,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(token | what is before it in its sequence) of every target, and the entropy of that distribution; nats."""
    wanted = _Wanted.of(batch, next_targets(batch)[1])
    hidden = model.batch_hidden(params, batch, read=wanted.columns)
    return _log_probs(model, params, batch, wanted, hidden, temperature, entropy_gradient)


def log_probs_and_values(
    model: Predictor,
    params: Params,
    head: Params,
    batch: TokenBatch,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_log_probs` of a policy and `token_values` of a head on its trunk, from one forward pass."""
    wanted = _Wanted.of(batch, next_targets(batch)[1])
    hidden = model.batch_hidden(params, batch, read=wanted.columns)
    made = _log_probs(model, params, batch, wanted, hidden, temperature, entropy_gradient)
    return *made, _before(wanted.back(model.scalar({"head": head}, hidden)))


def _log_probs(model, params, batch, wanted, hidden, temperature, entropy_gradient):
    tokens, mask = (wanted.at(x) for x in next_targets(batch))
    table, form = model.unembedding(params)
    form |= {"chunk": chunk_tokens(model.config.vocab_size), "entropy_gradient": entropy_gradient}
    made = vocabulary_log_probs(table, hidden, tokens, mask, temperature, **form)
    log_probs, entropies = (jnp.roll(wanted.back(x), 1, axis=1) for x in made)
    return log_probs, entropies


@dataclass(frozen=True)
class _Wanted:
    """The columns of each row that a result is read at: as many as it has targets at most, or all where none knows."""

    columns: Int[Array, "B N"] | None
    length: int

    @classmethod
    def of(cls, batch: TokenBatch, mask: Bool[Array, "B T"]) -> "_Wanted":
        length = mask.shape[1]
        if batch.most is None or batch.most >= length:
            return cls(None, length)
        return cls(jnp.argsort(~mask, axis=1, stable=True)[:, : batch.most], length)

    def at(self, x: Array) -> Array:
        """`x` at these columns."""
        return x if self.columns is None else jnp.take_along_axis(x, self.columns, axis=1)

    def back(self, x: Array) -> Array:
        """The other way; 0 elsewhere."""
        if self.columns is None:
            return x
        empty = jnp.zeros((len(x), self.length), x.dtype)
        return jnp.put_along_axis(empty, self.columns, x, axis=1, inplace=False)


def cross_entropy(
    model: Predictor,
    params: Params,
    batch: TokenBatch,
    hidden: Float[Array, "B T D"],
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Σ over targets of the cross-entropy in nats, given the hidden states of the batch."""
    tokens, mask = next_targets(batch)
    table, form = model.unembedding(params)
    form |= {"chunk": chunk_tokens(model.config.vocab_size)}
    return vocabulary_cross_entropy(table, hidden, tokens, mask, label_smoothing, **form)


def token_values(model: Predictor, params: Params, batch: TokenBatch) -> Float[Array, "B T"]:
    """The scalar head before each token is chosen: V(s_t), the state that holds what is before it; 0 at the first.

    Where the batch knows how many targets a row has at `most`, only what comes before targets is certain to be there.
    """
    wanted = _Wanted.of(batch, next_targets(batch)[1])
    return _before(wanted.back(model.scalar(params, model.batch_hidden(params["decoder"], batch, read=wanted.columns))))


def _before(values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def token_scores(
    model: Predictor, params: Params, batch: TokenBatch, dropout: float = 0.0, key: jax.Array | None = None
) -> Float[Array, "B T"]:
    """The scalar head at each token; a response's score is the one at its last.

    Where the batch knows how many targets a row has at `most`, only what is said at targets is certain to be there.
    """
    wanted = _Wanted.of(batch, batch.loss_mask)
    hidden = model.batch_hidden(params["decoder"], batch, dropout, key, read=wanted.columns)
    return wanted.back(model.scalar(params, hidden))
