"""A sampler whose caches are split over a mesh, around one that knows of none."""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.sharding.rules import MESH_AXES


def cache_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Rows over the axes of a batch, heads over tensor, each where it divides evenly.

    A decoder's arrays are [rows, heads, …], those of an encoder–decoder [layers, rows, slots, heads, …]; what has
    fewer axes begins with the rows.
    """
    axes: list[Any] = [None] * len(shape)
    rows, heads = {4: (0, 1), 5: (1, 3)}.get(len(shape), (0, None))
    if shape and shape[rows] % math.prod(mesh.shape[axis] for axis in MESH_AXES["batch"]) == 0:
        axes[rows] = MESH_AXES["batch"]
    if heads is not None and shape[heads] % mesh.shape["tensor"] == 0:
        axes[heads] = MESH_AXES["heads"]
    return PartitionSpec(*axes)


@dataclass(frozen=True)
class ShardedSampler:
    """The same functions; inside a compiled one, every cache lies on the mesh as `cache_spec` says.

    Weights that read the same input stay apart where heads are split: joined, each device would lack parts of its own.
    """

    model: Any
    mesh: Mesh

    def arrange(self, params: Any, rows: int | None = None) -> Any:
        apart = {"parts": 1, "fused": False} if self.mesh.shape["tensor"] > 1 else {}
        return self.model.arrange(params, rows, **apart)

    def empty_cache(self, rows: int, prompt: int, new_tokens: int) -> Any:
        return self._split(self.model.empty_cache(rows, prompt, new_tokens))

    def prefill(self, params: Any, prompt: Any, prompt_mask: Any, new_tokens: int) -> tuple[Any, Any]:
        return self._answer(self.model.prefill(params, prompt, prompt_mask, new_tokens))

    def start(self, params: Any, prompt: Any, prompt_mask: Any, new_tokens: int) -> tuple[Any, Any]:
        return self._answer(self.model.start(params, prompt, prompt_mask, new_tokens))

    def decode(self, params: Any, cache: Any, tokens: Any) -> tuple[Any, Any]:
        return self._answer(self.model.decode(params, cache, tokens))

    def extend(self, params: Any, cache: Any, tokens: Any, counts: Any) -> tuple[Any, Any]:
        return self._answer(self.model.extend(params, cache, tokens, counts))

    def unembed(self, params: Any, hidden: Any) -> Any:
        return self.model.unembed(params, hidden)

    def ahead(self, params: Any, hidden: Any) -> Any:
        return self.model.ahead(params, hidden)

    def _answer(self, made: tuple[Any, Any]) -> tuple[Any, Any]:
        return made[0], self._split(made[1])

    def _split(self, cache: Any) -> Any:
        def put(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, cache_spec(self.mesh, x.shape)))

        return jax.tree.map(put, cache)


def split_caches(mesh: Mesh, model: Any) -> Any:
    """The model as a sampler of this mesh; on one device, the model."""
    return ShardedSampler(model, mesh) if mesh.size > 1 else model
