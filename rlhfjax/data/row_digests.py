"""Digests of single rows, taken when they are prepared: by them the row that changed is found, and named by its place.

Eight bytes a row lie beside the records of a split. A run keeps at most 2^20 numbers of each of its sources: where it
has more rows, of blocks of rows.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhfjax.data.files import find_files, is_data_path
from rlhfjax.data.reading import RECOGNISE, Reading, data_file
from rlhfjax.data.sources import open_either
from rlhfjax.data.writing import digests_file
from rlhfjax.errors import RlhfjaxError

MOST = 1 << 20  # numbers that are kept of one source
_ODD = 0x9E3779B97F4A7C15


class Rows(NamedTuple):
    """Numbers of the rows of a split, `count` of them; each number is of `block` rows that follow each other."""

    count: int
    block: int
    numbers: np.ndarray  # [ceil(count / block)] uint64


def rows_of_source(
    source: str, split: str, data_dir: Path, kind: str | None, reading: Reading = RECOGNISE, block: int | None = None
) -> Rows | None:
    """The rows of a source as it is now; of a part of a split, of the whole split. Raises DataError as `open_either`.

    None where nobody took digests: of a dataset of another program or an older version, and of several splits at once.
    """
    path = open_either(source, split, data_dir, kind, reading).folder / digests_file(split.partition("[")[0])
    if "+" in split or not path.is_file():
        return None
    digests = np.fromfile(path, "<u8")
    block = block or max(-(-len(digests) // MOST), 1)
    return Rows(len(digests), block, in_blocks(digests, block))


def in_blocks(digests: np.ndarray, block: int) -> np.ndarray:
    """One number for so many rows: sum of digest x an odd number of its place, modulo 2^64."""
    if block == 1:
        return digests
    padded = np.zeros(-(-len(digests) // block) * block, np.uint64)
    padded[: len(digests)] = digests
    factors = (2 * np.arange(block, dtype=np.uint64) + 1) * np.uint64(_ODD)
    return (padded.reshape(-1, block) * factors).sum(axis=1, dtype=np.uint64)


def write_rows(path: Path, rows: Rows, fingerprint: str) -> None:
    """Keep them in a file: a line that says what they are of, then the numbers."""
    told = {"fingerprint": fingerprint, "count": rows.count, "block": rows.block}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_bytes(json.dumps(told).encode() + b"\n" + rows.numbers.astype("<u8").tobytes())
    part.replace(path)


def read_rows(path: Path, fingerprint: str) -> Rows | None:
    """What `write_rows` kept of this fingerprint; None of another, and where there is nothing that can be read."""
    try:
        line, _, rest = path.read_bytes().partition(b"\n")
        told = json.loads(line)
        rows = Rows(int(told["count"]), int(told["block"]), np.frombuffer(rest, "<u8"))
        whole = len(rows.numbers) == -(-rows.count // rows.block)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    return rows if whole and told.get("fingerprint") == fingerprint else None


def first_changed(then: Rows, now: Rows) -> tuple[int, int, int] | None:
    """(first, end, how many): the first row, or block of rows, that is another, and how many are; None if none is.

    Rows that were only added or taken away at the end begin where the shorter one ends. `now` is in the blocks of
    `then`.
    """
    shorter = min(len(then.numbers), len(now.numbers))
    changed = np.flatnonzero(then.numbers[:shorter] != now.numbers[:shorter])
    if not len(changed) and then.count == now.count:
        return None
    first = int(changed[0]) * then.block if len(changed) else min(then.count, now.count)
    return first, min(first + then.block, max(then.count, now.count)), len(changed)


def place_of_row(source: str, split: str, kind: str | None, reading: Reading, row: int) -> str:
    """Where a row of files stands, as `FILE:LINE`; nothing of what is no file, or is not there any more."""
    try:
        if not is_data_path(source) and not Path(source).is_dir():
            return ""
        files = find_files(source).of(split.partition("[")[0], source)
        places = (where for path in files for where in _places(path, kind, reading))
        return next(islice(places, row, None), "")
    except RlhfjaxError:
        return ""


def _places(path: Path, kind: str | None, reading: Reading) -> Iterator[str]:
    """The place of each record of a file."""
    return data_file(path, kind, reading).places()
