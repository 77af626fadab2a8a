"""Arrays of an item, read once, each process only what its devices hold.

What Orbax wrote is read by tensorstore itself, in blocks, of which few are under way at a time. Arrays come to their
devices one after the other, and the host keeps no copy.
"""

import ctypes
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from rlhfjax.leaves import Region, cut, empty, inside, shape_of
from rlhfjax.training.digests import digest_here, leaf_name

_BLOCK, _UNDER_WAY = 1 << 24, 1 << 26  # bytes
_SMALL, _ALIGNED = 1 << 16, 64  # bytes
# The nodes of Orbax's database are needed for each chunk, so they are kept; chunks are needed once. Few are decoded at
# a time, so that memory is bounded by blocks and not by threads.
_SETTINGS = {
    "cache_pool": {"total_bytes_limit": 0},
    "cache_pool#ocdbt": {"total_bytes_limit": 1 << 24},
    "data_copy_concurrency": {"limit": 4},
    "file_io_concurrency": {"limit": 4},
}
_FROM_0 = ts.d[:].translate_to[0]


def stored_names(folder: Path) -> set[str]:
    """The names of the arrays that an item has."""
    end = "/.zarray"
    if (folder / "manifest.ocdbt").exists():
        keys = ts.KvStore.open(_database(folder.absolute()), context=_context(folder)).result().list().result()
        return {key.decode().removesuffix(end) for key in keys if key.endswith(end.encode())}
    return {path.name for path in folder.iterdir() if (path / ".zarray").exists()}


def stored_array(folder: Path, path: str) -> ts.TensorStore:
    """An array by its path in the tree; raises ValueError or OSError where it cannot be opened."""
    folder, name = folder.absolute(), name_of(path)
    store = {"driver": "file", "path": f"{folder}/{name}/"}
    if (folder / "manifest.ocdbt").exists():
        store = _database(folder) | {"path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": store}, context=_context(folder), read=True, open=True).result()


def _context(folder: Path) -> ts.Context:
    """One for each database: of a step that was saved again nothing is left of the one that had its name before."""
    found = os.stat(folder)
    return _contexts(f"{folder.absolute()}", found.st_ino, found.st_ctime_ns)


@lru_cache(maxsize=4)
def _contexts(*_: Any) -> ts.Context:
    return ts.Context(_SETTINGS)


def name_of(path: str) -> str:
    """What Orbax calls the array of a path."""
    return path.replace("/", ".")


def _database(folder: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "ocdbt", "base": base, "cache_pool": "cache_pool#ocdbt"}


def read_tree(folder: Path, target: Any, stored: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """The arrays of an item as `target` has them: shapes, types and shardings. No other process is waited for.

    Also the digests of those that the host holds, in the types that they are `stored` in. Raises ValueError where
    arrays are missing or have other shapes, and whatever tensorstore raises of files that it cannot read.
    """
    named = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(target)]
    if different := sorted(stored_names(folder) ^ {name_of(path) for path, _ in named}):
        raise ValueError(f"expected the arrays of this model or stage, got others: {', '.join(different[:3])}")
    leaves, digests = [], {}
    for path, leaf in _arrays(folder, named):
        leaves.append(leaf)
        if path in stored and (digest := digest_here(leaf, stored[path])):
            digests[path] = digest
    return jax.tree.unflatten(jax.tree.structure(target), leaves), digests


def _arrays(folder: Path, named: list[tuple[str, Any]]) -> Iterator[tuple[str, jax.Array]]:
    """Arrays in their order; while one is looked at, the next ones are read."""
    under_way: deque[tuple[int, Any]] = deque()  # blocks that are read, and arrays that are whole when those are

    def end() -> Iterator[tuple[str, jax.Array]]:
        size, what = under_way.popleft()
        if size:
            what.result()
        else:
            yield what.path, what.whole()

    try:
        for path, leaf in named:
            array = _Coming(path, leaf)
            for size, block in array.begin(stored_array(folder, path)):
                under_way.append((size, block))
                while sum(size for size, _ in under_way) > _UNDER_WAY:
                    yield from end()
            under_way.append((0, array))
        while under_way:
            yield from end()
    finally:
        for size, block in under_way:  # after an error nobody may write into memory that is given back
            if size:
                block.exception()


@dataclass
class _Coming:
    """An array that is being read: of each region that its devices hold the place where it is read to."""

    path: str
    target: jax.ShapeDtypeStruct
    places: dict[Any, "tuple[np.ndarray, jax.Array | None]"] = field(default_factory=dict)

    def begin(self, store: ts.TensorStore) -> Iterator[tuple[int, Any]]:
        """Start to read, block by block: bytes of each, and what waits for it."""
        if tuple(store.shape) != tuple(self.target.shape):
            raise ValueError(f"{self.path}: expected shape {list(self.target.shape)}, got {list(store.shape)}")
        chunk: Any = store.chunk_layout.read_chunk.shape
        size = store.dtype.numpy_dtype.itemsize
        wanted = ts.dtype(np.dtype(self.target.dtype))
        store = store if store.dtype == wanted else ts.cast(store, wanted)
        for device, region in self._regions().items():
            if region in self.places:
                continue
            self.places[region] = self._place(device, shape_of(_slices(region)))
            view = ts.array(self.places[region][0])
            if not region:
                yield size, view.write(store)
                continue
            for block in cut(_slices(region), chunk, _BLOCK // size) if view.size else ():
                here, there = view[inside(_slices(region), block)], store[block]
                yield math.prod(shape_of(block)) * size, here[_FROM_0].write(there[_FROM_0])

    def whole(self) -> jax.Array:
        """The array, once all blocks are there."""
        shards, kept = [], dict[Any, jax.Array]()
        for device, region in self._regions().items():
            if region in kept:
                shards.append(jax.device_put(kept[region], self._at(device)))
                continue
            host, made = self.places.pop(region)
            kept[region] = jax.device_put(host, self._at(device)) if made is None else made
            shards.append(kept[region])
        jax.block_until_ready(shards)  # the host's copies go now
        target = self.target
        return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards, dtype=target.dtype)

    def _regions(self) -> dict[Any, tuple[tuple[int, int], ...]]:
        """What each device of this process holds, from start to stop on each axis."""
        shape = self.target.shape
        held = self.target.sharding.addressable_devices_indices_map(shape)
        return {
            device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
            for device, index in held.items()
        }

    def _at(self, device: Any) -> SingleDeviceSharding:
        return SingleDeviceSharding(device, memory_kind=self.target.sharding.memory_kind)

    def _place(self, device: Any, shape: tuple[int, ...]) -> "tuple[np.ndarray, jax.Array | None]":
        """Where to read to: of a CPU it is the device's own memory, which a step can take over (donation)."""
        dtype = np.dtype(self.target.dtype)
        size = math.prod(shape) * dtype.itemsize
        if device.platform != "cpu" or size < _SMALL:
            return empty(shape, dtype), None
        # Zeros at an address that XLA does not take as it is: it makes an array of its own, which nobody has seen yet.
        zeros = np.zeros(size + 2 * _ALIGNED, np.uint8)
        start = -zeros.ctypes.data % _ALIGNED + dtype.itemsize
        made = jax.device_put(zeros[start : start + size].view(dtype).reshape(shape), self._at(device))
        octets = (ctypes.c_uint8 * size).from_address(jax.block_until_ready(made).unsafe_buffer_pointer())
        return np.ctypeslib.as_array(octets).view(dtype).reshape(shape), made


def _slices(region: tuple[tuple[int, int], ...]) -> Region:
    return tuple(slice(*part) for part in region)
