"""How a step is written: each process its own files, hashed as they are written, and the first one what describes them.

A file is on the disk, and its entry of the manifest is known, before another takes its place in the thread, so that
none is read again.
"""

import json
import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.host import processes
from rlhfjax.leaves import Region, shape_of
from rlhfjax.plain_json import plain
from rlhfjax.training.checkpoint.chunk_files import write_file
from rlhfjax.training.checkpoint.chunks import Layout, layout_of
from rlhfjax.training.checkpoint.items import Entries
from rlhfjax.training.checkpoint.zarr import DESCRIPTION, described, name_of, tree_described
from rlhfjax.training.digests import leaf_name

_THREADS = min(4, 2 * (os.cpu_count() or 1))  # some wait for the disk while others copy and hash
_ALL = 1 << 62  # bytes


@dataclass(frozen=True)
class Piece:
    """What one process writes of an array of a step: whole files, and their numbers, here or on a device."""

    folder: str
    layout: Layout
    region: Region
    held: Any

    def on_host(self) -> "Piece":
        """With its numbers in memory that no program takes over: a donated array is copied."""
        held = self.held
        return replace(self, held=np.asarray(held) if isinstance(held, jax.Array) else np.array(held))


def pieces_of(items: Mapping[str, Any]) -> list[Piece]:
    """What this process writes of a step. Each part of an array is written by one of those that hold it, in turn.

    All processes find the same without asking each other.
    """
    several, here = processes.count() > 1, jax.process_index() if processes.count() > 1 else 0
    load, found = Counter[int](), []
    for item, tree in items.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = leaf_name(path)
            holders = _holders(leaf) if several else {region: {0} for region in _local(leaf)}
            layout = _layout(name, leaf, holders)
            for region, numbers in sorted(holders.items()):
                writer = min(numbers, key=lambda number: (load[number], number))
                load[writer] += math.prod(stop - start for start, stop in region) * layout.itemsize
                if writer == here:
                    part = tuple(slice(*axis) for axis in region)
                    found.append(Piece(f"{item}/{name_of(name)}", layout, part, _local(leaf)[region]))
    return found


def on_host(pieces: Iterable[Piece]) -> list[Piece]:
    """All pieces in memory, copied from devices at once."""
    pieces = list(pieces)
    for piece in pieces:
        if isinstance(piece.held, jax.Array):
            piece.held.copy_to_host_async()
    return [piece.on_host() for piece in pieces]


def _layout(name: str, leaf: Any, regions: Iterable[Any]) -> Layout:
    """Parts of devices begin at multiples of what they have in common."""
    part = list(leaf.shape)
    for region in regions:
        part = [math.gcd(size, start, stop) for size, (start, stop) in zip(part, region, strict=True)]
    return layout_of(name, leaf.shape, str(leaf.dtype), part)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


def _local(leaf: Any) -> dict[Any, Any]:
    """The parts of an array that this process holds."""
    if not isinstance(leaf, jax.Array):
        return {tuple((0, size) for size in leaf.shape): leaf}
    return {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _holders(leaf: Any) -> dict[Any, set[int]]:
    """By part, the processes that hold it; what each has for itself is the first one's."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return {region: {0} for region in _local(leaf)}
    found: dict[Any, set[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        found.setdefault(_bounds(index, leaf.shape), set()).add(device.process_index)
    return found


def descriptions(items: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a step by their files: what it says of itself, and what its trees are."""
    texts = {"meta/metadata": json.dumps(plain(dict(meta)))}
    for item, tree in items.items():
        texts[f"{item}/_METADATA"] = tree_described(tree)
    return texts


def begin(part: Path) -> None:
    """An empty folder for a step; what a save that failed left there goes."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700, parents=True)


def write_texts(part: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (part / name).parent.mkdir(mode=0o700, exist_ok=True)
        (part / name).write_text(text, encoding="utf-8")


def write_pieces(part: Path, pieces: Iterable[Piece], ahead: int = _ALL) -> Entries:
    """Write files of a step; what the manifest says of them, which are on the disk. Raises OSError.

    At most about `ahead` bytes wait to be written, if pieces are made as they are asked for.
    """
    entries: Entries = {}
    under_way: deque[tuple[int, Future[tuple[str, dict[str, Any]]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for piece in pieces:
                folder = part / piece.folder
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if all(axis.start == 0 for axis in piece.region):  # one process has the first part
                    (folder / DESCRIPTION).write_text(described(piece.layout), encoding="utf-8")
                for name, box in piece.layout.files(piece.region):
                    size = math.prod(shape_of(box)) * piece.layout.itemsize
                    under_way.append((size, pool.submit(_entry, part, piece, name, box)))
                del piece
                while sum(size for size, _ in under_way) > ahead:
                    entries.update([under_way.popleft()[1].result()])
            entries |= dict(file.result() for _, file in under_way)
        finally:
            pool.shutdown(cancel_futures=True)
    return entries


def _entry(part: Path, piece: Piece, name: str, box: Region) -> tuple[str, dict[str, Any]]:
    name = f"{piece.folder}/{name}"
    return name, write_file(part / name, piece.layout, box, piece.region, piece.held)


def by_item(digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Digests by item and path, from those of all items together."""
    found: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        item, _, path = name.partition("/")
        found.setdefault(item, {})[path] = digest
    return found
