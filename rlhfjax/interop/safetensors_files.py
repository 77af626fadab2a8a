"""safetensors files, read and written one tensor at a time.

A file is eight bytes (the header's length, little-endian), the header (JSON: each tensor's type, shape and place), and
the tensors one after another. Nothing of a header is believed before it is checked against the file's size, and
tensors are read, not mapped: a page of a mapped file counts as memory of the process that looked at it.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rlhfjax.errors import ConfigError, IntegrityError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers of old exports (masks, position ids) may stand beside the weights; they are measured and never read.
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what is written
_LONGEST_HEADER = 100_000_000
_CACHED = 1 << 17  # numbers that are looked at at a time
Entry = tuple[str, tuple[int, ...]]  # type and shape of a stored tensor


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is: bytes start … end of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; none overlap, and together they fill it.

    Raises IntegrityError on a header that is broken, or says what the file does not hold.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise _broken(path, f"a header of {length:,} bytes in a file of {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"a header that is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "a header that is no object")
    header.pop("__metadata__", None)
    found = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise _broken(path, f"tensor {name!r} at byte {tensor.start:,} where {end:,} is next")
        end = tensor.end
    if end != size:
        raise _broken(path, f"tensors that end at byte {end:,} in a file of {size:,}")
    return found


def read_tensor(tensor: Tensor, name: str) -> np.ndarray:
    """One tensor in memory of its own. Raises IntegrityError where it is not finite or the file has become shorter."""
    read = _filled(tensor, name, np.empty(tensor.shape, DTYPES[tensor.dtype]))
    if not finite(read):
        raise _broken(tensor.path, f"tensor {name!r} with numbers that are infinite or none (NaN)")
    return read


def read_elements(tensor: Tensor, name: str, first: int, last: int) -> np.ndarray:
    """The elements from `first` to before `last`, as the file has them one after another. Raises as `read_tensor`."""
    size = DTYPES[tensor.dtype].itemsize
    part = replace(tensor, shape=(last - first,), start=tensor.start + first * size, end=tensor.start + last * size)
    return read_tensor(part, name)


def read_octets(tensor: Tensor, name: str, place: int, rows: slice) -> np.ndarray:
    """Of a tensor of type U8, at a place on its first axis, the rows from the start to before the stop of `rows`."""
    shape = (rows.stop - rows.start, *tensor.shape[2:])
    start = tensor.start + (place * tensor.shape[1] + rows.start) * math.prod(tensor.shape[2:])
    part = replace(tensor, shape=shape, start=start, end=start + math.prod(shape))
    return _filled(part, name, np.empty(shape, np.uint8))


def _filled(tensor: Tensor, name: str, read: np.ndarray) -> np.ndarray:
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        octets, done = read.reshape(-1).view(np.uint8), 0
        while done < octets.size:
            count = file.readinto(octets[done:].data)
            if not count:
                raise _broken(tensor.path, f"an end of the file within tensor {name!r}")
            done += count
    return read


@dataclass(frozen=True)
class Written:
    """Digests of a file that was written, SHA-256 in hex: of all of it, of its header, and of each tensor."""

    size: int
    sha256: str
    header: str
    tensors: Mapping[str, str]


def write_file(path: Path, tensors: Mapping[str, Entry], produced: Iterable[tuple[str, np.ndarray]]) -> Written:
    """Write tensors as they are produced, in the order of `tensors`, which gives type and shape of each.

    The file is on the disk afterwards.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    expected, digests = iter(tensors.items()), {}
    with path.open("xb") as file, ThreadPoolExecutor(1) as beside:
        os.fchmod(file.fileno(), 0o600)
        beginning = len(text).to_bytes(8, "little") + text
        whole = hashlib.sha256(beginning)
        file.write(beginning)
        for name, array in produced:
            wanted, (dtype, shape) = next(expected)
            if (name, array.shape, array.dtype) != (wanted, shape, DTYPES[dtype]):
                raise ValueError(f"expected tensor {wanted} {dtype} {shape}, got {name} {array.dtype} {array.shape}")
            octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            hashed = beside.submit(whole.update, octets)
            digests[name] = hashlib.sha256(octets).hexdigest()
            file.write(octets)
            hashed.result()
            del octets, array
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), whole.hexdigest(), hashlib.sha256(text).hexdigest(), digests)


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """A tensor in another type. Raises ConfigError when a number is too large for it."""
    with np.errstate(over="ignore"):
        made = array.astype(DTYPES[dtype])
    if not finite(made):
        raise ConfigError(f"tensor {name}: expected numbers that fit {dtype}, got larger ones; take another --dtype")
    return made


def finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or none (NaN)."""
    if array.dtype == ml_dtypes.bfloat16:  # numpy asks it number by number, and its bits all at once
        bits = array.view(np.uint16).ravel("K")
        parts = (bits[start : start + _CACHED] for start in range(0, bits.size, _CACHED))
        return all((part & np.uint16(0x7FFF)).max() < 0x7F80 for part in parts)
    return bool(np.isfinite(array).all())


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
        fits = isinstance(dtype, str) and len(dtype) < 20 and len(shape) <= 8 and len(name) <= 500
        if not fits or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError("out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"tensor {name[:80]!r} without a type, a shape and two offsets") from error
    if dtype not in _SIZES:
        raise ConfigError(f"{path}: expected tensors of {', '.join(DTYPES)}, got {name!r} of {dtype!r}; convert it")
    if math.prod(shape) * _SIZES[dtype] != end - start:
        raise _broken(path, f"tensor {name!r} of {dtype} {list(shape)} in {end - start:,} bytes")
    return Tensor(path, dtype, shape, base + start, base + end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name that is there twice")
    return made


def _broken(path: Path, got: str) -> IntegrityError:
    return IntegrityError(f"{path}: expected a whole safetensors file, got {got}; fetch the file again")
