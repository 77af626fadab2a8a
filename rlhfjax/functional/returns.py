"""Advantages: generalised advantage estimation over tokens, and baselines over a group of responses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.functional.masking import Scalar


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t, and returns A_t + V_t.

    The value after the last real token is 0: the response is over. Masked positions take no time: the successor of a
    real token is the next real one, so padding on either side and holes inside give what the packed row would give.
    Both results are 0 there. Neither is whitened.
    Source: Schulman et al. 2016, eq. 16.
    """
    keep = jnp.asarray(mask).astype(bool)
    rewards, values = jnp.asarray(rewards, jnp.float32), jnp.asarray(values, jnp.float32)
    gamma, lam = jnp.asarray(gamma, jnp.float32), jnp.asarray(lam, jnp.float32)

    def step(successor, token):
        next_advantage, next_value = successor
        reward, value, real = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        return (
            jnp.where(real, advantage, next_advantage),
            jnp.where(real, value, next_value),
        ), jnp.where(real, advantage, 0.0)

    end = jnp.zeros(values.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, keep.T), reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(keep, advantages + values, 0.0)


def group_relative(scores: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Scores standardised within the responses of one prompt: (s − mean) · (σ² + 1e-8)^-½.

    σ² is the population variance over the G responses. Equal scores, and a group of one, give 0: nothing to prefer.
    Source: Shao et al. 2024 (DeepSeekMath), outcome supervision.
    """
    scores = jnp.asarray(scores, jnp.float32)
    centred = scores - jnp.mean(scores, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-8)


def leave_one_out(scores: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Each score less the mean of the other responses to its prompt: s_i − Σ_{j≠i} s_j / (G − 1).

    Raises ValueError for G = 1, where there is no other response.
    Source: Ahmadian et al. 2024 (RLOO), eq. 9.
    """
    scores = jnp.asarray(scores, jnp.float32)
    group = scores.shape[-1]
    if group < 2:
        raise ValueError(f"expected at least 2 responses per prompt to leave one out, got {group}")
    others = jnp.sum(scores, axis=-1, keepdims=True) - scores
    return scores - others / (group - 1)
