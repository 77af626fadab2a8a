"""Scored rollouts: the scores that all online algorithms maximise, and the measures of them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional import kl_estimate, masked_mean, masked_sum
from rlhfjax.functional.masking import masked_variance
from rlhfjax.types import Rollout


def final_scores(rollout: Rollout, missing_eos: str, value: float) -> Float[Array, "B"]:
    """Scores after the rule for responses that did not end (Ziegler et al. 2019 replace, TRL subtracts)."""
    if missing_eos == "keep":
        return rollout.scores
    missing = jnp.float32(value) if missing_eos == "replace" else rollout.scores - jnp.float32(value)
    return jnp.where(rollout.finished, rollout.scores, missing)


def measured(
    rollout: Rollout, scores: Float[Array, "B"], penalties: Float[Array, "B"], kl_coef: Float[Array, ""]
) -> dict[str, Array]:
    """The objective's metrics, means over responses unless their names say otherwise; `penalties` joins the score."""
    mask = rollout.response_mask
    kl = {
        kind: jnp.where(mask, kl_estimate(rollout.log_probs, rollout.ref_log_probs, kind), 0.0)
        for kind in ("k1", "k2", "k3")
    }
    gap = jnp.where(mask, jnp.abs(rollout.sampled_log_probs - rollout.log_probs), 0.0)
    moved = {} if rollout.rerouted is None else {"router/rerouted": _rerouted(rollout.rerouted, mask)}
    return moved | {
        "objective/kl": kl["k1"].sum(axis=1).mean(),
        "objective/kl_k2": kl["k2"].sum(axis=1).mean(),
        "objective/kl_k3": kl["k3"].sum(axis=1).mean(),
        "objective/kl_per_token": masked_mean(kl["k1"], mask),
        "objective/kl_k2_per_token": masked_mean(kl["k2"], mask),
        "objective/kl_k3_per_token": masked_mean(kl["k3"], mask),
        "objective/kl_coef": kl_coef,
        "objective/scores": scores.mean(),
        "objective/scores_std": jnp.sqrt(masked_variance(scores, jnp.ones(scores.shape, bool))),
        "objective/non_score_reward": penalties.mean(),
        "objective/rlhf_reward": (scores + penalties).mean(),
        "objective/length": mask.sum(axis=1).astype(jnp.float32).mean(),
        "objective/entropy": -masked_sum(rollout.log_probs, mask) / mask.shape[0],
        "tokens": mask.sum(),
        "objective/eos_rate": rollout.finished.astype(jnp.float32).mean(),
        "rollout_vs_train/logp_absdiff_max": gap.max(),
        "rollout_vs_train/logp_absdiff_mean": masked_mean(gap, mask),
    }


def _rerouted(shares: Float[Array, "B R"], mask: Bool[Array, "B R"]) -> Float[Array, ""]:
    """The share of pairs of a response token and a layer in which scoring routes otherwise than sampling did."""
    return masked_mean(shares, mask & (shares >= 0))
