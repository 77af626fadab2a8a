"""Groups of responses to one prompt, next to each other: which of them teach anything, and a batch of such ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.types import Rollout


def differing(scores: Float[Array, "B"], group: int, kept: Bool[Array, "G N"] | None = None) -> Bool[Array, "G"]:
    """Groups in which not all scores are the same: where they are, no response is better than another.

    Of a group only those count that are `kept`, if that is given.
    """
    scores = scores.reshape(-1, group)
    if kept is None:
        return (scores != scores[:, :1]).any(axis=1)
    lowest = jnp.where(kept, scores, jnp.inf).min(axis=1)
    return jnp.where(kept, scores, -jnp.inf).max(axis=1) > lowest


def chosen(informative: Bool[Array, "N"], count: int) -> Int[Array, "count"]:
    """Places of `count` groups of N: the first informative ones, and where these are too few the first of the others.

    Each kind keeps its order, so that a batch does not depend on what was drawn after it was full.
    """
    return jnp.argsort(~informative, stable=True)[:count].astype(jnp.int32)


def refilled(
    kept: Rollout, kept_informative: Bool[Array, "G"], new: Rollout, new_informative: Bool[Array, "G"]
) -> tuple[Rollout, Bool[Array, "G"]]:
    """As many groups as each rollout has, informative ones first and those of `kept` before those of `new`.

    Dynamic sampling (Yu et al. 2025, eq. 11) is this with a fresh rollout until all are informative. Both rollouts
    have the same shapes.
    """
    count = kept_informative.shape[0]
    informative = jnp.concatenate([kept_informative, new_informative])
    groups = chosen(informative, count)
    size = kept.finished.shape[0] // count
    rows = (groups[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None, :]).reshape(-1)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], kept, new)
    return both, informative[groups]
