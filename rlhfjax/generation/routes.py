"""The experts that tokens were sent to while they were sampled, beside their responses."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhfjax.types import Rollout


def routes_of(cache: Any) -> Int[Array, "B S L K"] | None:
    """What a model's cache knows of them, by slot; None where it keeps nothing."""
    known = getattr(cache, "routes", None)
    if known is None:
        return None
    read = jnp.arange(known.shape[1], dtype=jnp.int32)[None, :] < cache.lengths[:, None]
    return jnp.where(read[:, :, None, None], known, -1)


def joined(
    routes: Int[Array, "B S L K"], prompt: Bool[Array, "B P"], response: Bool[Array, "B R"]
) -> Int[Array, "B J L K"]:
    """Those of left-padded prompts and their responses, J = P + R, of caches without padding; -1 on padding."""
    mask = jnp.concatenate([prompt, response], axis=1)
    before = prompt.shape[1] - prompt.sum(axis=1, dtype=jnp.int32)
    slot = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :] - before[:, None]
    slot = jnp.clip(slot, 0, routes.shape[1] - 1)
    return jnp.where(mask[:, :, None, None], jnp.take_along_axis(routes, slot[:, :, None, None], axis=1), -1)


def with_routes(rollout: Rollout, routes: Int[Array, "B S L K"] | None) -> Rollout:
    """The rollout and those of its tokens, where they were kept."""
    if routes is None:
        return rollout
    return replace(rollout, routes=joined(routes, rollout.prompt_mask, rollout.response_mask))
