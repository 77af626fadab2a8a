"""Scored rollouts: the scores that all online algorithms maximise, and the measures of them."""

from dataclasses import replace
from functools import partial
from typing import Any

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


def without_dropped(rollout: Rollout) -> Rollout:
    """The rollout in which responses that are dropped have no tokens: they have no share in any mean over tokens."""
    if rollout.kept is None:
        return rollout
    return replace(rollout, response_mask=rollout.response_mask & rollout.kept[:, None])


def kept_in_groups(rollout: Rollout, group: int) -> Bool[Array, "B G"] | None:
    """Which responses of each group are kept; None where none can be dropped."""
    return None if rollout.kept is None else rollout.kept.reshape(-1, group)


def mean_over_kept(x: Float[Array, "B"], rollout: Rollout) -> Float[Array, ""]:
    """The mean over the responses that are kept; 0 where none is."""
    return x.mean() if rollout.kept is None else masked_mean(x, rollout.kept)


def measured(
    rollout: Rollout, scores: Float[Array, "B"], penalties: Float[Array, "B"], kl_coef: Float[Array, ""]
) -> dict[str, Array]:
    """The objective's metrics, means over responses unless their names say otherwise; `penalties` joins the score.

    Responses that are dropped are not measured.
    """
    mask, mean = rollout.response_mask, partial(mean_over_kept, rollout=rollout)
    kl = {
        kind: jnp.where(mask, kl_estimate(rollout.log_probs, rollout.ref_log_probs, kind), 0.0)
        for kind in ("k1", "k2", "k3")
    }
    gap = jnp.where(mask, jnp.abs(rollout.sampled_log_probs - rollout.log_probs), 0.0)
    moved = {} if rollout.rerouted is None else {"router/rerouted": _rerouted(rollout.rerouted, mask)}
    return moved | {
        "objective/kl": mean(kl["k1"].sum(axis=1)),
        "objective/kl_k2": mean(kl["k2"].sum(axis=1)),
        "objective/kl_k3": mean(kl["k3"].sum(axis=1)),
        "objective/kl_per_token": masked_mean(kl["k1"], mask),
        "objective/kl_k2_per_token": masked_mean(kl["k2"], mask),
        "objective/kl_k3_per_token": masked_mean(kl["k3"], mask),
        "objective/kl_coef": kl_coef,
        "objective/scores": mean(scores),
        "objective/scores_std": jnp.sqrt(masked_variance(scores, _kept(rollout))),
        "objective/non_score_reward": mean(penalties),
        "objective/rlhf_reward": mean(scores + penalties),
        "objective/length": mean(mask.sum(axis=1).astype(jnp.float32)),
        "objective/entropy": -masked_sum(rollout.log_probs, mask) / _responses(rollout),
        "tokens": mask.sum(),
        "objective/eos_rate": mean(rollout.finished.astype(jnp.float32)),
        "rollout_vs_train/logp_absdiff_max": gap.max(),
        "rollout_vs_train/logp_absdiff_mean": masked_mean(gap, mask),
    }


def _kept(rollout: Rollout) -> Bool[Array, "B"]:
    return jnp.ones(rollout.scores.shape, bool) if rollout.kept is None else rollout.kept


def _responses(rollout: Rollout) -> Any:
    """Responses that are kept, 1 at least; a number where none can be dropped."""
    rows = rollout.response_mask.shape[0]
    return rows if rollout.kept is None else jnp.maximum(rollout.kept.sum(), 1).astype(jnp.float32)


def _rerouted(shares: Float[Array, "B R"], mask: Bool[Array, "B R"]) -> Float[Array, ""]:
    """The share of pairs of a response token and a layer in which scoring routes otherwise than sampling did."""
    return masked_mean(shares, mask & (shares >= 0))
