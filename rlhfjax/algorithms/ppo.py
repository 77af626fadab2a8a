"""Proximal policy optimisation with a per-token KL penalty in the reward and a separate value model."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.functional import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    entropy,
    gae,
    kl_estimate,
    kl_penalized_rewards,
    masked_mean,
    masked_sum,
    token_log_probs,
    value_clip_fraction,
    whiten,
)
from rlhfjax.types import Experience, Params, Rollout


@dataclass(frozen=True)
class Ppo:
    """PPO of Schulman et al. 2017 as InstructGPT uses it (Ouyang et al. 2022, appendix C.4).

    `logits(params, rollout)` gives the policy's [B, R, V] logits of the response tokens, `values(params, rollout)` its
    [B, R] state values; `params` is {"policy": …, "value": …}. Rewards and losses are float32, KL in nats.
    """

    logits: Callable[[Params, Rollout], Array]
    values: Callable[[Params, Rollout], Array]
    temperature: float = 1.0
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

    def final_scores(self, rollout: Rollout) -> Float[Array, "B"]:
        """Scores after the rule for responses that did not end (Ziegler et al. 2019 replace, TRL subtracts)."""
        if self.missing_eos == "keep":
            return rollout.scores
        value = jnp.float32(self.missing_eos_value)
        missing = value if self.missing_eos == "replace" else rollout.scores - value
        return jnp.where(rollout.finished, rollout.scores, missing)

    def estimate(self, rollout: Rollout, kl_coef: Float[Array, ""]) -> tuple[Experience, dict[str, Array]]:
        """Scores and KL to rewards, advantages and returns, over the whole batch."""
        mask, scores = rollout.response_mask, self.final_scores(rollout)
        rewards = kl_penalized_rewards(scores, rollout.log_probs, rollout.ref_log_probs, mask, kl_coef)
        non_score = kl_penalized_rewards(
            jnp.zeros_like(scores), rollout.log_probs, rollout.ref_log_probs, mask, kl_coef
        )
        shaped = whiten(rewards, mask, shift_mean=False) if self.whiten_rewards else rewards
        advantages, returns = gae(shaped, rollout.values, mask, self.gamma, self.lam)
        residual = jnp.where(mask, returns - rollout.values, 0.0)
        explained = 1.0 - _variance(residual, mask) / jnp.maximum(_variance(returns, mask), 1e-8)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        kl = {
            kind: jnp.where(mask, kl_estimate(rollout.log_probs, rollout.ref_log_probs, kind), 0.0)
            for kind in ("k1", "k2", "k3")
        }
        gap = jnp.where(mask, jnp.abs(rollout.sampled_log_probs - rollout.log_probs), 0.0)
        metrics = {
            "objective/kl": kl["k1"].sum(axis=1).mean(),
            "objective/kl_k2": kl["k2"].sum(axis=1).mean(),
            "objective/kl_k3": kl["k3"].sum(axis=1).mean(),
            "objective/kl_per_token": masked_mean(kl["k1"], mask),
            "objective/kl_k2_per_token": masked_mean(kl["k2"], mask),
            "objective/kl_k3_per_token": masked_mean(kl["k3"], mask),
            "objective/kl_coef": kl_coef,
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(),
            "objective/non_score_reward": non_score.sum(axis=1).mean(),
            "objective/rlhf_reward": rewards.sum(axis=1).mean(),
            "objective/length": mask.sum(axis=1).astype(jnp.float32).mean(),
            "objective/entropy": -masked_sum(rollout.log_probs, mask) / mask.shape[0],
            "tokens": mask.sum(),
            "objective/eos_rate": rollout.finished.astype(jnp.float32).mean(),
            "val/explained_variance": explained,
            "rollout_vs_train/logp_absdiff_max": gap.max(),
            "rollout_vs_train/logp_absdiff_mean": masked_mean(gap, mask),
        }
        return Experience(rollout, advantages, returns), metrics

    def weight(self, experience: Experience) -> Float[Array, ""]:
        """Response tokens in the batch."""
        return experience.rollout.response_mask.sum().astype(jnp.float32)

    def loss(
        self, params: Params, experience: Experience, weight: Float[Array, ""], key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Clipped surrogate + value_coef x clipped value loss - entropy_coef x entropy, per response token."""
        rollout, mask = experience.rollout, experience.rollout.response_mask
        logits = self.logits(params, rollout)
        log_probs = token_log_probs(logits, rollout.response, self.temperature)
        spread = masked_sum(entropy(logits, self.temperature), mask) / weight
        values = self.values(params, rollout)
        old = rollout.log_probs
        policy = clipped_surrogate(log_probs, old, experience.advantages, mask, self.clip, normalizer=weight)
        value = clipped_value_loss(values, rollout.values, experience.returns, mask, self.value_clip, normalizer=weight)
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
                values, rollout.values, experience.returns, mask, self.value_clip, normalizer=weight
            ),
        }


def _variance(x: Array, mask: Array) -> Array:
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)
