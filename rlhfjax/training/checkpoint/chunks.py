"""How arrays are cut where they are stored. What is read of one is whole chunks, so none is of more than one layer."""

import math
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhfjax.leaves import MOST
from rlhfjax.training.digests import leaf_name


def chunks_of(tree: Any, smallest: int = MOST) -> Any:
    """What Orbax is to do with each array of a tree: chunks of 1/64 of it, but of `smallest` to `MOST` bytes.

    Smaller arrays are written as they lie on the devices, larger ones by layer.
    """

    def chunks(path: Any, leaf: Any) -> ocp.SaveArgs:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        most = min(max(size // 64, smallest), MOST)
        by_layer = size > MOST and "blocks" in leaf_name(path).split("/")
        return ocp.SaveArgs(chunk_byte_size=most, shard_axes=(0,) if by_layer else ())

    return jax.tree_util.tree_map_with_path(chunks, tree)
