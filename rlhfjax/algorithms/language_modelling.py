"""Next-token prediction, for pretraining, supervised fine-tuning and the pretraining mix of PPO-ptx."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.algorithms.objective import Objective
from rlhfjax.functional import (
    load_balancing_loss,
    max_load,
    router_z_loss,
)
from rlhfjax.types import Params, Routing, TokenBatch


def predicted(batch: TokenBatch) -> Bool[Array, "B T-1"]:
    """Which tokens 1 … T-1 are targets: marked ones whose predecessor belongs to the same document."""
    return batch.loss_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])


@dataclass(frozen=True)
class LanguageModelling(Objective):
    """-Σ log p(token | its document so far) / number of targets, nats per token (Radford et al. 2018, eq. 1).

    `cross_entropy(params, batch, key)` gives the sum; `key` is for dropout and may be None.
    """

    cross_entropy: Callable[[Params, TokenBatch, jax.Array | None], Array]

    def weight(self, batch: TokenBatch) -> Float[Array, ""]:
        """Targets in the batch."""
        return predicted(batch).sum().astype(jnp.float32)

    def loss(
        self, params: Params, batch: TokenBatch, weight: Float[Array, ""], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        loss = self.cross_entropy(params, batch, key) / jnp.maximum(weight, 1.0)
        return loss, {"loss/train": loss}


@dataclass(frozen=True)
class RoutedLanguageModelling(Objective):
    """The same for a mixture of experts, + load_balancing_coef · balancing loss + router_z_coef · z-loss.

    `cross_entropy` also gives what the routers did. The balancing loss is a product of two means, of which one has a
    gradient; over the parts of a batch only that one adds up, so `survey` finds the other for the whole batch first.
    """

    cross_entropy: Callable[[Params, TokenBatch, jax.Array | None], tuple[Array, Routing]]
    load_balancing_coef: float
    router_z_coef: float

    def weight(self, batch: TokenBatch) -> dict[str, Any]:
        """Targets in the batch."""
        return {"targets": predicted(batch).sum().astype(jnp.float32)}

    def survey(self, params: Params, batch: TokenBatch, key: jax.Array | None = None) -> dict[str, Any]:
        """What the routers do with part of a batch; sums over parts are added to the weight of the whole."""
        return {"routing": jax.lax.stop_gradient(self.cross_entropy(params, batch, key)[1])}

    def loss(
        self, params: Params, batch: TokenBatch, weight: dict[str, Any], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        total, own = self.cross_entropy(params, batch, key)
        whole = weight.get("routing", own)
        loss = total / jnp.maximum(weight["targets"], 1.0)
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
