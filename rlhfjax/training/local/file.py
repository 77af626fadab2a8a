"""The file in which a process keeps a step on its own disk: regions of arrays, then what they are.

What stands at the end is written last, and only then the file gets its name: a torn one never counts.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhfjax.errors import IntegrityError
from rlhfjax.integrity import sync, verifying
from rlhfjax.training.local.layout import Key, Start

ENDING = ".shards"
_MAGIC = b"rlhfjax\x01"
_TAIL = 8 + 32 + len(_MAGIC)  # bytes of the length of the index, of its SHA-256, and of what says that this is one
_WORKERS = min(8, os.cpu_count() or 1)


class Block(NamedTuple):
    """A region of an array."""

    name: str
    start: Start
    data: np.ndarray


def write(path: Path, blocks: Sequence[Block], facts: Mapping[str, Any]) -> None:
    """Write a file in one piece; it is on the disk afterwards. Raises OSError, and leaves nothing then."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file, ThreadPoolExecutor(_WORKERS) as pool:
            digests = pool.map(lambda block: hashlib.sha256(_octets(block.data)).hexdigest(), blocks)
            for block in blocks:
                file.write(_octets(block.data))
            listed = [
                [block.name, list(block.start), list(block.data.shape), str(block.data.dtype), digest]
                for block, digest in zip(blocks, digests, strict=True)
            ]
            index = json.dumps(dict(facts) | {"blocks": listed}).encode()
            file.write(index + len(index).to_bytes(8, "little") + hashlib.sha256(index).digest() + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class ShardFile:
    """A file that is whole, as far as its end says."""

    def __init__(self, path: Path):
        """Raises IntegrityError when it is not what was written."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _TAIL, 0))
                tail = file.read(_TAIL)
                length = int.from_bytes(tail[:8], "little")
                if size < _TAIL + length or not tail.endswith(_MAGIC):
                    raise ValueError("another end than such files have")
                file.seek(size - _TAIL - length)
                index = file.read(length)
            if hashlib.sha256(index).digest() != tail[8:40]:
                raise ValueError("another index than was written")
            self.facts: dict[str, Any] = json.loads(index)
            self._places = self._placed(size - _TAIL - length)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path}: expected a local step, got {error}") from None

    def _placed(self, end: int) -> dict[Key, tuple[int, tuple[int, ...], Any, str]]:
        places, offset = {}, 0
        for name, start, shape, dtype, digest in self.facts["blocks"]:
            kind = jnp.dtype(dtype)
            places[name, tuple(start)] = offset, tuple(shape), kind, digest
            offset += int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if offset != end:
            raise ValueError(f"{end} bytes of arrays, where {offset} were written")
        return places

    def read(self, keys: Iterable[Key]) -> dict[Key, np.ndarray]:
        """Regions by their keys. Raises IntegrityError for one that is not there, or not as it was written."""
        same = self.facts["same"]
        wanted = list(keys)
        with ThreadPoolExecutor(_WORKERS) as pool:
            read = pool.map(lambda key: self._read((same.get(key[0], key[0]), key[1])), wanted)
            return dict(zip(wanted, read, strict=True))

    def _read(self, key: Key) -> np.ndarray:
        if key not in self._places:
            raise IntegrityError(f"{self.path}: expected a region of {key[0]} at {list(key[1])}, got none")
        offset, shape, dtype, digest = self._places[key]
        made = np.empty(shape, dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                count = file.readinto(_octets(made))
        except OSError as error:
            raise IntegrityError(f"{self.path}: cannot be read: {error.strerror}") from None
        if count != made.nbytes or (verifying() and hashlib.sha256(_octets(made)).hexdigest() != digest):
            raise IntegrityError(f"{self.path}: expected {key[0]} at {list(key[1])} as it was written, got other bits")
        return made


def _octets(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
