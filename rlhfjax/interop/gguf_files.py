"""The container of llama.cpp: metadata and tensors in one file, read with every length checked against the file.

The layout is that of GGUF versions 2 and 3, little-endian. The header is parsed here, not by the package `gguf`, which
believes the counts in a file and loops over them; its dequantisation is what gives the numbers.
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, IntegrityError

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_MOST_DIMENSIONS, _LONGEST_NAME = 4, 1 << 16
_ALIGNMENT = 32
_AT_ONCE = 1 << 22  # numbers that are dequantised at a time


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies; `shape` is row-major (GGUF writes the fastest axis first), `kind` is GGML's number."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A checked file, held open as a memory map."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: mmap.mmap = field(repr=False)

    def read(self, name: str, rows: slice | np.ndarray, columns: slice) -> np.ndarray:
        """Rows of a tensor (its last axis is a row; of a vector all), and of these some columns, as a matrix.

        They are dequantised to float32, or as they are stored where that is a plain float type. No more of the file is
        looked at than the blocks that they are in. Raises ConfigError for a quantisation that the package `gguf` cannot
        undo.
        """
        import gguf

        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, width = gguf.GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(self.data, np.uint8, tensor.size, tensor.start)
        first, last = columns.start // block, -(-columns.stop // block)
        stored = raw.reshape(-1, tensor.shape[-1] // block * width)[rows, first * width : last * width]
        plain = {kind.F32: "<f4", kind.F16: "<f2", kind.F64: "<f8"}.get(kind)
        try:
            if plain:
                return stored.view(plain)[:, :: columns.step or 1].copy()
            here = slice(columns.start - first * block, columns.stop - first * block, columns.step)
            return self._dequantised(stored, kind, (last - first) * block)[:, here]
        except NotImplementedError as error:
            raise ConfigError(
                f"{self.path}: expected a quantisation that can be undone, got {kind.name} in {name!r}; use a file of "
                "another type, such as Q8_0"
            ) from error
        finally:
            self._let_go()

    def _dequantised(self, rows: np.ndarray, kind: Any, width: int) -> np.ndarray:
        """A part of the rows at a time: what that takes beside them is several times as large as they."""
        import gguf

        made = np.empty((len(rows), width), np.float32)
        step = max(_AT_ONCE // width, 1)
        for start in range(0, len(rows), step):
            made[start : start + step] = gguf.quants.dequantize(rows[start : start + step], kind)
            self._let_go()
        return made

    def _let_go(self) -> None:
        self.data.madvise(mmap.MADV_DONTNEED)  # pages of the file that were read are memory of this process


def open_file(path: Path) -> GgufFile:
    """The metadata of a file and where its tensors lie.

    Raises ConfigError where it cannot be opened or has another version, IntegrityError where it is broken.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file has no map
        reason = error.strerror if isinstance(error, OSError) else "an empty file"
        raise ConfigError(f"{path}: expected a GGUF file that can be read, got {reason}") from error
    cursor = _Cursor(path, data)
    if cursor.take(4) != b"GGUF":
        raise IntegrityError(f"{path}: expected a GGUF file, got one that begins otherwise; fetch it again")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ConfigError(f"{path}: expected GGUF version 2 or 3, little-endian, got {version}; convert the file")
    tensors, entries = cursor.count("tensors", 24), cursor.count("metadata entries", 13)
    metadata = {}
    for _ in range(entries):
        key = cursor.text(_LONGEST_NAME)
        if key in metadata:
            raise IntegrityError(f"{path}: expected each key of the metadata once, got {key[:80]!r} twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    described = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise IntegrityError(f"{path}: expected an alignment that is a power of two, got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(path, metadata, _placed(path, described, start, alignment, len(data)), data)


def _placed(
    path: Path, described: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, end: int
) -> dict[str, GgufTensor]:
    """The tensors, each of a known type, whole in the file, and none over another."""
    import gguf

    placed: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{path}: expected tensors of a known type, got number {kind} in {name!r}") from error
        if name in placed or not shape or shape[-1] % block or offset % alignment:
            raise IntegrityError(f"{path}: expected tensor {name[:80]!r} once, aligned and of whole blocks of {block}")
        size = math.prod(shape) // block * width
        if start + offset + size > end:
            raise IntegrityError(
                f"{path}: expected {start + offset + size:,} bytes for tensor {name[:80]!r}, got a file of {end:,}; "
                "fetch it again"
            )
        placed[name] = GgufTensor(shape, kind, start + offset, size)
    last = 0
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].start):
        if tensor.start < last:
            raise IntegrityError(f"{path}: expected tensors side by side, got {name[:80]!r} over another")
        last = tensor.start + tensor.size
    return placed


class _Cursor:
    """Reads on from a place; what is not there raises IntegrityError."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise IntegrityError(
                f"{self.path}: expected {size:,} more bytes at {self.at:,}, got a file of {len(self.data):,}; it is "
                "cut or broken, fetch it again"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, smallest: int) -> int:
        """A count of things of at least `smallest` bytes each, which must have room in what is left of the file."""
        count = self.number("<Q")
        if count * smallest > len(self.data) - self.at:
            raise IntegrityError(
                f"{self.path}: expected at most {(len(self.data) - self.at) // smallest:,} {what} in what is left of "
                f"the file, got {count:,}; it is cut or broken, fetch it again"
            )
        return count

    def text(self, longest: int = 1 << 26) -> str:
        size = self.number("<Q")
        if size > longest:
            raise IntegrityError(
                f"{self.path}: expected a text of at most {longest:,} bytes, got {size:,}; it is broken"
            )
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{self.path}: expected UTF-8 before byte {self.at:,}, got other bytes") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("<I"))
        return self.number(self._form(kind))

    def _array(self, kind: int) -> list[Any]:
        if kind == _STRING:
            return [self.text() for _ in range(self.count("texts", 8))]
        form = self._form(kind)
        width = struct.calcsize(form)
        count = self.count("numbers", width)
        return np.frombuffer(self.take(count * width), np.dtype(form)).tolist()

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise IntegrityError(f"{self.path}: expected a known type at byte {self.at:,}, got number {kind}")
        return _SCALARS[kind]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, row-major shape, type and offset of a tensor."""
        name, dimensions = self.text(_LONGEST_NAME), self.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise IntegrityError(f"{self.path}: expected at most 4 axes in tensor {name[:80]!r}, got {dimensions:,}")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self.number("<I"), self.number("<Q")
