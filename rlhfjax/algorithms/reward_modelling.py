"""The reward model on K-way rankings: each candidate is read once, all pairs of a prompt are in one batch element."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.algorithms.objective import Objective
from rlhfjax.functional import pairwise_accuracy, ranked_pairs, ranked_prompts, ranking_loss
from rlhfjax.types import Params, RankedBatch, TokenRanking


def ranked_counts(batch: RankedBatch | TokenRanking) -> dict[str, Array]:
    """Prompts with at least two candidates, and the pairs among them that people told apart; 1 where there is none."""
    ranks, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.ranks, batch.mask))  # packed rows may come in parts
    return {
        "prompts": jnp.maximum(ranked_prompts(ranks, mask), 1.0),
        "pairs": jnp.maximum(ranked_pairs(ranks, mask), 1.0),
    }


@dataclass(frozen=True)
class RewardModelling(Objective):
    """Mean over prompts of 1/C(K,2) Σ over ordered pairs of -log σ(r_w - r_l) (Ouyang et al. 2022, eq. 1).

    `scores(params, batch, key)` gives [B, K], read at the last token of each response.
    """

    scores: Callable[[Params, RankedBatch | TokenRanking, jax.Array | None], Array]
    kind: str = "logistic"
    margin: float = 0.0

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
        scores = self.scores(params, batch, key)
        loss = ranking_loss(scores, batch.ranks, batch.mask, self.kind, self.margin, normalizer=weight["prompts"])
        accuracy = pairwise_accuracy(scores, batch.ranks, batch.mask, normalizer=weight["pairs"])
        return loss, {"train/rm/loss": loss, "train/rm/accuracy": accuracy}
