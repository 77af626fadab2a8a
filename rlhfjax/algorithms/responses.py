"""Counts and sums over responses, however their tokens lie in rows: one response a row, or packed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.functional import approx_kl, importance_ratio, masked_sum
from rlhfjax.types import Experience, TokenExperience


def first_tokens(experience: Experience | TokenExperience) -> Bool[Array, "*N T"]:
    """Where a response starts: each token that the mask marks, and of whose response it marks none before."""
    mask = experience.mask
    before = jnp.pad(mask[..., :-1], [(0, 0)] * (mask.ndim - 1) + [(1, 0)])
    if isinstance(experience, TokenExperience):  # what precedes a token in its row may be another response
        segments = experience.batch.segments
        before &= segments == jnp.roll(segments, 1, axis=-1)
    return mask & ~before


def response_counts(experience: Experience | TokenExperience) -> dict[str, Float[Array, ""]]:
    """Responses that have tokens, and these tokens, of a whole batch: what a mean over either is normalised by."""
    counts = {"responses": first_tokens(experience).sum(), "tokens": experience.mask.sum()}
    # Where there is none the sum is 0, and so is the mean.
    return {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in counts.items()}


def response_sums(experience: Experience | TokenExperience, x: Float[Array, "*N T"]) -> Float[Array, "*N T"]:
    """Σ of x over the tokens of each one's response: at every token of a response the same."""
    mask = experience.mask
    if not isinstance(experience, TokenExperience):
        return jnp.broadcast_to(masked_sum(x, mask, axis=1)[:, None], mask.shape)
    rows = (-1, mask.shape[-1])
    real = jnp.where(mask, x, 0.0).reshape(rows)
    return jax.vmap(_of_segments)(experience.batch.segments.reshape(rows), real).reshape(mask.shape)


def _of_segments(segments: Int[Array, "T"], x: Float[Array, "T"]) -> Float[Array, "T"]:
    return jnp.zeros(segments.shape[0] + 1, x.dtype).at[segments].add(x)[segments]


def update_metrics(
    experience: Experience | TokenExperience,
    log_probs: Float[Array, "*N T"],
    entropies: Float[Array, "*N T"],
    weight: dict[str, Array],
) -> dict[str, Array]:
    """How far the policy has moved since the rollout and how spread it is: means over the tokens of the whole batch."""
    old, mask, tokens = experience.log_probs, experience.mask, weight["tokens"]
    ratio = importance_ratio(log_probs, old, mask)
    return {
        "policy/entropy_avg": masked_sum(entropies, mask) / tokens,
        "policy/approxkl_avg": approx_kl(log_probs, old, mask, normalizer=tokens),
        "val/ratio": masked_sum(ratio, mask) / tokens,
        "val/ratio_err": masked_sum(jnp.abs(ratio - 1.0), mask) / tokens,
    }
