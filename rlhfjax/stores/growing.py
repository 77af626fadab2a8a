"""Files that grow, kept in a store as parts: only what is new is sent, however long the file is by now."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rlhfjax.stores.client import Store
from rlhfjax.stores.layout import part_key


@dataclass(frozen=True)
class _Part:
    offset: int
    size: int
    digest: str


class Growing:
    """One such file: the parts that the store has of it."""

    def __init__(self, store: Store, key: str):
        self._store, self._key = store, key
        self._parts: list[_Part] = []
        self._file: int | None = None  # the inode that the parts were compared with

    def load(self, found: Mapping[int, str], tidy: bool = True) -> bytes:
        """What the parts in the store hold together; those that others were written over do not count, and may go."""
        self._parts, whole = [], b""
        for offset, key in sorted(found.items()):
            if offset == len(whole):
                data = self._store.read(key)
                self._parts.append(_Part(offset, len(data), hashlib.sha256(data).hexdigest()))
                whole += data
        if tidy:
            self._store.delete(sorted(set(found.values()) - {part_key(self._key, part.offset) for part in self._parts}))
        return whole

    def is_in(self, path: Path) -> None:
        """The file was just made of the parts."""
        self._file = path.stat().st_ino

    def send(self, path: Path) -> None:
        """What the store has not yet. Parts that the file does not begin with any more go first, the last before."""
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            begun = self._parts if inode != self._file else self._parts[-1:]  # another file, or one cut back
            if not all(_begins(file, part) for part in begun):
                self._keep([part for part in self._parts if _begins(file, part)])
            self._file = inode
            begin = sum(part.size for part in self._parts)
            file.seek(begin)
            if new := file.read():
                self._store.write(part_key(self._key, begin), new)
                self._parts.append(_Part(begin, len(new), hashlib.sha256(new).hexdigest()))

    def finish(self, path: Path) -> None:
        """One object in the place of the parts."""
        self._store.send(self._key, path)
        self._store.delete([part_key(self._key, part.offset) for part in self._parts])
        self._parts, self._file = [], None

    def _keep(self, good: list[_Part]) -> None:
        """The parts up to the first that is not among the good ones."""
        kept = [part for i, part in enumerate(self._parts) if self._parts[: i + 1] == good[: i + 1]]
        for part in reversed(self._parts[len(kept) :]):
            self._store.delete([part_key(self._key, part.offset)])
        self._parts = kept


def _begins(file: BinaryIO, part: _Part) -> bool:
    """Whether the file still has there what the part has."""
    file.seek(part.offset)
    return hashlib.sha256(file.read(part.size)).hexdigest() == part.digest
