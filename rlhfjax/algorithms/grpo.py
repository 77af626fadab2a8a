"""Group relative policy optimisation: the other responses to a prompt take the place of a value model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.algorithms.objective import final_scores, measured
from rlhfjax.functional import group_relative, kl_estimate, masked_sum
from rlhfjax.functional.kl import sequence_kl
from rlhfjax.functional.policy_gradient import importance_ratio
from rlhfjax.types import Experience, Params, Rollout, TokenExperience


@dataclass(frozen=True)
class Grpo:
    """GRPO of Shao et al. 2024, eq. 3 and 4: each token of a response has the advantage of the response in its group.

    Rows come in groups of `group` next to each other, responses to one prompt. `log_probs` is that of `Ppo`; `params`
    is {"policy": …}. `deviation` is that of `group_relative`; `none` leaves score − mean (Dr. GRPO, Liu et al. 2025).
    `beta` weighs the k3 estimate of the KL to the reference in the loss; `kl_coef` of `estimate` takes it from the
    score instead. `clip_high` bounds the ratio above in the place of `clip` (DAPO, Yu et al. 2025, eq. 10). `average`
    is over the responses of their means over tokens (`sequence`, as published), or over all tokens (`token`, DAPO,
    eq. 12).
    """

    log_probs: Callable[[Params, Any], tuple[Array, Array]]
    group: int
    clip: float = 0.2
    clip_high: float | None = None
    beta: float = 0.04
    deviation: str = "sample"  # sample | population | none
    average: str = "sequence"  # sequence | token
    missing_eos: str = "replace"  # replace | subtract | keep
    missing_eos_value: float = -1.0

    def predict(self, params: Params, rows: Any) -> tuple[Array, Array, Array]:
        """Log-probabilities, entropies, and 0 for state values: there is no value model."""
        log_probs, entropies = self.log_probs(params, rows)
        return log_probs, entropies, jnp.zeros_like(log_probs)

    def estimate(self, rollout: Rollout, kl_coef: Float[Array, ""]) -> tuple[Experience, dict[str, Array]]:
        """Scores, less kl_coef x KL, compared within each group."""
        mask, scores = rollout.response_mask, final_scores(rollout, self.missing_eos, self.missing_eos_value)
        non_score = -kl_coef * sequence_kl(rollout.log_probs, rollout.ref_log_probs, mask, "k1")
        rewards = (scores + non_score).reshape(-1, self.group)
        each = group_relative(rewards, deviation=self.deviation)
        advantages = jnp.where(mask, each.reshape(-1)[:, None], 0.0)
        alike = (rewards == rewards[:, :1]).all(axis=1).astype(jnp.float32)
        metrics = measured(rollout, scores, non_score, kl_coef) | {"objective/groups_alike": alike.mean()}
        return Experience(rollout, advantages, jnp.zeros_like(advantages)), metrics

    def weight(self, experience: Experience | TokenExperience) -> Float[Array, ""]:
        """Responses in the batch, or response tokens."""
        return self._shares(experience).sum()

    def loss(
        self,
        params: Params,
        experience: Experience | TokenExperience,
        weight: Float[Array, ""],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Clipped surrogate + beta x KL to the reference, where each token counts as `average` says."""
        old, mask = experience.log_probs, experience.mask
        log_probs, entropies = self.log_probs(params, experience)
        share = self._shares(experience)

        def mean(x: Array) -> Array:
            return masked_sum(share * x, mask) / weight

        ratio = importance_ratio(log_probs, old, mask)
        near = jnp.clip(ratio, 1.0 - self.clip, 1.0 + (self.clip if self.clip_high is None else self.clip_high))
        unclipped, clipped = -experience.advantages * ratio, -experience.advantages * near
        policy = mean(jnp.maximum(unclipped, clipped))
        # Padding is 0 before exp: it may hold anything, and infinity times zero would be NaN in the gradient.
        real, ref = jnp.where(mask, log_probs, 0.0), jnp.where(mask, experience.ref_log_probs, 0.0)
        kl = mean(kl_estimate(real, ref, "k3"))
        return policy + self.beta * kl, {
            "loss/policy_avg": policy,
            "loss/kl_avg": kl,
            "policy/entropy_avg": mean(entropies),
            "policy/approxkl_avg": mean(jnp.square(log_probs - old) / 2),
            "policy/clipfrac_avg": mean((clipped > unclipped).astype(jnp.float32)),
            "val/ratio": mean(ratio),
            "val/ratio_err": mean(jnp.abs(ratio - 1.0)),
        }

    def _shares(self, experience: Experience | TokenExperience) -> Float[Array, "*N T"]:
        """What each token counts: 1, or 1 / the tokens of its response; 0 where there is none."""
        mask = experience.mask
        if self.average == "token":
            return mask.astype(jnp.float32)
        if self.average != "sequence":
            raise ValueError(f"expected average 'sequence' or 'token', got {self.average!r}")
        if isinstance(experience, TokenExperience):  # packed: a response is what a segment has of the mask
            flat = (-1, mask.shape[-1])
            lengths = jax.vmap(_counts)(experience.batch.segments.reshape(flat), mask.reshape(flat)).reshape(mask.shape)
        else:
            lengths = jnp.broadcast_to(mask.sum(axis=1, keepdims=True), mask.shape)
        return mask.astype(jnp.float32) / jnp.maximum(lengths, 1).astype(jnp.float32)


def _counts(segments: Int[Array, "T"], mask: Bool[Array, "T"]) -> Int[Array, "T"]:
    """How many tokens of each one's segment the mask marks."""
    total = jnp.zeros(segments.shape[0] + 1, jnp.int32).at[segments].add(mask.astype(jnp.int32))
    return total[segments]
