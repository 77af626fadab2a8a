"""Training states: created, saved and restored in their shardings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhfjax.sharding import state_shapes, state_shardings
from rlhfjax.types import Params, TrainState


def init_state(
    mesh: Mesh,
    params: Params,
    optimizer: optax.GradientTransformation,
    average_of: Callable | None = None,
    offload: bool = False,
) -> TrainState:
    """A fresh training state around `params`; `average_of(params)` picks what the moving average follows, if any.

    With `offload` moments and average lie in the host's memory.
    """

    build = partial(_fresh, optimizer, average_of)
    shardings = state_shardings(mesh, jax.eval_shape(build, params), offload)
    # Donation is off: the parameters often come from a model that is still needed (the reference).
    return jax.jit(build, out_shardings=shardings)(params)


def init_state_shapes(
    mesh: Mesh,
    params: Params,
    optimizer: optax.GradientTransformation,
    average_of: Callable | None = None,
    offload: bool = False,
) -> TrainState:
    """The shapes and layouts of that state; `params` may be of shapes."""
    return state_shapes(mesh, jax.eval_shape(partial(_fresh, optimizer, average_of), params), offload)


def _fresh(optimizer: optax.GradientTransformation, average_of: Callable | None, params: Params) -> TrainState:
    average = None if average_of is None else average_of(params)
    return TrainState(params, optimizer.init(params), jnp.int32(0), average)


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def born(mesh: Mesh, make: Callable[..., Params], *arguments: Any) -> Params:
    """`make(*arguments)`, each parameter made where the rules table lays it: none is whole on a device before."""
    layout = state_shardings(mesh, jax.eval_shape(make, *arguments))
    return jax.jit(make, out_shardings=layout)(*arguments)
