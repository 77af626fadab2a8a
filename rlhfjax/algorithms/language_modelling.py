"""Next-token prediction, for pretraining, supervised fine-tuning and the pretraining mix of PPO-ptx."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional import (
    load_balancing_loss,
    masked_sum,
    max_load,
    router_z_loss,
    smoothed_cross_entropy,
    token_log_probs,
)
from rlhfjax.types import Params, Routing, TokenBatch


def predicted(batch: TokenBatch) -> Bool[Array, "B T-1"]:
    """Which tokens 1 … T-1 are targets: marked ones whose predecessor belongs to the same document."""
    return batch.loss_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


@dataclass(frozen=True)
class LanguageModelling:
    """-Σ log p(token | its document so far) / number of targets, nats per token (Radford et al. 2018, eq. 1).

    `logits(params, batch, key)` gives [B, T, V]; `key` is for dropout and may be None. With `label_smoothing` the loss
    is the cross-entropy against smoothed labels.
    """

    logits: Callable[[Params, TokenBatch, jax.Array | None], Array]
    label_smoothing: float = 0.0

    def weight(self, batch: TokenBatch) -> Float[Array, ""]:
        """Targets in the batch."""
        return predicted(batch).sum().astype(jnp.float32)

    def loss(
        self, params: Params, batch: TokenBatch, weight: Float[Array, ""], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss = _cross_entropy(self.logits(params, batch, key), batch, weight, self.label_smoothing)
        return loss, {"loss/train": loss}


@dataclass(frozen=True)
class RoutedLanguageModelling:
    """The same for a mixture of experts, + load_balancing_coef · balancing loss + router_z_coef · z-loss.

    `logits` also gives what the routers did. The balancing loss is a product of two means, of which one has a gradient;
    over the parts of a batch only that one adds up, so `survey` finds the other for the whole batch first.
    """

    logits: Callable[[Params, TokenBatch, jax.Array | None], tuple[Array, Routing]]
    load_balancing_coef: float
    router_z_coef: float
    label_smoothing: float = 0.0

    def weight(self, batch: TokenBatch) -> dict[str, Any]:
        """Targets in the batch."""
        return {"targets": predicted(batch).sum().astype(jnp.float32)}

    def survey(self, params: Params, batch: TokenBatch, key: jax.Array | None = None) -> dict[str, Any]:
        """What the routers do with part of a batch; sums over parts are added to the weight of the whole."""
        return {"routing": jax.lax.stop_gradient(self.logits(params, batch, key)[1])}

    def loss(
        self, params: Params, batch: TokenBatch, weight: dict[str, Any], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        logits, own = self.logits(params, batch, key)
        whole = weight.get("routing", own)
        loss = _cross_entropy(logits, batch, weight["targets"], self.label_smoothing)
        balancing = load_balancing_loss(whole.assigned, own.probabilities, whole.tokens)
        z = router_z_loss(own.squared_z, whole.tokens)
        share = own.tokens.sum() / jnp.maximum(whole.tokens.sum(), 1.0)  # metrics of parts are added, too
        metrics = {
            "loss/train": loss,
            "router/load_balancing": balancing,
            "router/z": z,
            "router/max_load": share * max_load(whole.assigned),
            "router/dropped": own.dropped.sum() / jnp.maximum(whole.assigned.sum(), 1.0),
        }
        return loss + self.load_balancing_coef * balancing + self.router_z_coef * z, metrics


def _cross_entropy(
    logits: Array, batch: TokenBatch, targets: Float[Array, ""], label_smoothing: float
) -> Float[Array, ""]:
    if label_smoothing:
        losses = smoothed_cross_entropy(logits[:, :-1], batch.tokens[:, 1:], label_smoothing)
        return masked_sum(losses, predicted(batch)) / jnp.maximum(targets, 1.0)
    log_probs = token_log_probs(logits[:, :-1], batch.tokens[:, 1:])
    return -masked_sum(log_probs, predicted(batch)) / jnp.maximum(targets, 1.0)
