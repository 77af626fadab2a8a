"""The equations of the recipe: arrays in, arrays out, float32 inside, one pure function per equation.

Shapes: B responses (or prompts), T tokens, K ranked candidates, G responses of a group, V vocabulary. Masks are True on
real tokens. Inputs of a lower precision are cast to float32 on entry.
"""

from rlhfjax.functional.kl import adaptive_kl, kl_estimate, kl_penalized_rewards, sequence_kl
from rlhfjax.functional.likelihood import entropy, smoothed_cross_entropy, token_log_probs
from rlhfjax.functional.logits import apply_temperature, filter_logits, top_k, top_p
from rlhfjax.functional.masking import last_token_mask, length_mask, masked_mean, masked_sum, whiten
from rlhfjax.functional.policy_gradient import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    importance_ratio,
    surrogates,
    value_clip_fraction,
)
from rlhfjax.functional.preference import (
    dpo_loss,
    implicit_reward,
    pairwise_accuracy,
    ranked_pairs,
    ranked_prompts,
    ranking_loss,
)
from rlhfjax.functional.returns import gae, group_relative, leave_one_out, overlong_penalty
from rlhfjax.functional.routing import load_balancing_loss, max_load, router_z_loss

__all__ = [
    "adaptive_kl",
    "apply_temperature",
    "approx_kl",
    "clip_fraction",
    "clipped_surrogate",
    "clipped_value_loss",
    "dpo_loss",
    "entropy",
    "filter_logits",
    "gae",
    "group_relative",
    "implicit_reward",
    "importance_ratio",
    "kl_estimate",
    "kl_penalized_rewards",
    "last_token_mask",
    "leave_one_out",
    "length_mask",
    "load_balancing_loss",
    "masked_mean",
    "masked_sum",
    "max_load",
    "overlong_penalty",
    "pairwise_accuracy",
    "ranked_pairs",
    "ranked_prompts",
    "ranking_loss",
    "router_z_loss",
    "sequence_kl",
    "smoothed_cross_entropy",
    "surrogates",
    "token_log_probs",
    "top_k",
    "top_p",
    "value_clip_fraction",
    "whiten",
]
