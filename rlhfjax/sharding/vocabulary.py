"""Logits on a mesh: every device has its own rows, and the words of its place on the axis of the vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from rlhfjax.sharding.rules import MESH_AXES, dividing, named

_WORDS, _WIDTH = "tensor", "fsdp"  # the axes of `vocab` and `embed`


@dataclass(frozen=True)
class PartOfWords:
    """`rlhfjax.layout.Words` inside `shard_map`, in `size` equal parts."""

    count: int
    size: int
    padded: bool

    @property
    def first(self) -> Array:
        return jax.lax.axis_index(_WORDS) * self.size

    def summed(self, x: Any) -> Any:
        return jax.lax.psum(x, _WORDS)

    def largest(self, x: Array) -> Array:
        return jax.lax.pmax(x, _WORDS)

    def likeliest(self, logits: Array) -> Array:
        if self.padded:
            ids = self.first + jnp.arange(self.size, dtype=jnp.int32)
            logits = jnp.where(ids < self.count, logits, -jnp.inf)
        top, place = logits.max(axis=-1), self.first + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.lax.pmin(jnp.where(top == self.largest(top), place, self.count), _WORDS)


def over_words(
    mesh: Mesh, program: Callable[..., tuple], axis: int, outs: tuple[str, ...], table: Array, *rows: Array
) -> tuple:
    """`Layout.vocabulary` on a mesh.

    The table is gathered over the axis that splits its width, once; a sum like it is scattered there again.
    """
    count, parts, other = table.shape[axis], mesh.shape[_WORDS], 1 - axis
    size = -(-count // parts)
    if padding := size * parts - count:
        table = jnp.pad(table, [(0, padding if i == axis else 0) for i in range(2)])
    split = dividing(mesh, MESH_AXES["batch"], rows[0].shape[0]), dividing(mesh, MESH_AXES["token"], rows[0].shape[1])
    apart = [name for axes in split for name in named(axes)]  # the axes on which rows differ
    width = dividing(mesh, _WIDTH, table.shape[other]) if mesh.shape[_WIDTH] > 1 else None
    matrix = PartitionSpec(*((_WORDS, width) if axis == 0 else (width, _WORDS)))
    specs = {"rows": PartitionSpec(*split), "table": matrix, "number": PartitionSpec()}

    def local(table: Array, *rows: Array) -> tuple:
        whole = jax.lax.all_gather(table, width, axis=other, tiled=True) if width else table
        made = program(PartOfWords(count, size, padding > 0), whole, *rows)
        # The sum of a table's gradient is float32 and as large as all words of a device: it is reduced before the
        # backward pass that reads the rows begins, and not kept until that ends. And libtpu's pass that moves sums out
        # of a loop over parts ends with an error at these (0.0.52).
        return jax.lax.optimization_barrier(tuple(summed(kind, x) for kind, x in zip(outs, made, strict=True)))

    def summed(kind: str, x: Array) -> Array:
        if kind == "rows":
            return x
        axes = list(apart)
        if kind == "table":
            x = x.astype(table.dtype)
            if width and width in axes:
                axes.remove(width)
                x = jax.lax.psum_scatter(x, width, scatter_dimension=other, tiled=True)
            elif width:
                part = x.shape[other] // mesh.shape[width]
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(width) * part, part, other)
        return jax.lax.psum(x, axes) if axes else x

    made = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(matrix, *(specs["rows"] for _ in rows)),
        out_specs=tuple(specs[kind] for kind in outs),
        check_vma=False,  # what a loop over chunks varies over, jax can't tell
    )(table, *rows)
    if padding:
        real = [slice(count) if i == axis else slice(None) for i in range(2)]
        made = tuple(x[tuple(real)] if kind == "table" else x for kind, x in zip(outs, made, strict=True))
    return made


def embedded(mesh: Mesh, table: Array, tokens: Array, dtype: Any) -> Array:
    """`Layout.embedded` on a mesh.

    Every device looks up the tokens of all devices along the axis that splits the width, in its part of both; then each
    gets its own rows of the whole width. So no table is gathered, and its gradient is added up where it lies.
    """
    split = dividing(mesh, MESH_AXES["batch"], tokens.shape[0]), dividing(mesh, MESH_AXES["token"], tokens.shape[1])
    parts, width = mesh.shape[_WORDS], mesh.shape[_WIDTH]
    if split[0] is None or table.shape[0] % parts or table.shape[1] % width:
        return table[tokens].astype(dtype)
    scattered = _WORDS if table.shape[1] % parts == 0 else None

    def local(table: Array, tokens: Array) -> Array:
        mine = jax.lax.all_gather(tokens, _WIDTH, axis=0, tiled=True)
        place = mine - jax.lax.axis_index(_WORDS) * table.shape[0]
        here = (place >= 0) & (place < table.shape[0])
        x = jnp.where(here[..., None], table[jnp.where(here, place, 0)], 0.0).astype(dtype)
        x = jax.lax.all_to_all(x, _WIDTH, split_axis=0, concat_axis=2, tiled=True)
        return (
            jax.lax.psum_scatter(x, _WORDS, scatter_dimension=2, tiled=True) if scattered else jax.lax.psum(x, _WORDS)
        )

    rows = PartitionSpec(*split)
    specs = {"in_specs": (PartitionSpec(_WORDS, _WIDTH), rows), "out_specs": PartitionSpec(*split, scattered)}
    return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(table, tokens)
