"""One table: parameter path -> logical axes -> mesh axes, for parameters and optimizer moments alike."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.errors import ConfigError
from rlhfjax.host_memory import HOST, on_host
from rlhfjax.types import PromptBatch

MESH_AXES = {
    # Only feed-forward experts are split over `expert`; without rows of its own, a device of that axis would repeat
    # the attention of its neighbours.
    "batch": ("data", "fsdp", "expert"),
    "token": "sequence",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "residual": "tensor",
    "expert": "expert",
    "embed": "fsdp",
    # Rows of logits, each whole, where more devices than have rows of their own can share the work.
    "spread": ("data", "fsdp", "expert", "tensor"),
    None: None,
}

# First match on the end of the path wins. The first axis of everything inside `blocks` is the layer.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"positions/embedding", (None, "embed")),
    (r"unembed/kernel", ("embed", "vocab")),
    (r"unembed/rows", ("vocab", "embed")),
    (r"blocks/(cross_)?attention/(query|key|value)/kernel", (None, "embed", "heads", None)),
    (r"blocks/(cross_)?attention/(query|key|value)/bias", (None, "heads", None)),
    (r"blocks/(cross_)?attention/out/kernel", (None, "heads", None, "embed")),
    (r"blocks/mlp/(up|gate)/kernel", (None, "embed", "mlp")),
    (r"blocks/mlp/(up|gate)/bias", (None, "mlp")),
    (r"blocks/mlp/down/kernel", (None, "mlp", "embed")),
    (r"blocks/((cross_)?attention/out|mlp/down)/bias", (None, "embed")),
    (r"blocks/attention/sinks", (None, "heads")),
    (r"blocks/experts/router/kernel", (None, "embed", None)),
    (r"blocks/experts/router/bias", (None, None)),
    (r"blocks/experts/(up|gate)/bias", (None, "expert", "mlp")),
    (r"blocks/experts/down/bias", (None, "expert", "embed")),
    (r"blocks/experts/(up|gate)/kernel", (None, "expert", "embed", "mlp")),
    (r"blocks/experts/down/kernel", (None, "expert", "mlp", "embed")),
    (r"blocks/(attention|attention_post|cross_attention|mlp|mlp_post)_norm/(scale|bias)", (None, None)),
    (r"blocks/attention/(query|key)_norm/(scale|bias)", (None, None)),
    (r"final_norm/(scale|bias)", (None,)),
    (r"head/kernel", ("embed",)),
    (r"mtp_heads/(up|down)", (None, "embed", None)),
)

# Whole on every device: means of the rows and columns of a matrix in Adafactor, and the polynomial of Muon.
SMALL = (
    *(rf"v_(row|col)/(.*/)?{pattern}" for pattern, _ in RULES),
    r"v_(row|col)/(.*/)?(head/bias|.*/lora_(a|b))",
    r"ns_coeffs",
)


# What models name in a computation (`rlhfjax.layout.lay`).
ACTIVATIONS: dict[str, tuple[str | None, ...]] = {
    "residual": ("batch", "token", "residual"),  # what layers hand on and remat keeps
    "inputs": ("batch", "token", None),  # what the products of a layer read
    "heads": ("batch", "token", "heads", None),
    "logits": ("batch", "vocab"),
    "whole_logits": ("spread", None),
    # Of a sampler: what there is of each row, the cache of a layer, of the stack of layers, of an encoder–decoder.
    "rows": ("batch",),
    "ids": ("batch", None),
    "cache": ("batch", "heads", None, None),
    "caches": ("batch", None, None, "heads", None),
    "routes": ("batch", None, None, None),
    "cross_cache": (None, "batch", None, "heads", None),
}

# Kernels whose products come out split over `tensor`, gathered over `fsdp`.
GATHERED: dict[str, tuple[str | None, ...]] = {"out": ("heads", None, None), "down": ("mlp", None)}


def named(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes as an entry of a partition has them, one by one."""
    return (axes,) if isinstance(axes, str) else axes or ()


def dividing(mesh: Mesh, axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
    """These mesh axes, if together they divide a size."""
    return axes if size % math.prod(mesh.shape[name] for name in named(axes)) == 0 else None


# Fields of a training state that only an update reads.
_KEPT_BESIDE = re.compile(r"(^|/)(optimizer|average)/")


def path_name(path: tuple) -> str:
    """A key path of a pytree as 'a/b/c'."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def spec_of(name: str, ndim: int) -> PartitionSpec:
    """The partition of one leaf. Scalars (counters, coefficients) are replicated.

    Raises ConfigError when no rule matches: an unsharded copy on every device would be a silent waste.
    """
    if ndim == 0 or any(_matches(pattern, name) for pattern in SMALL):
        return PartitionSpec()
    if ndim == 1 and "/v/" in name and _factored(name):
        return PartitionSpec()
    if name.endswith(("/lora_a", "/lora_b")):
        return _adapter_spec(name, ndim)
    for pattern, axes in RULES:
        if len(axes) == ndim and _matches(pattern, name):
            return PartitionSpec(*(MESH_AXES[axis] for axis in axes))
    raise ConfigError(f"sharding: no rule for parameter {name!r} with {ndim} axes; add one to the table of rules")


def sampled_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The logical axes of a leaf of what sampling makes of parameters; or of parameters themselves.

    A layer may stand by itself, without the first axis of a stack. Scales of integers lie as these do, adapters of
    integers are whole. Raises ConfigError when no rule matches.
    """
    name = re.sub(r"(^|/)layers(/\d+)?/", r"\1blocks/", name)
    name = re.sub(r"(kernel|embedding)_scale$", r"\1", re.sub(r"(unembed/(kernel|rows))/\d+$", r"\1", name))
    if name.endswith(("/lora_a", "/lora_b", "head/bias", "unembed/scale")):
        return (None,) * ndim
    for pattern, axes in RULES:
        alone = axes[1:] if pattern.startswith("blocks/") else axes
        if _matches(pattern, name) and ndim in (len(axes), len(alone)):
            return axes if len(axes) == ndim else alone
    raise ConfigError(f"sharding: no rule for what samples {name!r} with {ndim} axes; add one to the table of rules")


def _matches(pattern: str, name: str) -> bool:
    return re.search(f"(^|/){pattern}$", name) is not None


def _factored(name: str) -> bool:
    """Whether a vector under this name is no parameter: Adafactor leaves one number where it factors a moment."""
    matrices = (pattern for pattern, axes in RULES if len(axes) > 1)
    return name.endswith(("/lora_a", "/lora_b")) or any(_matches(pattern, name) for pattern in matrices)


def _adapter_spec(name: str, ndim: int) -> PartitionSpec:
    """Adapters lie as their kernel does: `lora_a` by its input axes, `lora_b` by its output axes, the rank whole."""
    linear, leaf = name.rsplit("/", 1)
    for pattern, axes in RULES:
        if len(axes) >= ndim and re.search(f"(^|/){pattern}$", f"{linear}/kernel"):
            lead = axes[: axes[0] is None]  # the layer
            inputs, outputs = axes[len(lead) : ndim - 1], axes[len(axes) - (ndim - 1 - len(lead)) :]
            chosen = (*lead, *inputs, None) if leaf == "lora_a" else (*lead, None, *outputs)
            return PartitionSpec(*(MESH_AXES[axis] for axis in chosen))
    raise ConfigError(f"sharding: no rule for parameter {name!r} with {ndim} axes; add its kernel to the rules")


def state_shardings(mesh: Mesh, shapes: Any, offload: bool = False) -> Any:
    """Shardings for a tree of arrays or shapes: parameters, or a training state that holds them.

    Moments and averages are split over `data` as well, since an update reads and writes each of their numbers once.
    With `offload` they lie in the host's memory; what lies there already stays.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        layout = NamedSharding(mesh, _fitted(mesh, name, tuple(leaf.shape)))
        kept = offload and leaf.ndim and _KEPT_BESIDE.search(name)
        return layout.with_memory_kind(HOST) if kept or on_host(leaf) else layout

    return jax.tree_util.tree_map_with_path(of, shapes)


def _fitted(mesh: Mesh, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of a leaf by its rule, where the mesh divides it.

    Heads that `tensor` does not divide lie whole on its devices, which share them; of a table of words the width is
    split in their place.
    """
    axes = [named(entry) for entry in spec_of(name, len(shape))]
    axes += [()] * (len(shape) - len(axes))
    for place, size in enumerate(shape):
        if size % _devices(mesh, axes[place]):
            homeless, axes[place] = axes[place], ()
            other = next((i for i, own in enumerate(axes) if own and i != place), None)
            if len(shape) == 2 and other is not None and shape[other] % _devices(mesh, axes[other] + homeless) == 0:
                axes[other] += homeless
    if _KEPT_BESIDE.search(name) and "data" not in sum(axes, ()) and mesh.shape["data"] > 1:
        for place, size in enumerate(shape):
            if axes[place] and size % _devices(mesh, (*axes[place], "data")) == 0:
                axes[place] += ("data",)
                break
    while axes and not axes[-1] and len(axes) > len(spec_of(name, len(shape))):
        axes.pop()
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in axes))


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def state_shapes(mesh: Mesh, shapes: Any, offload: bool = False) -> Any:
    """A tree of shapes with their layouts: what `state_shardings` would lay out."""
    return jax.tree.map(_shape, shapes, state_shardings(mesh, shapes, offload))


def _shape(leaf: Any, layout: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


TOKEN_AXIS_LAST = {"tokens", "segments", "positions", "loss_mask", "token_mask"}  # batch fields for `sequence`


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """A host batch on the mesh: rows over data, fsdp and expert, the tokens of offline batches over sequence.

    Prompts stay whole: sampling appends to them one token at a time.
    """
    return _laid_out(mesh, batch, put)


def batch_shapes(mesh: Mesh, batch: Any) -> Any:
    """The shapes of a whole batch with the layouts that `place_batch` gives it."""
    return _laid_out(mesh, batch, _shape)


def place_share(mesh: Mesh, share: Any) -> Any:
    """The same for a batch of which every process has only the rows that its devices hold, as `local_rows` says."""
    if not mesh.is_multi_process:
        return place_batch(mesh, share)
    have = jax.tree.leaves(share)[0].shape[0]
    size = have * row_shards(mesh) // len(_local_parts(mesh, row_shards(mesh)))
    rows = local_rows(mesh, size)

    def put_share(leaf: Any, layout: NamedSharding) -> jax.Array:
        def part(index: Any) -> Any:
            first, last, _ = index[0].indices(size)
            return leaf[(np.searchsorted(rows, np.arange(first, last)), *index[1:])]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), layout, part)

    return _laid_out(mesh, share, put_share)


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` the devices of this process hold, in order."""
    return np.unique(np.concatenate([np.arange(size)[first:last] for first, last in _local_parts(mesh, size)]))


def _local_parts(mesh: Mesh, size: int) -> set[tuple[int, int]]:
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return {part[0].indices(size)[:2] for part in parts if part}


def _laid_out(mesh: Mesh, batch: Any, put_leaf: Callable[[Any, NamedSharding], Any]) -> Any:
    split_tokens = not isinstance(batch, PromptBatch)

    def lay(path: tuple, leaf: Any) -> Any:
        axes: list[Any] = [MESH_AXES["batch"]] + [None] * (leaf.ndim - 1)
        if split_tokens and leaf.ndim > 1 and path_name(path) in TOKEN_AXIS_LAST:
            axes[-1] = MESH_AXES["token"]
        return put_leaf(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(lay, batch)


def put(leaf: Any, layout: NamedSharding) -> jax.Array:
    """An array that every process has whole, laid out; each puts what its own devices hold."""
    if layout.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, layout)
    return jax.make_array_from_callback(leaf.shape, layout, lambda index: leaf[index])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Whole sequences, split over the first axis: rollouts and experience."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: metrics and coefficients."""
    return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
    """How many devices share the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in MESH_AXES["batch"])


def constrain_parts(mesh: Mesh, tree: Any) -> Any:
    """Inside a compiled function: arrays [parts, rows, …] with the rows of each part split over the devices."""
    layout = NamedSharding(mesh, PartitionSpec(None, MESH_AXES["batch"]))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, layout), tree)
