"""Log-probabilities of tokens, in nats. One temperature convention everywhere: log softmax(z / T)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.functional.logits import apply_temperature
from rlhfjax.functional.masking import Scalar


def token_log_probs(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"], temperature: Scalar = 1.0
) -> Float[Array, "*B T"]:
    """Log-probability of each token under the logits at its own position: z_y/T − log Σ_v exp(z_v/T), in nats.

    The caller aligns the two: `logits[..., t, :]` predicts `tokens[..., t]`. A policy that samples at temperature T
    *is* softmax(z/T), so the old, new and reference log-probabilities all take the same T (Ziegler et al. 2019, code).
    """
    logits = apply_temperature(logits, temperature)
    chosen = jnp.take_along_axis(logits, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def smoothed_cross_entropy(
    logits: Float[Array, "*B T V"], tokens: Int[Array, "*B T"], smoothing: Scalar
) -> Float[Array, "*B T"]:
    """Cross-entropy of each token against (1−ε)·one-hot + ε/V: −(1−ε)·log p_y − ε/V Σ_v log p_v, in nats.

    ε = 0 is the negative log-likelihood; 0.1 trained the Transformer (Szegedy et al. 2016, section 7; Vaswani et al.
    2017, section 5.4). The smallest value is the entropy of the smoothed target, not 0.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
    return -(1.0 - smoothing) * chosen - smoothing * jnp.mean(log_p, axis=-1)


def entropy(logits: Float[Array, "*B V"], temperature: Scalar = 1.0) -> Float[Array, "*B"]:
    """Entropy of the next-token distribution: −Σ_v p_v log p_v with p = softmax(z / T), in nats; 0·log 0 = 0."""
    log_p = jax.nn.log_softmax(apply_temperature(logits, temperature), axis=-1)
    possible = log_p > -jnp.inf
    log_p = jnp.where(possible, log_p, 0.0)  # before the product, so that filtered tokens give no NaN gradient
    return -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1)
