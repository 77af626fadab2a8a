"""Proximal policy optimisation with a per-token KL penalty in the reward and a separate value model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.algorithms.objective import OnlineAlgorithm
from rlhfjax.algorithms.scored_rollouts import final_scores, measured
from rlhfjax.functional import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    kl_penalized_rewards,
    masked_sum,
    value_clip_fraction,
    whiten,
)
from rlhfjax.functional.masking import masked_variance
from rlhfjax.types import Experience, Params, Rollout, TokenExperience


@dataclass(frozen=True)
class Ppo(OnlineAlgorithm):
    """PPO of Schulman et al. 2017 as InstructGPT uses it (Ouyang et al. 2022, appendix C.4).

    `log_probs(params, rows)` gives the policy's log-probability of each response token and the entropy of the
    distribution it is drawn from, at the temperature of the rollouts; `values(params, rows)` its state values.
    `params` is {"policy": …, "value": …}. Rewards and losses are float32, KL and entropy in nats.
    """

    log_probs: Callable[[Params, Any], tuple[Array, Array]]
    values: Callable[[Params, Any], Array]
    both: Callable[[Params, Any], tuple[Array, Array, Array]] | None = None  # where one pass gives them
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos: str = "replace"  # replace | subtract | keep
    missing_eos_value: float = -1.0
    group = 1

    def estimate(self, rollout: Rollout, kl_coef: Float[Array, ""]) -> tuple[Experience, dict[str, Array]]:
        """Scores and KL to rewards, advantages and returns, over the whole batch."""
        mask, scores = rollout.response_mask, final_scores(rollout, self.missing_eos, self.missing_eos_value)
        rewards = kl_penalized_rewards(scores, rollout.log_probs, rollout.ref_log_probs, mask, kl_coef)
        non_score = kl_penalized_rewards(
            jnp.zeros_like(scores), rollout.log_probs, rollout.ref_log_probs, mask, kl_coef
        )
        shaped = whiten(rewards, mask, shift_mean=False) if self.whiten_rewards else rewards
        advantages, returns = gae(shaped, rollout.values, mask, self.gamma, self.lam)
        residual = jnp.where(mask, returns - rollout.values, 0.0)
        explained = 1.0 - masked_variance(residual, mask) / jnp.maximum(masked_variance(returns, mask), 1e-8)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        metrics = measured(rollout, scores, non_score.sum(axis=1), kl_coef) | {"val/explained_variance": explained}
        return Experience(rollout, advantages, returns), metrics | _speculation(rollout)

    def predict(self, params: Params, rows: Any) -> tuple[Array, Array, Array]:
        """Log-probabilities, entropies and state values of the response tokens."""
        return self.both(params, rows) if self.both else (*self.log_probs(params, rows), self.values(params, rows))

    def weight(self, experience: Experience | TokenExperience) -> Float[Array, ""]:
        """Response tokens in the batch, 1 at least: where all responses were dropped the sums are 0."""
        return jnp.maximum(experience.mask.sum(), 1).astype(jnp.float32)

    def loss(
        self,
        params: Params,
        experience: Experience | TokenExperience,
        weight: Float[Array, ""],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Clipped surrogate + value_coef x clipped value loss - entropy_coef x entropy, per response token.

        Sums over tokens, so that it does not matter how they lie in rows.
        """
        old, mask = experience.log_probs, experience.mask
        log_probs, entropies, values = self.predict(params, experience.rows)
        spread = masked_sum(entropies, mask) / weight
        policy = clipped_surrogate(log_probs, old, experience.advantages, mask, self.clip, normalizer=weight)
        value = clipped_value_loss(
            values, experience.values, experience.returns, mask, self.value_clip, normalizer=weight
        )
        loss = policy + self.value_coef * value - self.entropy_coef * spread
        ratio = jnp.exp(jnp.where(mask, log_probs - old, 0.0))
        return loss, {
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/entropy_avg": spread,
            "policy/approxkl_avg": approx_kl(log_probs, old, mask, normalizer=weight),
            "policy/clipfrac_avg": clip_fraction(
                log_probs, old, experience.advantages, mask, self.clip, normalizer=weight
            ),
            "val/ratio": masked_sum(ratio, mask) / weight,
            "val/ratio_err": masked_sum(jnp.abs(ratio - 1.0), mask) / weight,
            "val/clipfrac_avg": value_clip_fraction(
                values, experience.values, experience.returns, mask, self.value_clip, normalizer=weight
            ),
        }


def _speculation(rollout: Rollout) -> dict[str, Array]:
    if rollout.counts is None:
        return {}
    calls, guessed, kept = rollout.counts.sum(axis=0).astype(jnp.float32)
    after_first = rollout.response_mask[:, 1:].sum().astype(jnp.float32)
    return {
        "speculation/kept": kept / jnp.maximum(guessed, 1.0),
        "speculation/tokens_per_call": after_first / jnp.maximum(calls, 1.0),
    }
