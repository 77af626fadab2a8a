"""Losses that keep the routers of a mixture of experts balanced and their logits small."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def load_balancing_loss(
    assigned: Float[Array, "*L E"], probabilities: Float[Array, "*L E"], tokens: Float[Array, "*L"]
) -> Float[Array, ""]:
    """E · Σ_e f_e · P_e, mean over layers: k when all E experts get the same, up to E when k of them get everything.

    `f_e` is `assigned` / `tokens`, the share of tokens that chose expert e (k in all), and has no gradient; `P_e` is
    `probabilities` / `tokens`, its mean router probability (Fedus et al. 2022, eq. 4-6, for top-k as Mixtral's
    implementations count it). Counts may be of more tokens than `probabilities` sums: parts of a batch then add up.
    """
    count = jnp.maximum(tokens, 1.0)[..., None]
    return assigned.shape[-1] * ((assigned / count) * (probabilities / count)).sum(axis=-1).mean()


def router_z_loss(squared_z: Float[Array, "*L"], tokens: Float[Array, "*L"]) -> Float[Array, ""]:
    """Mean over tokens and layers of logsumexp(router logits)^2 (Zoph et al. 2022, eq. 5)."""
    return (squared_z / jnp.maximum(tokens, 1.0)).mean()


def max_load(assigned: Float[Array, "*L E"]) -> Float[Array, ""]:
    """Assignments of the busiest expert over the mean of all, mean over layers: 1 is balance, E/k the worst."""
    return (assigned.max(axis=-1) / jnp.maximum(assigned.mean(axis=-1), 1e-9)).mean()
