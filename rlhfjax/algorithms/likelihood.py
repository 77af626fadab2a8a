"""What a model says of the targets of a packed batch: log-probabilities, entropies, cross-entropy, values, scores.

A target is a token that the batch marks and whose predecessor belongs to the same sequence. Results have the place of
the token they are about, and are 0 where there is none.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.vocabulary import vocabulary_cross_entropy, vocabulary_log_probs
from rlhfjax.types import Params, TokenBatch

# Bytes of the float32 logits that exist at a time: on CPUs what stays in a cache, elsewhere what keeps the device busy.
_CPU_CHUNK, _CHUNK, _LEAST_TOKENS = 2**23, 2**28, 64


class Predictor(Protocol):
    """A decoder, or an encoder–decoder, on packed batches."""

    @property
    def config(self) -> Any: ...

    def batch_hidden(
        self, params: Params, batch: TokenBatch, dropout: float = 0.0, key: jax.Array | None = None
    ) -> Float[Array, "B T D"]: ...

    def unembedding(self, params: Params) -> tuple[Array, dict[str, Any]]: ...

    def scalar(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]: ...


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens have logits at a time."""
    limit = _CPU_CHUNK if jax.default_backend() == "cpu" else _CHUNK
    return max(limit // (4 * vocab_size), _LEAST_TOKENS)


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
    gather: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(token | what is before it in its sequence) of every target, and the entropy of that distribution, in nats.

    `gather` as in `vocabulary_log_probs`: False where rows lie on several devices.
    """
    hidden = model.batch_hidden(params, batch)
    return _log_probs(model, params, batch, hidden, temperature, entropy_gradient, gather)


def log_probs_and_values(
    model: Predictor,
    params: Params,
    head: Params,
    batch: TokenBatch,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
    gather: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_log_probs` of a policy and `token_values` of a head on its trunk, from one forward pass."""
    hidden = model.batch_hidden(params, batch)
    made = _log_probs(model, params, batch, hidden, temperature, entropy_gradient, gather)
    return *made, _before(model.scalar({"head": head}, hidden))


def _log_probs(model, params, batch, hidden, temperature, entropy_gradient, gather):
    tokens, mask = next_targets(batch)
    table, form = model.unembedding(params)
    form |= {"chunk": chunk_tokens(model.config.vocab_size), "gather": gather, "entropy_gradient": entropy_gradient}
    made = vocabulary_log_probs(table, hidden, tokens, mask, temperature, **form)
    log_probs, entropies = (jnp.roll(x, 1, axis=1) for x in made)
    return log_probs, entropies


def cross_entropy(
    model: Predictor,
    params: Params,
    batch: TokenBatch,
    hidden: Float[Array, "B T D"],
    label_smoothing: float = 0.0,
    *,
    gather: bool = True,
) -> Float[Array, ""]:
    """Σ over targets of the cross-entropy in nats, given the hidden states of the batch."""
    tokens, mask = next_targets(batch)
    table, form = model.unembedding(params)
    form |= {"chunk": chunk_tokens(model.config.vocab_size), "gather": gather}
    return vocabulary_cross_entropy(table, hidden, tokens, mask, label_smoothing, **form)


def token_values(model: Predictor, params: Params, batch: TokenBatch) -> Float[Array, "B T"]:
    """The scalar head before each token is chosen: V(s_t), the state that holds what is before it; 0 at the first."""
    return _before(model.scalar(params, model.batch_hidden(params["decoder"], batch)))


def _before(values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def token_scores(model: Predictor, params: Params, batch: TokenBatch) -> Float[Array, "B T"]:
    """The scalar head at each token; a response's score is the one at its last."""
    return model.scalar(params, model.batch_hidden(params["decoder"], batch))
