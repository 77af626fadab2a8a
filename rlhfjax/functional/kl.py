"""KL divergence from the reference policy: estimators, the penalised reward, the adaptive coefficient."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional.masking import Scalar, last_token_mask, masked_sum

SMALLEST_STEP = 0.1  # what one call of `adaptive_kl` leaves of the coefficient at least


def kl_estimate(
    log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"], kind: str
) -> Float[Array, "*shape"]:
    """Per-token estimate of KL(policy ‖ reference) from tokens the policy sampled, in nats.

    With x = log π_ref − log π: k1 = −x (unbiased, any sign), k2 = x²/2 (biased, low variance), k3 = eˣ − 1 − x
    (unbiased, never negative). Raises ValueError on another kind.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    x = jnp.asarray(ref_log_probs, jnp.float32) - jnp.asarray(log_probs, jnp.float32)
    match kind:
        case "k1":
            return -x
        case "k2":
            return jnp.square(x) / 2
        case "k3":
            return jnp.expm1(x) - x
    raise ValueError(f"expected kind 'k1', 'k2' or 'k3', got {kind!r}")


def sequence_kl(
    log_probs: Float[Array, "B T"], ref_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"], kind: str
) -> Float[Array, "B"]:
    """Estimate of each response's KL: Σ_t of the per-token estimates, in nats.

    The mean over the batch is what `adaptive_kl` steers.
    """
    return masked_sum(_kl_of_real(log_probs, ref_log_probs, mask, kind), mask, axis=-1)


def _kl_of_real(log_probs: Array, ref_log_probs: Array, mask: Array, kind: str) -> Array:
    """`kl_estimate` with 0 in padding, put there before the square or the exponential: its gradient is no 0 · ∞."""
    keep = jnp.asarray(mask).astype(bool)
    real, ref = (jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0) for x in (log_probs, ref_log_probs))
    return kl_estimate(real, ref, kind)


def kl_penalized_rewards(
    scores: Float[Array, "B"],
    log_probs: Float[Array, "B T"],
    ref_log_probs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    kl_coef: Scalar,
) -> Float[Array, "B T"]:
    """Reward of every token: r_t = −β (log π_t − log π_ref,t), plus the response's score at its last real token.

    Summed over a response this is score − β·KL. Masked positions are 0; a row with no real token gets nothing. The
    last real token comes from the mask, so it may or may not be an EOS.
    Source: Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2.
    """
    keep = jnp.asarray(mask).astype(bool)
    penalty = jnp.asarray(kl_coef, jnp.float32) * _kl_of_real(log_probs, ref_log_probs, keep, "k1")
    score_at_end = jnp.where(last_token_mask(keep), jnp.asarray(scores, jnp.float32)[:, None], 0.0)
    return jnp.where(keep, score_at_end - penalty, 0.0)


def adaptive_kl(kl_coef: Scalar, kl: Scalar, *, target: Scalar, horizon: Scalar, episodes: Scalar) -> Float[Array, ""]:
    """Next KL coefficient of the proportional controller: β·max(1 + clip(KL/target − 1, ±0.2)·episodes/horizon, 0.1).

    `kl` is the per-response KL (sum over tokens, mean over the batch) and `target` the wanted one, in nats; `horizon`
    and `episodes` (responses since the last call) are counted in responses, so the pace ignores the batch size.
    A positive coefficient stays positive: a negative one would pay for distance from the reference, and 0 would stay.
    Source: Ziegler et al. 2019, section 2.2, whose gain K_β (episodes/horizon) is 0.1, so that their factor is never
    below 0.98; the bound of 0.1 is ours, and changes nothing up to episodes = 4.5·horizon.
    """
    kl_coef, kl, target, horizon, episodes = (
        jnp.asarray(value, jnp.float32) for value in (kl_coef, kl, target, horizon, episodes)
    )
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    moved = kl_coef * jnp.maximum(1.0 + error * episodes / horizon, SMALLEST_STEP)
    return jnp.where(kl_coef > 0, jnp.maximum(moved, jnp.finfo(jnp.float32).tiny), moved)
