"""The two losses of PPO and what to watch beside them.

Every mean takes a `normalizer`: the count of real tokens of the whole update in place of the local one, so that micro
batches add up to exactly the loss of the update.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional.masking import Scalar, masked_mean


def importance_ratio(
    log_probs: Float[Array, "B T"], old_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """How much likelier each token became: ρ = exp(log π − log π_old), and 1 at masked positions."""
    log_ratio = jnp.asarray(log_probs, jnp.float32) - jnp.asarray(old_log_probs, jnp.float32)
    # Masked before exp: a padding position may overflow, and infinity times zero would be NaN in the gradient.
    return jnp.exp(jnp.where(jnp.asarray(mask).astype(bool), log_ratio, 0.0))


def clipped_surrogate(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: Scalar,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """PPO's policy loss, a mean over real tokens: max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)).

    Source: Schulman et al. 2017, eq. 7 (negated: this is minimised).
    """
    unclipped, clipped = _surrogates(log_probs, old_log_probs, advantages, mask, clip)
    return masked_mean(jnp.maximum(unclipped, clipped), mask, normalizer=normalizer)


def clip_fraction(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: Scalar,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """Share of real tokens whose gradient the clip removes: where the clipped loss is the larger one."""
    unclipped, clipped = _surrogates(log_probs, old_log_probs, advantages, mask, clip)
    return masked_mean(clipped > unclipped, mask, normalizer=normalizer)


def approx_kl(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """How far the update has moved the policy, in nats per token: mean of (log π − log π_old)² / 2.

    This is the k2 estimate, never negative; OpenRLHF reports the mean of log π_old − log π (k1) under that name.
    Source: Ziegler et al. 2019 (released code); Huang et al. 2024.
    """
    keep = jnp.asarray(mask).astype(bool)
    # Masked before the square, whose gradient is 2 x: 0 · infinity would be NaN.
    moved = jnp.where(keep, jnp.asarray(log_probs, jnp.float32) - jnp.asarray(old_log_probs, jnp.float32), 0.0)
    return masked_mean(jnp.square(moved) / 2, keep, normalizer=normalizer)


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: Scalar,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """PPO's value loss, a mean over real tokens: ½ max((V − R)², (clip(V, V_old ± ε) − R)²).

    Source: Ziegler et al. 2019 (released code); Huang et al. 2024.
    """
    unclipped, clipped = _squared_errors(values, old_values, returns, mask, clip)
    return 0.5 * masked_mean(jnp.maximum(unclipped, clipped), mask, normalizer=normalizer)


def value_clip_fraction(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: Scalar,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, ""]:
    """Share of real tokens whose value gradient the clip removes: where the clipped error is the larger one."""
    unclipped, clipped = _squared_errors(values, old_values, returns, mask, clip)
    return masked_mean(clipped > unclipped, mask, normalizer=normalizer)


def surrogates(
    ratio: Float[Array, "*shape"], advantages: Float[Array, "*shape"], low: Scalar, high: Scalar
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The two losses of which the larger one counts: −A ρ, and −A clip(ρ, 1 − low, 1 + high).

    Source: Schulman et al. 2017, eq. 7, where low = high; Yu et al. 2025 (DAPO), eq. 10.
    """
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - low, 1.0 + high)


def _surrogates(log_probs, old_log_probs, advantages, mask, clip) -> tuple[Array, Array]:
    ratio = importance_ratio(log_probs, old_log_probs, mask)
    clip = jnp.asarray(clip, jnp.float32)
    advantages = jnp.where(jnp.asarray(mask).astype(bool), jnp.asarray(advantages, jnp.float32), 0.0)
    return surrogates(ratio, advantages, clip, clip)


def _squared_errors(values, old_values, returns, mask, clip) -> tuple[Array, Array]:
    keep = jnp.asarray(mask).astype(bool)
    # Padding at 0 before the square: whatever it holds, its gradient is 0 and not 0 · infinity.
    values, old_values, returns = (
        jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0) for x in (values, old_values, returns)
    )
    clip = jnp.asarray(clip, jnp.float32)
    near_old = jnp.clip(values, old_values - clip, old_values + clip)
    return jnp.square(values - returns), jnp.square(near_old - returns)
