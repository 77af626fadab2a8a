"""Advantages: generalised advantage estimation over tokens, and baselines over a group of responses."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional.masking import Scalar, masked_centred


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t, and returns A_t + V_t.

    The value after the last real token is 0: the response is over (rlax bootstraps from one more value). Masked
    positions take no time: the successor of a real token is the next real one, so padding on either side and holes
    inside give what the packed row would give. Both results are 0 there. Neither is whitened.
    Source: Schulman et al. 2016, eq. 16.
    """
    keep = jnp.asarray(mask).astype(bool)
    rewards, values = (jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0) for x in (rewards, values))
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


def group_relative(
    scores: Float[Array, "B G"], *, deviation: str = "sample", present: Bool[Array, "B G"] | None = None
) -> Float[Array, "B G"]:
    """Scores standardised within the responses of one prompt: (s − mean) · (σ² + 1e-8)^-½.

    σ² over the G responses divides by G − 1 (`sample`, as TRL, verl and NeMo-RL do) or by G (`population`: a group of
    4 has advantages 15 % larger); `none` leaves s − mean (Dr. GRPO, Liu et al. 2025). Equal scores of any size, and a
    group of one, give exactly 0: nothing to prefer. What is not `present` is 0 and counts for nothing in its group.
    Raises ValueError on another deviation.
    Source: Shao et al. 2024 (DeepSeekMath), outcome supervision, which says "std" alone.
    """
    centred = _centred(scores, present)
    if deviation == "none":
        return centred
    if deviation not in ("sample", "population"):
        raise ValueError(f"expected deviation 'sample', 'population' or 'none', got {deviation!r}")
    least = max if present is None else jnp.maximum
    count = least(_count(scores, present) - (1 if deviation == "sample" else 0), 1)
    return centred * jax.lax.rsqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count + 1e-8)


def _centred(scores: Float[Array, "B G"], present: Bool[Array, "B G"] | None) -> Float[Array, "B G"]:
    return masked_centred(scores, jnp.ones(jnp.shape(scores), bool) if present is None else present, axis=-1)


def _count(scores: Float[Array, "B G"], present: Bool[Array, "B G"] | None) -> Any:
    """Responses of each group: a number, or where some may be absent an array."""
    return jnp.shape(scores)[-1] if present is None else jnp.sum(present, axis=-1, keepdims=True, dtype=jnp.float32)


def leave_one_out(scores: Float[Array, "B G"], *, present: Bool[Array, "B G"] | None = None) -> Float[Array, "B G"]:
    """Each score less the mean of the other responses to its prompt: s_i − Σ_{j≠i} s_j / (G − 1).

    Equal scores of any size give exactly 0, and so does what is not `present`, which counts for no other response.
    Raises ValueError for G = 1, where there is no other response.
    Source: Ahmadian et al. 2024 (RLOO), eq. 9.
    """
    group = jnp.shape(scores)[-1]
    if group < 2:
        raise ValueError(f"expected at least 2 responses per prompt to leave one out, got {group}")
    # Around the mean the scores sum to 0, so that the others of a response sum to −(s_i − mean).
    least, count = max if present is None else jnp.maximum, _count(scores, present)
    return _centred(scores, present) * (count / least(count - 1, 1))


def overlong_penalty(lengths: Int[Array, "B"], longest: Scalar, buffer: Scalar) -> Float[Array, "B"]:
    """What is added to the score of a long response: 0 up to `longest` − `buffer` tokens, from there linearly to −1.

    min(0, longest − buffer − length) / buffer, and −1 beyond `longest`; lengths are in tokens with the EOS.
    Source: Yu et al. 2025 (DAPO), eq. 13, "soft overlong punishment".
    """
    beyond = jnp.asarray(lengths, jnp.float32) - (jnp.asarray(longest, jnp.float32) - buffer)
    return -jnp.clip(beyond / jnp.asarray(buffer, jnp.float32), 0.0, 1.0)
