"""KL divergence from the reference policy: estimators, the penalised reward, the adaptive coefficient."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional.masking import Scalar, last_token_mask, masked_sum


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
    return masked_sum(kl_estimate(log_probs, ref_log_probs, kind), mask, axis=-1)


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
    penalty = jnp.asarray(kl_coef, jnp.float32) * kl_estimate(log_probs, ref_log_probs, "k1")
    score_at_end = jnp.where(last_token_mask(keep), jnp.asarray(scores, jnp.float32)[:, None], 0.0)
    return jnp.where(keep, score_at_end - penalty, 0.0)


def adaptive_kl(kl_coef: Scalar, kl: Scalar, *, target: Scalar, horizon: Scalar, episodes: Scalar) -> Float[Array, ""]:
    """Next KL coefficient of the proportional controller: β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon).

    `kl` is the per-response KL (sum over tokens, mean over the batch) and `target` the wanted one, in nats; `horizon`
    and `episodes` (responses since the last call) are counted in responses, so the pace ignores the batch size.
    Source: Ziegler et al. 2019, section 2.2.
    """
    kl_coef, kl, target, horizon, episodes = (
        jnp.asarray(value, jnp.float32) for value in (kl_coef, kl, target, horizon, episodes)
    )
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
