"""Opening a file for its bytes: plain, gzip or Zstandard, with a bound on what a small file may become."""

import contextlib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from rlhfjax.errors import ConfigError, DataError

MAX_ROW_BYTES = 16 << 20
_EXPANDS_AT_MOST = 200  # times; text is a tenth of its size, logs that repeat themselves a hundredth
_ALWAYS_ALLOWED = 256 << 20
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")


def without_compression(name: str) -> str:
    """A file name without the suffix that says how it is compressed."""
    return name[: name.rfind(".")] if name.lower().endswith(_COMPRESSED_SUFFIXES) else name


def pyarrow(path: Path, what: str) -> ModuleType:
    """The library of Parquet and Zstandard. Raises ConfigError that says what to type where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{path}: reading {what} needs pyarrow, which is not installed; run: pip install 'rlhfjax[parquet]'"
        ) from None
    return pyarrow


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system says about a file becomes one line: a DataError with the path and what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable data file, got {error.strerror or error}; check the path"
        ) from None


def require_file(path: Path) -> None:
    """Raises DataError unless `path` is a file that can be opened, and more than once."""
    try:
        with readable(path):
            mode = path.stat().st_mode
    except ValueError:  # which Python words otherwise in each version
        raise DataError(
            f"{str(path)!r}: expected the path of a data file, got a null byte in it; check the path"
        ) from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: expected a readable data file, got a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{path}: expected a file, got a pipe or a device, which can be read only once; save it as a file first"
        )
    with readable(path), path.open("rb"):
        pass


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The uncompressed bytes of a file and how it is compressed ("" where it is not).

    Raises DataError where it can't be read, where compressed data are broken, and once they have become more than 256
    MiB and more than 200 times their size; ConfigError where Zstandard is met without pyarrow.
    """
    require_file(path)
    with readable(path), path.open("rb") as raw:
        compression = next((name for magic, name in COMPRESSIONS.items() if raw.peek(4).startswith(magic)), "")
        if not compression:
            yield raw, ""
            return
        if compression == "gzip":
            inner: Any = gzip.GzipFile(fileobj=raw)
        else:
            arrow = pyarrow(path, "Zstandard (.zst)")
            inner = arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
        with contextlib.closing(inner):
            yield io.BufferedReader(_Expanded(inner, path, compression), 1 << 16), compression


class _Expanded(io.RawIOBase):
    """A decompressed stream that ends in one line of error where it is broken or grows beyond all measure."""

    def __init__(self, inner: Any, path: Path, compression: str):
        self._inner, self._path, self._compression = inner, path, compression
        self._left = max(_EXPANDS_AT_MOST * os.path.getsize(path), _ALWAYS_ALLOWED)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self._path}: expected a whole {self._compression} file, got {error}; copy or download it again"
            ) from None
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"{self._path}: expected a {self._compression} file of at most {_EXPANDS_AT_MOST} times its size "
                "unpacked, got more; unpack it yourself if that is meant"
            )
        buffer[: len(data)] = data
        return len(data)
