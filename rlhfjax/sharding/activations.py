"""Activations on a mesh, by the table in `rules.py` beside that of the parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.sharding.experts import by_experts
from rlhfjax.sharding.per_device import by_heads, by_rows_and_heads
from rlhfjax.sharding.rules import ACTIVATIONS, GATHERED, MESH_AXES, dividing, path_name, sampled_axes, state_shardings
from rlhfjax.sharding.vocabulary import PartOfWords, embedded, over_words


@dataclass(frozen=True)
class MeshLayout:
    """The layout (`rlhfjax.layout.Layout`) of programs on a mesh of several devices."""

    mesh: Mesh

    def axes(self, axis: str | None, size: int) -> str | tuple[str, ...] | None:
        """The mesh axes that split an axis of this name and size."""
        return dividing(self.mesh, MESH_AXES[axis], size)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """That of an array with axes of these names."""
        return NamedSharding(self.mesh, PartitionSpec(*map(self.axes, axes, shape)))

    def lay(self, name: str, x: jax.Array) -> jax.Array:
        """Raises ValueError for a name that the table lacks, or an array of another number of axes."""
        axes = ACTIVATIONS[name]
        if len(axes) != x.ndim:
            raise ValueError(f"layout: expected {len(axes)} axes of {name!r}, got the shape {x.shape}")
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def gathered(self, name: str, kernel: jax.Array) -> jax.Array:
        """Whole over `fsdp`, where XLA may not choose.

        Where tokens are fewer than a kernel is wide, it moves rows to where the kernel lies. Those that lie over `fsdp`
        and a second axis it then calls by other numbers, if `tensor` splits what comes out, and never moves them back
        (jax 0.10 to 0.12).
        """
        size = self.mesh.shape
        if name not in GATHERED or 1 in (size["fsdp"], size["tensor"], size["data"] * size["expert"]):
            return kernel
        return jax.lax.with_sharding_constraint(kernel, self.sharding(GATHERED[name], kernel.shape))

    def attention(self, program: Callable[..., Any], kernel: bool) -> Callable[..., Any]:
        return by_rows_and_heads(self.mesh, program) if kernel else by_heads(self.mesh, program)

    def parameters(self, tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, state_shardings(self.mesh, tree))

    def embedded(self, table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
        return embedded(self.mesh, table, tokens, dtype)

    def vocabulary(
        self, program: Callable[..., tuple], axis: int, outs: tuple[str, ...], table: Any, *rows: Any
    ) -> tuple:
        return over_words(self.mesh, program, axis, outs, table, *rows)

    def experts(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        return by_experts(self.mesh, forward, backward)

    def weights(self, params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, self.weight_shardings(params))

    def weight_shardings(self, params: Any) -> Any:
        """Those of parameters or of what sampling makes of them, or of their shapes."""

        def of(path: tuple, leaf: Any) -> NamedSharding:
            return self.sharding(sampled_axes(path_name(path), leaf.ndim), leaf.shape)

        return jax.tree_util.tree_map_with_path(of, params)

    def by_vocabulary(self, program: Callable[..., Any]) -> Callable[..., Any]:
        def split(logits: jax.Array, *others: jax.Array) -> Any:
            count, parts, rows = logits.shape[1], self.mesh.shape["tensor"], self.axes("batch", len(logits))
            size = -(-count // parts)
            padded = jnp.pad(logits, ((0, 0), (0, size * parts - count)), constant_values=-jnp.inf)
            words = PartOfWords(count, size, size * parts > count)
            specs = PartitionSpec(rows, "tensor"), *(PartitionSpec(rows) for _ in others)
            return self.spread(partial(program, words), specs, PartitionSpec(rows))(padded, *others)

        return split

    def cached(self, program: Callable[..., Any]) -> Callable[..., Any]:
        def split(query: jax.Array, key: jax.Array, value: jax.Array, caches: Any, layer: Any, *others: Any) -> Any:
            rows, heads = self.axes("batch", len(query)), self.axes("heads", key.shape[2])
            tokens = PartitionSpec(rows, None, heads, None)
            lie = jax.tree.map(lambda _: PartitionSpec(rows, None, None, heads), caches)
            ids = PartitionSpec(rows)
            specs = tokens, tokens, tokens, lie, PartitionSpec(), ids, ids, PartitionSpec(heads)
            return self.spread(program, specs, (tokens, lie))(query, key, value, caches, layer, *others)

        return split

    def spread(self, program: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`program` as every device computes it on its own parts."""
        # What loops and kernels vary over, jax can't tell.
        return jax.shard_map(program, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def layout_of(mesh: Mesh) -> MeshLayout | None:
    """The layout of programs on this mesh; one device has none."""
    return MeshLayout(mesh) if mesh.size > 1 else None
