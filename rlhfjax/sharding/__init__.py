"""Device meshes and one table of rules that lays every array out on them."""

from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.sharding.rules import batch_sharding, place_batch, replicated, state_shardings

__all__ = ["batch_sharding", "make_mesh", "place_batch", "replicated", "state_shardings"]
