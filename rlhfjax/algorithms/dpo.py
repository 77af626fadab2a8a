"""Direct preference optimisation: a policy from rankings of people, without a reward model and without sampling."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.algorithms.objective import Objective
from rlhfjax.algorithms.reward_modelling import ranked_counts
from rlhfjax.functional import dpo_loss, masked_mean, pairwise_accuracy
from rlhfjax.functional.preference import better, mean_of_pairs
from rlhfjax.types import Params, RankedBatch, TokenRanking


@dataclass(frozen=True)
class Dpo(Objective):
    """Mean over prompts of 1/C(K,2) Σ_{w≻l} ℓ(h_w − h_l), h = log π(y|x) − log π_ref(y|x); ties drop out.

    ℓ is that of `dpo_loss`; two candidates and `sigmoid` make it the loss of Rafailov et al. 2023, eq. 7. Weighing the
    pairs of more candidates alike, as the reward model does (Ouyang et al. 2022, eq. 1), lets no prompt count twice.
    `log_probs(params, batch, key)` and `reference(params, batch)` give [B, K] log-probabilities summed over each
    response, in nats. The reference has no gradient; it may read frozen parameters, or what was computed before.
    """

    log_probs: Callable[[Params, RankedBatch | TokenRanking, jax.Array | None], Array]
    reference: Callable[[Params, RankedBatch | TokenRanking], Array]
    beta: float = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0

    def weight(self, batch: RankedBatch | TokenRanking) -> dict[str, Array]:
        """Prompts with at least two candidates, and the pairs among them that people told apart."""
        return ranked_counts(batch)

    def loss(
        self,
        params: Params,
        batch: RankedBatch | TokenRanking,
        weight: dict[str, Array],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        # Absent candidates may hold anything; at 0 they reach neither the loss nor its gradient.
        log_probs = jnp.where(batch.mask, self.log_probs(params, batch, key), 0.0)
        reference = jnp.where(batch.mask, jax.lax.stop_gradient(self.reference(params, batch)), 0.0)
        winner, loser = _pairs(log_probs)
        losses = dpo_loss(winner, loser, *_pairs(reference), self.beta, self.kind, self.label_smoothing)
        loss = mean_of_pairs(losses, batch.ranks, batch.mask, normalizer=weight["prompts"])

        rewards = self.beta * (log_probs - reference)  # implicit, Rafailov et al. 2023, eq. 5
        pairs = better(batch.ranks, batch.mask)
        named = {"rewards": _pairs(rewards), "logps": (winner, loser)}
        means = {
            f"{name}/{side}": masked_mean(x, pairs, normalizer=weight["pairs"])
            for name, both in named.items()
            for side, x in zip(("chosen", "rejected"), both, strict=True)
        }
        accuracy = pairwise_accuracy(rewards, batch.ranks, batch.mask, normalizer=weight["pairs"])
        margin = means["rewards/chosen"] - means["rewards/rejected"]
        return loss, {"loss/train": loss, "rewards/accuracies": accuracy, "rewards/margins": margin} | means


def _pairs(x: Float[Array, "B K"]) -> tuple[Float[Array, "B K K"], Float[Array, "B K K"]]:
    """At [b, w, l] the value of candidate w, and that of candidate l."""
    shape = (*x.shape, x.shape[1])
    return jnp.broadcast_to(x[:, :, None], shape), jnp.broadcast_to(x[:, None, :], shape)
