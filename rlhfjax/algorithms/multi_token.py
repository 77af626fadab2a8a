"""Next-token prediction with heads that also learn the tokens after the next (Gloeckle et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.algorithms.likelihood import chunk_tokens
from rlhfjax.algorithms.objective import Objective
from rlhfjax.functional.vocabulary import vocabulary_cross_entropy, vocabulary_hits
from rlhfjax.types import Params, TokenBatch


def targets_ahead(batch: TokenBatch, distance: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token `distance` after each one, and whether it is a target of the same document."""
    slots = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    inside = slots < batch.tokens.shape[1] - distance
    segments, marked = jnp.roll(batch.segments, -distance, axis=1), jnp.roll(batch.loss_mask, -distance, axis=1)
    mask = marked & (segments == batch.segments) & (segments > 0) & inside[None, :]
    return jnp.roll(batch.tokens, -distance, axis=1), mask


def head_sums(
    model: Any, params: Params, batch: TokenBatch, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Cross-entropy (nats) and hits of every head, sums over its targets, given the hidden states of the batch."""
    table, form = model.unembedding(params)
    form |= {"chunk": chunk_tokens(model.config.vocab_size)}
    losses, hits = [], []
    for n, states in enumerate(model.ahead(params, hidden)):
        targets = targets_ahead(batch, n + 2)
        losses.append(vocabulary_cross_entropy(table, states, *targets, **form))
        hits.append(vocabulary_hits(*jax.lax.stop_gradient((table, states)), *targets, **form))
    return jnp.stack(losses), jnp.stack(hits)


class Sums(NamedTuple):
    """Over the targets of a batch: cross-entropy of the next token; of each head, and how often its likeliest token is
    right.
    """

    next_token: Float[Array, ""]
    ahead: Float[Array, "N"]
    hits: Float[Array, "N"]


@dataclass(frozen=True)
class MultiTokenPrediction(Objective):
    """Loss of the next token + coef · mean over heads n of -log p_n(token n + 1 ahead | the document so far).

    Each term is normalised by the number of its own targets, nats per token (Gloeckle et al. 2024, eq. 2, who take coef
    1 and the sum). `sums(params, batch, key)` gives what is normalised here.
    """

    sums: Callable[[Params, TokenBatch, jax.Array | None], Sums]
    heads: int
    coef: float

    def weight(self, batch: TokenBatch) -> dict[str, Any]:
        """Targets in the batch: of the next token, and of each head."""
        counts = jnp.stack([targets_ahead(batch, n + 1)[1].sum() for n in range(self.heads + 1)]).astype(jnp.float32)
        return {"targets": counts[0], "ahead": counts[1:]}

    def loss(
        self, params: Params, batch: TokenBatch, weight: dict[str, Any], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        sums = self.sums(params, batch, key)
        next_token = sums.next_token / jnp.maximum(weight["targets"], 1.0)
        ahead, hits = (total / jnp.maximum(weight["ahead"], 1.0) for total in (sums.ahead, sums.hits))
        metrics = {"loss/train": next_token}
        metrics |= {f"mtp/loss/{n + 1}": ahead[n] for n in range(self.heads)}
        metrics |= {f"mtp/hit_rate/{n + 1}": hits[n] for n in range(self.heads)}
        return next_token + self.coef * ahead.mean(), metrics
