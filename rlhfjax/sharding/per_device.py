"""Attention on a mesh: every device runs the program on its own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from rlhfjax.sharding.rules import MESH_AXES, dividing


def by_rows_and_heads(mesh: Mesh) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Wraps f(query, key, value, segments, …) of arrays [B, T, heads, D] and then [B, T]; each device computes its part
    of B and of the heads.

    Tokens are gathered where the mesh splits them. Rows or heads that the mesh does not divide stay whole.
    """

    def wrapper(program: Callable[..., Array]) -> Callable[..., Array]:
        if mesh.size == 1:
            return program

        def attention(query: Array, key: Array, value: Array, *ids: Array) -> Array:
            rows = dividing(mesh, MESH_AXES["batch"], query.shape[0])
            heads = dividing(mesh, MESH_AXES["heads"], key.shape[2])
            split = PartitionSpec(rows, None, heads, None)
            specs = (split, split, split, *(PartitionSpec(rows, None) for _ in ids))
            # Pallas does not say over which axes what a kernel returns varies, so it can't be checked.
            spread = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
            return spread(query, key, value, *ids)

        return attention

    return wrapper
