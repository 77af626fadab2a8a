"""The moving average of parameters that a stage hands on in their place."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.types import Params, TrainState


@dataclass(frozen=True)
class Average:
    """The moving average that a stage keeps: its decay, and of which part of what is trained it is."""

    decay: float
    of: Callable[[Params], Params] = lambda params: params


def newest_weight(decay: float, count: Int[Array, ""] | int) -> Float[Array, ""]:
    """What the newest of `count` parameters weighs: (1 - d) / (1 - d^count), so 1 for the first."""
    log_decay = math.log(decay) if decay else -math.inf
    weight = (1.0 - decay) / -jnp.expm1(jnp.asarray(count, jnp.float32) * log_decay)  # 1 - d^n would cancel
    return jnp.where(jnp.asarray(count) > 1, weight, 1.0)


def moved_average(average: Params, params: Params, decay: float, count: Int[Array, ""] | int) -> Params:
    """The average after update `count`: Σ d^(count - i) p_i / Σ d^(count - i) over i = 1 … count.

    The weights that training began with have no share in it, however few updates there were (the correction of Kingma
    & Ba 2015, section 3, for an average of parameters). `average` is that after the update before; before the first it
    does not matter.
    """
    weight = newest_weight(decay, count)

    def moved(old: Array, new: Array) -> Array:
        return (weight * new.astype(jnp.float32) + (1.0 - weight) * old.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(moved, average, params)


def handed_on(state: TrainState) -> Any:
    """What a stage hands on of a state, and what it measures on held-out data: the average where one is kept."""
    return state.params if state.average is None else state.average
