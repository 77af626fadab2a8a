"""A model that no memory holds into a checkpoint: each array is read a layer at a time, and written before the next.

What `save_model` writes of the same numbers is the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.leaves import Leaves, Region, read, region_at
from rlhfjax.training.checkpoint.chunks import Layout, layout_of
from rlhfjax.training.checkpoint.models import write_model
from rlhfjax.training.checkpoint.writing import Piece
from rlhfjax.training.checkpoint.zarr import name_of
from rlhfjax.training.digests import Sums, leaf_name


def save_leaves(step_dir: Path, item: str, tree: Any, leaves: Leaves, dtype: str, meta: Mapping[str, Any]) -> None:
    """Save a model of this one process by itself, as `save_model` does; the most that is held is a layer of an array.

    `tree` has the shapes; its paths are those of `leaves`, of a scalar model's decoder with `decoder/` before them.
    Raises what reading raises; then `step_dir` is not there.
    """
    digests: dict[str, str] = {}

    def pieces() -> Iterator[Piece]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, sums = leaf_name(path), Sums()
            layout = layout_of(name, leaf.shape, str(np.dtype(dtype)), leaf.shape)
            for region in _layers(name, layout):
                held = read(leaves, name.removeprefix("decoder/"), region, layout.dtype)
                sums.add(held, layout.shape, [axis.start for axis in region])
                yield Piece(f"{item}/{name_of(name)}", layout, region, held)
                del held  # or it would lie beside the next layer
            digests[name] = sums.text(layout.dtype, layout.shape)

    write_model(step_dir, item, tree, meta, pieces(), lambda: digests)


def _layers(name: str, layout: Layout) -> Iterator[Region]:
    """What is held at a time, in whole files: layers, or all of an array that has none or is small."""
    rest = region_at(layout.shape)[1:]
    if "blocks/" not in name or not layout.shape or layout.chunk[0] > 1:
        yield region_at(layout.shape)
        return
    for start in range(0, layout.shape[0], layout.file[0]):
        yield slice(start, start + layout.file[0]), *rest
