"""Parameters that are read in blocks, so that nothing larger than a block is held of what lies elsewhere.

Arrays in memory, a checkpoint and a stranger's files look alike: shapes by path (`blocks/mlp/up/kernel`; of a scalar
model the decoder's, and `head/…` beside), and the blocks of a region of one of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

Region = tuple[slice, ...]  # of every axis, from start to stop
MOST = 1 << 26  # bytes of a block, about
_ALIGNED = 64  # bytes: what XLA reads where it lies, and does not copy
_STRIP = 16  # elements: so many of each run of memory are written at a time, which a cache holds


class Leaves(Protocol):
    """The parameters of one model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def blocks(self, path: str, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        """The parts of a region, which together fill it: where each lies in the region, and its numbers."""
        ...

    def check(self) -> None:
        """Raises IntegrityError where a parameter that was read to its end is not what was saved, if that is known."""


def region_at(shape: Sequence[int], place: Sequence[int] = ()) -> Region:
    """A whole array, or what there is of it at a place on its first axes."""
    chosen = [slice(i, i + 1) for i in place]
    return (*chosen, *(slice(0, size) for size in shape[len(chosen) :]))


def shape_of(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def inside(outer: Region, inner: Region) -> Region:
    """Where a region lies, seen from the start of one around it."""
    return tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(outer, inner, strict=True))


def cut(region: Region, chunk: Sequence[int], most: int) -> Iterator[Region]:
    """A region in blocks of at most about `most` elements, which begin at multiples of `chunk` where they can.

    Blocks are as long as may be on the last axes. One of a single chunk may be larger than `most`.
    """
    lengths = shape_of(region)
    step = [min(size, length) for size, length in zip(chunk, lengths, strict=True)]
    for axis in reversed(range(len(region))):
        others = math.prod(step) // step[axis]
        step[axis] = min(max(most // others // chunk[axis], 1) * chunk[axis], lengths[axis])
        if step[axis] < lengths[axis]:
            break
    starts = [_starts(part, size) for part, size in zip(region, step, strict=True)]
    for index in np.ndindex(*(len(each) - 1 for each in starts)):
        yield tuple(slice(starts[axis][i], starts[axis][i + 1]) for axis, i in enumerate(index))


def _starts(part: slice, step: int) -> list[int]:
    first = part.start // step * step + step
    return [part.start, *range(first, part.stop, step), part.stop]


def read(leaves: Leaves, path: str, region: Region | None = None, dtype: str = "float32") -> np.ndarray:
    """A region, or all of a parameter, in memory of its own where XLA needs no copy of it."""
    region = region_at(leaves.shapes[path]) if region is None else region
    made = empty(shape_of(region), dtype)
    fill(made, leaves, path, region)
    return made


def fill(made: np.ndarray, leaves: Leaves, path: str, region: Region) -> None:
    """Read a region into an array of its shape."""
    for where, block in leaves.blocks(path, region):
        put(made[(*where, ...)], block)  # a view, of a number as well


def put(made: np.ndarray, block: np.ndarray) -> None:
    """`made[...] = block`, in strips where one lies across the other in memory: a fifth of the time of large ones."""
    axis = _fastest(made)
    if axis is None or axis == _fastest(block):
        made[...] = block
        return
    block = block.astype(made.dtype, copy=False)  # lies as before; a cast on the way across would be slower
    for start in range(0, made.shape[axis], _STRIP):
        strip = (slice(None),) * axis + (slice(start, start + _STRIP),)
        made[strip] = block[strip]


def _fastest(array: np.ndarray) -> int | None:
    """The axis whose elements are next to each other, or nearest."""
    several = [axis for axis in range(array.ndim) if array.shape[axis] > 1]
    return min(several, key=lambda axis: abs(array.strides[axis]), default=None)


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array without numbers yet, at an address that XLA takes as it is."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    octets = np.empty(size + _ALIGNED, np.uint8)
    start = -octets.ctypes.data % _ALIGNED
    return octets[start : start + size].view(dtype).reshape(shape)


class InMemory:
    """Leaves of a tree of arrays, wherever these lie."""

    def __init__(self, params: Any):
        decoder = params.get("decoder", params)
        self._arrays = _by_path(decoder) | _by_path({"head": params["head"]} if "head" in params else {})
        self.shapes = {path: tuple(leaf.shape) for path, leaf in self._arrays.items()}

    def blocks(self, path: str, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        array = self._arrays[path]
        whole = region == region_at(array.shape)
        yield inside(region, region), np.asarray(array) if whole else _part(array, region)

    def check(self) -> None:
        """Nothing is known of arrays in memory."""


class Overlaid:
    """Other leaves, some of them replaced by arrays."""

    def __init__(self, leaves: Leaves, arrays: Mapping[str, np.ndarray]):
        self._leaves, self._arrays, self.check = leaves, arrays, leaves.check
        self.shapes = dict(leaves.shapes) | {path: array.shape for path, array in arrays.items()}

    def blocks(self, path: str, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
        if path not in self._arrays:
            yield from self._leaves.blocks(path, region)
        else:
            yield inside(region, region), self._arrays[path][region]


def _by_path(tree: Any) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def _part(array: Any, region: Region) -> np.ndarray:
    """Without the rest of it on the host, unless it is there already."""
    here = not isinstance(array, jax.Array) or [device.platform for device in array.devices()] == ["cpu"]
    if here:
        return np.asarray(array)[region]
    return np.asarray(_sliced(array, tuple(np.int32(part.start) for part in region), sizes=shape_of(region)))


@partial(jax.jit, static_argnames="sizes")
def _sliced(array: jax.Array, starts: tuple[np.int32, ...], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(array, starts, sizes)
