"""Files of whole chunks: written and hashed in one go, and read each chunk to its place."""

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.leaves import Region, inside, shape_of
from rlhfjax.training.checkpoint.chunks import Layout
from rlhfjax.training.checkpoint.zarr import index_of

_BUFFER = 1 << 22  # bytes that are hashed and written, or read, at a time
_own = threading.local()


def write_file(path: Path, layout: Layout, file: Region, region: Region, held: np.ndarray) -> dict[str, Any]:
    """Write a file of an array of which `held` has a region; what a manifest says of it, once it is on the disk."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for octets in _octets(layout, file, region, held):
            digest.update(octets.data)
            size += octets.size
            rest = octets.data
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _octets(layout: Layout, file: Region, region: Region, held: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of a file in order, each valid until the next is asked for."""
    most = math.prod(layout.file) * layout.itemsize
    buffer, filled = _buffer(min(max(_BUFFER, layout.chunk_bytes), most)), 0
    for _, chunk in layout.chunks_of(file, file):
        block = held[(*inside(region, chunk), ...)]
        if filled + block.nbytes > buffer.size or block.nbytes >= _BUFFER:
            yield buffer[:filled]
            filled = 0
        if block.nbytes >= _BUFFER and block.flags.c_contiguous:
            octets = block.reshape(-1).view(np.uint8)
            yield from (octets[start : start + _BUFFER] for start in range(0, octets.size, _BUFFER))
            continue
        buffer[filled : filled + block.nbytes].view(block.dtype).reshape(block.shape)[...] = block
        filled += block.nbytes
    yield buffer[:filled]
    yield np.frombuffer(index_of(layout), np.uint8)


def _buffer(size: int) -> np.ndarray:
    """Memory of this thread alone, which it has touched before."""
    held = getattr(_own, "buffer", None)
    if held is None or held.size < size:
        held = _own.buffer = np.empty(size, np.uint8)
    return held


def reads(folder: Path, layout: Layout, region: Region, made: np.ndarray) -> Iterator[tuple[int, Callable[[], None]]]:
    """What is to be done to read a region of an array into memory of its shape, in any order: bytes of each, and it.

    Each raises OSError, or ValueError where a file ends too early.
    """
    most = max(_BUFFER // layout.chunk_bytes, 1)
    for name, file in layout.files(region):
        run: list[tuple[int, Region]] = []
        for number, chunk in layout.chunks_of(file, region):
            if run and (number != run[-1][0] + 1 or len(run) == most):
                yield _run(folder / name, layout, run, region, made)
                run = []
            run.append((number, chunk))
        if run:
            yield _run(folder / name, layout, run, region, made)


def _run(
    path: Path, layout: Layout, run: list[tuple[int, Region]], region: Region, made: np.ndarray
) -> tuple[int, Callable[[], None]]:
    """Chunks that follow each other in a file."""
    size, start = len(run) * layout.chunk_bytes, run[0][0] * layout.chunk_bytes
    chunks = [chunk for _, chunk in run]

    def do() -> None:
        place = _place(layout, chunks, region, made)
        held = _buffer(size)[:size] if place is None else place
        _read(path, start, held)
        if place is not None:
            return
        numbers = held.view(layout.dtype).reshape(len(run), *layout.chunk)
        for each, chunk in zip(numbers, chunks, strict=True):
            wanted = tuple(
                slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(chunk, region, strict=True)
            )
            made[(*inside(region, wanted), ...)] = each[(*inside(chunk, wanted), ...)]

    return size, do


def _place(layout: Layout, chunks: list[Region], region: Region, made: np.ndarray) -> np.ndarray | None:
    """The bytes that chunks are to be read to, where they lie there as they do in the file."""
    if made.dtype != np.dtype(layout.dtype) or shape_of(region)[1:] != layout.chunk[1:] or not made.flags.c_contiguous:
        return None
    if not made.ndim:
        return made.reshape(-1).view(np.uint8)
    first, last = chunks[0][0].start, chunks[-1][0].stop
    if first < region[0].start or last > region[0].stop:
        return None
    return made[first - region[0].start : last - region[0].start].reshape(-1).view(np.uint8)


def _read(path: Path, start: int, held: np.ndarray) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < held.size:
            count = os.preadv(descriptor, [held[done:].data], start + done)
            if not count:
                raise ValueError(f"{path}: expected {start + held.size} bytes or more, got {start + done}")
            done += count
    finally:
        os.close(descriptor)
