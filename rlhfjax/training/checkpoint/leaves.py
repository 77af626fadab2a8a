"""The model of a checkpoint, read in blocks: no array of it is ever held whole.

What Orbax wrote is read by tensorstore itself, which reads any part of an array. It reads whole chunks, though. Since
`chunks_of` no chunk of a large array holds more than one layer; where an older checkpoint has such chunks, each is read
once, and its layers are kept on the disk until they are asked for.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.integrity import verifying
from rlhfjax.leaves import MOST, Region, cut, inside, region_at, shape_of
from rlhfjax.models import SequenceModel
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.models.lora import init_lora
from rlhfjax.training.checkpoint.items import item_digests, named, other_bits, unreadable
from rlhfjax.training.checkpoint.meta import SCALAR, read_meta, verified_item
from rlhfjax.training.checkpoint.models import base_of, described
from rlhfjax.training.checkpoint.reading import stored_array
from rlhfjax.training.digests import Sums, leaf_name

_WHOLE = 1 << 22  # bytes of an array that is held whole where its chunks hold several layers


@dataclass
class StoredLeaves:
    """`Leaves` of a checkpoint; those of adapters and of their base together. Close it."""

    arrays: Mapping[str, "_Stored"]
    _sums: dict[str, Sums] = field(default_factory=dict)  # of what was read since the last check
    _right: set[str] = field(default_factory=set)  # what was read to its end, and is as it was saved

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {path: array.shape for path, array in self.arrays.items()}

    def blocks(self, path: str, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        """Raises IntegrityError where the array cannot be read."""
        array = self.arrays[path]
        counts = array.digest and verifying() and path not in self._right
        for where, block in array.blocks(region):
            sums = self._sums.setdefault(path, Sums())
            if counts and sums.count < math.prod(array.shape):
                sums.add(block, array.shape, [part.start for part in where])
            yield inside(region, where), block

    def check(self) -> None:
        """Compare what was read with the digests that were found when it was saved; each parameter is read in order.

        Raises IntegrityError naming an array that differs.
        """
        for path, sums in self._sums.items():
            array = self.arrays[path]
            if sums.count == math.prod(array.shape) and sums.text(array.dtype, array.shape) != array.digest:
                raise named(array.step_dir, array.item, other_bits(array.step_dir, array.item, [array.name]))[1]
            self._right |= {path} if sums.count == math.prod(array.shape) else set()
        self._sums.clear()

    def close(self) -> None:
        for array in self.arrays.values():
            array.forget()


def open_leaves(step_dir: Path, item: str, scratch: Path) -> tuple[SequenceModel, StoredLeaves]:
    """A model of a step directory, computed in float32, and its parameters, none of them read.

    `scratch` is a folder for what does not fit into memory. Raises as `load_model`.
    """
    meta = read_meta(step_dir)
    model = described(meta, dtype="float32")
    scalar = (meta["role"] if item == "average" else item) in SCALAR
    init = model.init_scalar if scalar else model.init
    shapes = jax.eval_shape(init, jax.random.key(0))
    places = {(step_dir, item): shapes}
    if lora := meta.get("lora"):
        base = base_of(step_dir, meta["base"])
        frozen = jax.eval_shape(model.init, jax.random.key(0))
        trained = jax.eval_shape(lambda key: init_lora(key, frozen, lora["rank"], lora["targets"]), jax.random.key(0))
        if scalar:
            trained = with_head(trained, jax.eval_shape(lambda: zero_head(model.config.width)))
        places = {base: frozen, (step_dir, item): trained}
    arrays: dict[str, _Stored] = {}
    for (directory, name), tree in places.items():
        verified_item(directory, name)
        digests = item_digests(directory, name)
        for path, shape in _by_path(tree).items():
            arrays[path.removeprefix("decoder/")] = _Stored(directory, name, path, shape, digests.get(path), scratch)
    if lora and scalar:
        arrays = {path: array for path, array in arrays.items() if not path.startswith(("unembed/", "mtp_heads/"))}
    return model, StoredLeaves(arrays)


def _by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass
class _Stored:
    """One array of an item: its path there, the shape that the model has it in, and the digest that it was saved with.

    What is `held` is the array itself, if it is small, or a file of its layers.
    """

    step_dir: Path
    item: str
    name: str
    shape: tuple[int, ...]
    digest: str | None
    scratch: Path
    opened: Any = None
    held: "np.ndarray | _Layers | None" = None

    @property
    def dtype(self) -> str:
        return (self.digest or "").partition("[")[0]

    def blocks(self, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        """Blocks by their place in the whole array."""
        try:
            yield from self._blocks(region)
        except (ValueError, OSError) as error:  # tensorstore parses the files of others here
            said = unreadable(self.step_dir, f"has no readable array {self.item}/{self.name}", error)
            raise named(self.step_dir, self.item, said)[1] from error

    def _blocks(self, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        store = self._open()
        chunk, size = store.chunk_layout.read_chunk.shape or (), store.dtype.numpy_dtype.itemsize
        layers = 0  # how many of the first axes are cut where chunks are not
        while layers < len(region) and region[layers].stop - region[layers].start == 1 < self.shape[layers]:
            layers += 1
        spans = any(chunk[axis] > 1 for axis in range(layers))
        if not spans:
            for block in cut(region, chunk, MOST // size):
                yield block, store[block].read().result()
        elif math.prod(self.shape) * size <= _WHOLE:
            if not isinstance(self.held, np.ndarray):
                self.held = np.asarray(store.read().result())
            yield region, self.held[region]
        else:
            if not isinstance(self.held, _Layers):
                self.held = _Layers(store, layers, self.scratch)
            yield from self.held.blocks(region)

    def _open(self) -> Any:
        if self.opened is None:
            self.opened = stored_array(self.step_dir / self.item, self.name)
            if tuple(self.opened.shape) != self.shape:
                raise ValueError(f"expected shape {list(self.shape)}, got {list(self.opened.shape)}")
        return self.opened

    def forget(self) -> None:
        """Of an array that was read, what it left in memory or on the disk."""
        if isinstance(self.held, _Layers):
            self.held.close()
        self.held = self.opened = None


class _Layers:
    """The layers of an array whose chunks hold several, in a file of their own, each in blocks as chunks have it."""

    def __init__(self, store: Any, axes: int, scratch: Path):
        self._axes, self._chunk, self._dtype = axes, store.chunk_layout.read_chunk.shape, store.dtype.numpy_dtype
        self._shape, self._places, end = tuple(store.shape), {}, 0
        descriptor, name = tempfile.mkstemp(prefix=".layers-", dir=scratch)
        os.unlink(name)  # it goes with the process
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        for chunk in cut(region_at(self._shape), self._chunk, 1):
            read = store[chunk].read().result()
            for place in np.ndindex(*read.shape[:axes]):
                layer = np.ascontiguousarray(read[place])
                where = tuple(slice(part.start + i, part.start + i + 1) for part, i in zip(chunk, place, strict=False))
                self._places[_key((*where, *chunk[axes:]))] = end
                self._write(layer)
                end += layer.nbytes

    def _write(self, layer: np.ndarray) -> None:
        octets = layer.reshape(-1).view(np.uint8).data
        while octets:
            octets = octets[self._file.write(octets) :]

    def blocks(self, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        outer = (*region[: self._axes], *region_at(self._shape)[self._axes :])
        for block in cut(outer, (*(1,) * self._axes, *self._chunk[self._axes :]), 1):
            wanted = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(block, region, strict=True)
            )
            if all(part.start < part.stop for part in wanted):
                yield wanted, self._read(block)[inside(block, wanted)]

    def _read(self, block: Region) -> np.ndarray:
        made = np.empty(shape_of(block), self._dtype)
        octets, done = made.reshape(-1).view(np.uint8), 0
        self._file.seek(self._places[_key(block)])
        while done < octets.size:
            count = self._file.readinto(octets[done:].data)
            if not count:
                raise OSError("the file of an array's layers has become shorter")
            done += count
        return made

    def close(self) -> None:
        self._file.close()


def _key(region: Region) -> tuple[int, ...]:
    return tuple(part.start for part in region)
