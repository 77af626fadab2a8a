"""Device meshes and one table of rules that lays every array out on them."""

from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.sharding.rules import (
    batch_shapes,
    batch_sharding,
    constrain_parts,
    local_rows,
    place_batch,
    place_share,
    put,
    replicated,
    row_shards,
    state_shapes,
    state_shardings,
)

__all__ = [
    "batch_shapes",
    "batch_sharding",
    "constrain_parts",
    "local_rows",
    "make_mesh",
    "place_batch",
    "place_share",
    "put",
    "replicated",
    "row_shards",
    "state_shapes",
    "state_shardings",
]
