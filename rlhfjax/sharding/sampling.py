"""Where things lie while a program samples: another layout than that of training, set around what is traced for it.

A token is one row's, and a step reads every weight. So weights are split over `tensor` and `expert` alone, and nothing
has to be gathered for a token; all other axes split rows, and `sequence` does, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from rlhfjax.layout import laid_out_on
from rlhfjax.sharding.activations import MeshLayout
from rlhfjax.sharding.per_device import repeated
from rlhfjax.sharding.rules import MESH_AXES, dividing

_ROWS = ("data", "fsdp", "sequence", "expert")
_AXES = MESH_AXES | {"batch": _ROWS, "spread": (*_ROWS, "tensor"), "token": None, "embed": None, "residual": None}


@dataclass(frozen=True)
class SamplingLayout(MeshLayout):
    """The layout of programs that sample on a mesh; rows are split over as many of their axes as divide them."""

    def axes(self, axis: str | None, size: int) -> str | tuple[str, ...] | None:
        if axis not in ("batch", "spread"):
            return dividing(self.mesh, _AXES[axis], size)
        taken: tuple[str, ...] = ()
        for name in _AXES[axis] or ():
            if self.mesh.shape[name] > 1 and dividing(self.mesh, (*taken, name), size):
                taken = (*taken, name)
        return taken or None

    def attention(self, program: Callable[..., Any], kernel: bool) -> Callable[..., Any]:
        """Rows and heads lie as a program wants them, and tokens are whole."""
        if not kernel:
            return program

        def attention(query: jax.Array, key: jax.Array, value: jax.Array, *others: jax.Array) -> Any:
            shards, heads = self.mesh.shape["tensor"], self.axes("heads", query.shape[2])
            if heads:
                key, value = (repeated(x, math.lcm(x.shape[2], shards)) for x in (key, value))
            rows = self.axes("batch", query.shape[0])
            split = PartitionSpec(rows, None, heads, None)
            specs = split, split, split, *(PartitionSpec(*(rows,)[: x.ndim]) for x in others)
            return self.spread(program, specs, split)(query, key, value, *others)

        return attention


def sampling_layout(mesh: Mesh) -> SamplingLayout | None:
    """The layout of programs that sample on this mesh; one device has none."""
    return SamplingLayout(mesh) if mesh.size > 1 else None


def sampling_shards(mesh: Mesh) -> int:
    """How many devices share the rows that are sampled, where their number divides by it."""
    return math.prod(mesh.shape[axis] for axis in _ROWS)


def sampling_on(mesh: Mesh, program: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is traced for sampling on this mesh, whatever layout is set around it."""
    return laid_out_on(sampling_layout(mesh), program)
