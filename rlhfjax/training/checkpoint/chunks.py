"""How arrays are cut where they are stored.

What is read of one is whole chunks, and another mesh cuts arrays elsewhere. So heads and experts lie apart, and
matrices in pieces that are as high as wide, up to sixteen on the shorter side. Each chunk costs time, so that small
arrays are cut less, and layers, which no mesh cuts, lie together but in arrays that are read by layer. A file has as
many chunks as make it no larger than 64 MB, of the part of one device.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhfjax.leaves import MOST, Region  # bytes of an array, from which on no chunk holds more than one layer

WHOLE = 1 << 18  # bytes of an array up to which it is written as it lies on the devices
LEAST, WANTED, LARGEST = 1 << 16, 1 << 17, 1 << 22  # bytes of a chunk
_STEEP = 4  # a chunk is not cut to less than a fourth at a time
_HEADS = ((r"attention/out/kernel$", 1), (r"attention/(query|key|value)/kernel$", 2))
_EXPERTS = (r"/experts/(up|gate|down)/kernel$", 1)


@dataclass(frozen=True)
class Layout:
    """An array as it is stored: the shape of a file's part of it is a multiple of a chunk's, and all are whole."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    file: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        """How many chunks a file has on each axis."""
        return tuple(whole // part for whole, part in zip(self.file, self.chunk, strict=True))

    def files(self, region: Region) -> Iterator[tuple[str, Region]]:
        """The files that have something of a region: their names and what they are of the array."""
        for place in _places(region, self.file):
            yield ".".join(["c", *map(str, place)]), _box(place, self.file)

    def chunks_of(self, file: Region, region: Region) -> Iterator[tuple[int, Region]]:
        """The chunks of a file that have something of a region: its number there, and what it is of the array."""
        first = [part.start // size for part, size in zip(file, self.chunk, strict=True)]
        wanted = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(file, region, strict=True))
        for place in _places(wanted, self.chunk):
            number = 0
            for here, start, many in zip(place, first, self.chunks, strict=True):
                number = number * many + here - start
            yield number, _box(place, self.chunk)


def _places(region: Region, size: Sequence[int]) -> Iterator[tuple[int, ...]]:
    ranges = [(part.start // step, -(-part.stop // step)) for part, step in zip(region, size, strict=True)]
    for index in np.ndindex(*(max(stop - start, 0) for start, stop in ranges)):
        yield tuple(start + i for i, (start, _) in zip(index, ranges, strict=True))


def _box(place: Sequence[int], size: Sequence[int]) -> Region:
    return tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, size, strict=True))


def layout_of(name: str, shape: Sequence[int], dtype: str, part: Sequence[int]) -> Layout:
    """How an array is stored of which each device holds parts of a shape that divides its own."""
    size, part = math.prod(shape) * np.dtype(dtype).itemsize, [max(length, 1) for length in part]
    chunk = list(part)
    if size > min(WHOLE, MOST):
        together, apart = _axes(name, len(shape))
        most = _chunk_bytes(name, shape, size // math.prod(shape))
        if re.search(r"(^|/)blocks/", name):
            (apart if size > MOST else together).insert(0, 0)
        if size > MOST and 0 in apart:
            chunk[0] = 1
        free = [axis for axis in range(len(shape)) if axis not in (*together, *apart)]
        most = most * math.prod(shape) // size
        _shrink(chunk, part, apart, most, 1)
        _shrink(chunk, part, free, most * 3 // 2, _STEEP)
    file = _grown(chunk, part, MOST // np.dtype(dtype).itemsize)
    return Layout(tuple(shape), dtype, tuple(chunk), tuple(file))


def _axes(name: str, many: int) -> tuple[list[int], list[int]]:
    """Axes that no chunk cuts, and those of which each holds one, if that is enough."""
    together, apart = [], []
    for pattern, axis in (*_HEADS, _EXPERTS):
        if re.search(pattern, name) and axis < many:
            together += [axis + 1] if pattern != _EXPERTS[0] else []  # the width of a head
            apart.append(axis)
    return together, apart


def _chunk_bytes(name: str, shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a chunk, at most."""
    together, apart = _axes(name, len(shape))
    layered, size = bool(re.search(r"(^|/)blocks/", name)), math.prod(shape) * itemsize
    together += [0] if layered and size <= MOST else []
    apart += [0] if layered and size > MOST else []
    each = math.prod(shape[axis] for axis in together) * itemsize
    sides = sorted(length for axis, length in enumerate(shape) if axis not in (*together, *apart)) or [1]
    most = 0
    for pieces in (16, 8, 4):
        side = max(sides[0] // pieces, 1)
        most = each * side * (min(side, sides[-1]) if len(sides) > 1 else 1)
        if most >= WANTED:
            break
    return min(max(most, LEAST), LARGEST, MOST)


def _shrink(chunk: list[int], part: Sequence[int], axes: Sequence[int], most: int, steep: int) -> None:
    """Cut a chunk on some axes, the longest first, until it has at most so many elements.

    No mesh cuts an axis but into equal parts, so that what has none of a good length stays as long as it is.
    """
    axes = list(axes)
    while math.prod(chunk) > most and axes:
        axis = max(axes, key=lambda axis: chunk[axis])
        shorter = max((size for size in _divisors(part[axis]) if size < chunk[axis]), default=0)
        if shorter * steep >= chunk[axis] or (steep == 1 and shorter):
            chunk[axis] = shorter
        else:
            axes.remove(axis)


def _grown(chunk: Sequence[int], part: Sequence[int], most: int) -> list[int]:
    """The part of an array that a file has: chunks next to each other on the last axes, then on those before."""
    file = list(chunk)
    for axis in reversed(range(len(file))):
        room = most * file[axis] // max(math.prod(file), 1)
        fits = [size for size in _divisors(part[axis]) if size % chunk[axis] == 0 and size <= room]
        file[axis] = max([chunk[axis], *fits])
        if file[axis] < part[axis]:
            break
    return file


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
