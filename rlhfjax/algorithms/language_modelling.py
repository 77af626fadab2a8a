"""Next-token prediction, for pretraining, supervised fine-tuning and the pretraining mix of PPO-ptx."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional import masked_sum, token_log_probs
from rlhfjax.types import Params, TokenBatch


def predicted(batch: TokenBatch) -> Bool[Array, "B T-1"]:
    """Which tokens 1 … T-1 are targets: marked ones whose predecessor belongs to the same document."""
    return batch.loss_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


@dataclass(frozen=True)
class LanguageModelling:
    """-Σ log p(token | its document so far) / number of targets, nats per token (Radford et al. 2018, eq. 1).

    `logits(params, batch, key)` gives [B, T, V]; `key` is for dropout and may be None.
    """

    logits: Callable[[Params, TokenBatch, jax.Array | None], Array]

    def weight(self, batch: TokenBatch) -> Float[Array, ""]:
        """Targets in the batch."""
        return predicted(batch).sum().astype(jnp.float32)

    def loss(
        self, params: Params, batch: TokenBatch, weight: Float[Array, ""], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        log_probs = token_log_probs(self.logits(params, batch, key)[:, :-1], batch.tokens[:, 1:])
        loss = -masked_sum(log_probs, predicted(batch)) / jnp.maximum(weight, 1.0)
        return loss, {"loss/train": loss}
