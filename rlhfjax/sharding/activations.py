"""Activations on a mesh, by the table in `rules.py` beside that of the parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.sharding.experts import by_experts
from rlhfjax.sharding.per_device import by_heads, by_rows_and_heads
from rlhfjax.sharding.rules import ACTIVATIONS, MESH_AXES, dividing
from rlhfjax.sharding.vocabulary import embedded, over_words


@dataclass(frozen=True)
class MeshLayout:
    """The layout (`rlhfjax.layout.Layout`) of programs on a mesh of several devices."""

    mesh: Mesh

    def lay(self, name: str, x: jax.Array) -> jax.Array:
        """Raises ValueError for a name that the table lacks, or an array of another number of axes."""
        axes = ACTIVATIONS[name]
        if len(axes) != x.ndim:
            raise ValueError(f"layout: expected {len(axes)} axes of {name!r}, got the shape {x.shape}")
        sizes = zip(axes, x.shape, strict=True)
        spec = PartitionSpec(*(dividing(self.mesh, MESH_AXES[axis], size) for axis, size in sizes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def attention(self, program: Callable[..., Any], kernel: bool) -> Callable[..., Any]:
        return by_rows_and_heads(self.mesh, program) if kernel else by_heads(self.mesh, program)

    def embedded(self, table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
        return embedded(self.mesh, table, tokens, dtype)

    def vocabulary(
        self, program: Callable[..., tuple], axis: int, outs: tuple[str, ...], table: Any, *rows: Any
    ) -> tuple:
        return over_words(self.mesh, program, axis, outs, table, *rows)

    def experts(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        return by_experts(self.mesh, forward, backward)


def layout_of(mesh: Mesh) -> MeshLayout | None:
    """The layout of programs on this mesh; one device has none."""
    return MeshLayout(mesh) if mesh.size > 1 else None
