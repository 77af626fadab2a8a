"""How arrays are cut where they are stored.

What is read of one is whole chunks, and another mesh cuts arrays elsewhere. So heads and experts lie apart, and
matrices in pieces that are as high as wide, up to sixteen on the shorter side. Each chunk costs time, so that small
arrays are cut less, and layers, which no mesh cuts, lie together but in arrays that are read by layer.
"""

import math
import re
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhfjax.leaves import MOST  # bytes of an array, from which on no chunk holds more than one layer
from rlhfjax.training.digests import leaf_name

WHOLE = 1 << 18  # bytes of an array up to which it is written as it lies on the devices
LEAST, WANTED, LARGEST = 1 << 16, 1 << 17, 1 << 22  # bytes of a chunk
_HEADS = ((r"attention/out/kernel$", 1), (r"attention/(query|key|value)/kernel$", 2))
_EXPERTS = (r"/experts/(up|gate|down)/kernel$", 1)


def chunks_of(tree: Any) -> Any:
    """What Orbax is to do with each array of a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _chunks(leaf_name(path), leaf), tree)


def _chunks(name: str, leaf: Any) -> ocp.SaveArgs:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if size <= min(WHOLE, MOST):
        return ocp.SaveArgs()
    together, apart = [], []  # axes that no chunk cuts, and those of which each holds one
    if re.search(r"(^|/)blocks/", name):
        (apart if size > MOST else together).append(0)
    for pattern, axis in (*_HEADS, _EXPERTS):
        if re.search(pattern, name) and axis < len(leaf.shape):
            together += [axis + 1] if pattern != _EXPERTS[0] else []  # the width of a head
            apart.append(axis)
    each = math.prod(leaf.shape[axis] for axis in together) * leaf.dtype.itemsize
    sides = sorted(part for axis, part in enumerate(leaf.shape) if axis not in (*together, *apart)) or [1]
    for pieces in (16, 8, 4):
        side = max(sides[0] // pieces, 1)
        most = each * side * (min(side, sides[-1]) if len(sides) > 1 else 1)
        if most >= WANTED:
            break
    return ocp.SaveArgs(chunk_byte_size=min(max(most, LEAST), LARGEST, MOST), shard_axes=tuple(sorted(apart)))
