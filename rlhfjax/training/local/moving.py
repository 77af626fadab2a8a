"""Regions of arrays that go from the devices of one process to those of another, over the devices' own network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.host_memory import on_device
from rlhfjax.training.local.layout import Layout, part_shape

MOST = 1 << 28  # bytes that a device receives at a time
Pairs = tuple[tuple[int, int], ...]


def on_the_host(part: jax.Array) -> np.ndarray:
    """A region in memory of its own: an array that is viewed could not be given to the next step."""
    found = np.asarray(part)
    [device] = part.devices()
    view = device.platform == "cpu" or part.sharding.memory_kind not in (None, "device")
    return found.copy() if view else found


def grouped(layout: Layout, names: Iterable[str]) -> Iterator[list[str]]:
    """Names of arrays in groups, of which a device holds about `MOST` bytes at most, or a single array."""
    group, size = [], 0
    for name in names:
        leaf = layout.leaves[name]
        own = int(np.prod(part_shape(leaf), dtype=np.int64)) * leaf.dtype.itemsize
        if group and size + own > MOST:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def pairs_of(layout: Layout, moves: Mapping[int, int]) -> Pairs:
    """Places in the line between which regions go: from all devices of a process to those of another."""
    places = {device: place for place, device in enumerate(layout.devices)}
    return tuple(
        (places[one], places[other])
        for sender, receiver in sorted(moves.items())
        for one, other in zip(layout.of(sender), layout.of(receiver), strict=True)
    )


def moved(line: Mesh, pairs: Pairs, arrays: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """Of each array the parts that the devices of this process receive, in their order; zeros where nothing comes.

    `arrays` are the parts that they give. All processes call this together.
    """
    whole = [_in_a_row(line, parts) for parts in arrays]
    received = _program(line, pairs)(*whole)
    places = {device: place for place, device in enumerate(line.devices.flat)}
    return [
        [shard.data for shard in sorted(array.addressable_shards, key=lambda shard: places[shard.device])]
        for array in received
    ]


def _in_a_row(line: Mesh, parts: Sequence[jax.Array]) -> jax.Array:
    """The parts of all devices as one array; nothing is copied."""
    shape = parts[0].shape
    layout = NamedSharding(line, PartitionSpec("line"), memory_kind=parts[0].sharding.memory_kind)
    rows = (line.size * shape[0], *shape[1:])
    return jax.make_array_from_single_device_arrays(rows, layout, list(parts))


@lru_cache
def _program(line: Mesh, pairs: Pairs) -> Any:
    place = PartitionSpec("line")

    @partial(jax.shard_map, mesh=line, in_specs=place, out_specs=place)
    def permuted(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.ppermute(array, "line", pairs) for array in arrays)

    return jax.jit(lambda *arrays: permuted(*on_device(arrays)))
