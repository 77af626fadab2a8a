"""A model that no memory holds into a checkpoint: each array is read a layer at a time, and written before the next.

Orbax says what lies where, and describes it, as of any array; what `save_model` writes of the same numbers is the same.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from rlhfjax.leaves import MOST, Leaves, cut, inside, read, region_at
from rlhfjax.training.checkpoint.models import write_model
from rlhfjax.training.digests import Sums, leaf_name


def save_leaves(step_dir: Path, item: str, tree: Any, leaves: Leaves, dtype: str, meta: Mapping[str, Any]) -> None:
    """Save a model of this one process by itself, as `save_model` does; the most that is held is a layer of an array.

    `tree` has the shapes; its paths are those of `leaves`, of a scalar model's decoder with `decoder/` before them.
    Raises what reading raises; then `step_dir` is not there.
    """

    def streamed(path: Any, leaf: Any) -> _Streamed:
        name = leaf_name(path)
        return _Streamed(leaves, name.removeprefix("decoder/"), tuple(leaf.shape), np.dtype(dtype))

    arrays = jax.tree_util.tree_map_with_path(streamed, tree)
    registry = ocp.type_handlers.create_type_handler_registry((_Streamed, _Handler(deepcopy_host_arrays=False)))
    write_model(step_dir, item, arrays, meta, _digests, type_handler_registry=registry)


class _Streamed:
    """An array that is not read yet. What Orbax asks of one, and the digest of what was written."""

    def __init__(self, leaves: Leaves, path: str, shape: tuple[int, ...], dtype: np.dtype):
        self.leaves, self.path, self.shape, self.dtype = leaves, path, shape, dtype
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self.sums = Sums()

    def write_to(self, store: ts.TensorStore) -> None:
        """Layers, or all of an array whose chunks hold several."""
        chunk = [size or 1 for size in store.chunk_layout.write_chunk.shape or ()]
        lead = self.shape[:1] if self.path.startswith("blocks/") and chunk[:1] == [1] else ()
        for place in np.ndindex(*lead):
            layer = region_at(self.shape, place)
            held = read(self.leaves, self.path, layer, str(self.dtype))
            for part in cut(layer, chunk, MOST // self.dtype.itemsize):
                block = held[inside(layer, part)]
                store[part].write(block, can_reference_source_data_indefinitely=True).result()
                self.sums.add(block, self.shape, [axis.start for axis in part])
            del held, block  # or they would lie beside the next layer


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes one array after another: the next is not begun before the last of a layer is on its way to the disk."""

    def typestr(self) -> str:
        return "jax.Array"  # which it is to whoever reads it

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        value.write_to(ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result())


def _digests(arrays: Any) -> dict[str, str]:
    found = jax.tree_util.tree_leaves_with_path(arrays)
    return {leaf_name(path): leaf.sums.text(str(leaf.dtype), leaf.shape) for path, leaf in found}
