"""What the devices of each process hold of a state: regions of its arrays."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhfjax.training.digests import leaf_name

Start = tuple[int, ...]  # where a region begins; all regions of an array have one shape
Key = tuple[str, Start]  # an array by its name, and a region of it


def leaves_of(items: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, or shapes, of some trees by their paths."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(items))}


@dataclass(frozen=True, eq=False)
class Layout:
    """Of every array its shape and where it lies, the same in all processes."""

    leaves: Mapping[str, Any]

    @cached_property
    def devices(self) -> list[Any]:
        """All devices, those of a process together and in the order of their numbers."""
        found = {device for leaf in self.leaves.values() for device in leaf.sharding.device_set}
        return sorted(found, key=lambda device: (device.process_index, device.id))

    @cached_property
    def line(self) -> Mesh:
        """The devices in a row."""
        return Mesh(np.array(self.devices), ("line",))

    @cached_property
    def processes(self) -> list[int]:
        """The processes that have devices."""
        return sorted({device.process_index for device in self.devices})

    def of(self, process: int) -> list[Any]:
        """The devices of a process."""
        return [device for device in self.devices if device.process_index == process]

    @cached_property
    def _starts(self) -> dict[str, dict[Any, Start]]:
        return {name: _starts(leaf) for name, leaf in self.leaves.items()}

    def starts(self, name: str, process: int) -> list[Start]:
        """Where the region of each device of a process begins in an array; nothing of one that lies elsewhere."""
        starts = self._starts[name]
        return [starts[device] for device in self.of(process) if device in starts]

    def keys(self, process: int) -> list[Key]:
        """The regions that a process holds, each once."""
        return [(name, start) for name in self.leaves for start in dict.fromkeys(self.starts(name, process))]

    @cached_property
    def told(self) -> str:
        """Processes and mesh, for people."""
        shapes = {tuple(leaf.sharding.mesh.shape.items()) for leaf in self.leaves.values() if _named(leaf)}
        axes = [" x ".join(f"{axis} {size}" for axis, size in shape if size > 1) or "1" for shape in sorted(shapes)]
        return f"processes {len(self.processes)}, devices {len(self.devices)}, mesh {' and '.join(axes)}"

    @cached_property
    def digests(self) -> dict[int, str]:
        """By process a digest of all that it holds: processes with the same one hold the same."""
        return {process: self._digest(process) for process in self.processes}

    def _digest(self, process: int) -> str:
        digest = hashlib.sha256(self.told.encode())
        for name, leaf in self.leaves.items():
            starts = sorted(set(self.starts(name, process)))
            digest.update(f"{name} {leaf.dtype}{list(leaf.shape)} {part_shape(leaf)} {starts}\n".encode())
        return digest.hexdigest()


def layout_of(leaves: Mapping[str, Any]) -> Layout:
    """The layout of some arrays, or shapes: found once, since a state lies where it lay at the step before."""
    return _known(tuple((name, _shape_of(leaf)) for name, leaf in leaves.items()))


@lru_cache(maxsize=8)
def _known(leaves: tuple[tuple[str, Any], ...]) -> Layout:
    return Layout(dict(leaves))


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@lru_cache(maxsize=8)
def travelling(layout: Layout, shift: int) -> list[str]:
    """Arrays of which some process lacks what the one `shift` places before it holds."""
    all_, count = layout.processes, len(layout.processes)
    pairs = [(all_[(i - shift) % count], process) for i, process in enumerate(all_)]
    return [
        name
        for name in layout.leaves
        if any(set(layout.starts(name, before)) - set(layout.starts(name, process)) for before, process in pairs)
    ]


def part_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of each device's region."""
    return tuple(leaf.sharding.shard_shape(tuple(leaf.shape)))


def _starts(leaf: Any) -> dict[Any, Start]:
    places = leaf.sharding.devices_indices_map(tuple(leaf.shape))
    return {device: tuple(part.start or 0 for part in index) for device, index in places.items()}


def _named(leaf: Any) -> bool:
    return isinstance(leaf.sharding, jax.sharding.NamedSharding)


def placed(leaf: Any, blocks: Sequence[np.ndarray], devices: Sequence[Any]) -> jax.Array:
    """An array of the shape and layout of `leaf`, of the regions of the devices that are here."""
    kind = leaf.sharding.memory_kind
    places = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for device in devices]
    # Copies, since programs write over what they are given.
    parts = jax.device_put(list(blocks), places, may_alias=False)
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), leaf.sharding, parts)
