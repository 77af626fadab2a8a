"""The ledger of a stage: which rows each step was trained on, one line a step beside its metrics.

The first line says what the rows are of; `rlhfjax.runs.ledger` reads all of them, and checks them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlhfjax.training.sinks import Report, Sink

FILE = "ledger.jsonl"
_FORMAT = 1
_COUNTED = 1 << 16  # rows that are looked up at a time


class Order(Protocol):
    """The order in which a stage reads: `rows` an epoch, and the sources whose rows have numbers."""

    @property
    def rows(self) -> int: ...

    @property
    def listed(self) -> Sequence[Any]: ...

    def numbers(self, first: int, count: int) -> np.ndarray:
        """The rows at so many places from `first` on, counted through the sources that are `listed`."""
        ...


class Taken(NamedTuple):
    """What a step read: so many places of the order, from `first` on."""

    first: int
    count: int

    @property
    def places(self) -> list[int]:
        """All of them."""
        return list(range(self.first, self.first + self.count))


class Ledger:
    """Appends to DIRECTORY/ledger.jsonl what each step was trained on, and what was passed over before it.

    Opening it drops the lines after `start_step`, as those of metrics are: what a step that is done again read is said
    once. Places between those of one line and the next are what a rollback left out. Raises OSError where the file
    cannot be written to begin with; later ones wait in memory.
    """

    def __init__(self, directory: Path, start_step: int, order: Order, report: Report):
        self.path, self._order = directory / FILE, order
        self._end = _cut(self.path, start_step)
        self._sink = Sink(self.path, report)

    def write(self, step: int, taken: Taken) -> None:
        """The line of one step."""
        if self._end is None:
            self._end = taken.first
            self._sink.append(_line(self._heading(step, taken.first)))
        gap = taken.first - self._end
        if self._order.listed:
            read: dict[str, Any] = {"rows": self._order.numbers(*taken).tolist()}
            passed = self._order.numbers(self._end, gap).tolist() if gap > 0 else []
        else:
            read, passed = {"count": taken.count}, max(gap, 0)
        left_out = {"left_out": passed} if passed else {}
        self._sink.append(_line({"step": step, "first": taken.first} | read | left_out))
        self._end = taken.first + taken.count

    def _heading(self, step: int, place: int) -> dict[str, Any]:
        """What comes before the first line, of `step`: in a stage that an older version began, it is not step 1."""
        sources, listed = [], self._order.listed
        ends = np.cumsum([source.count for source in listed])
        passed = np.zeros(len(listed), np.int64)
        for first in range(0, place if listed else 0, _COUNTED):
            numbers = self._order.numbers(first, min(_COUNTED, place - first))
            passed += np.bincount(np.searchsorted(ends, numbers, side="right"), minlength=len(listed))
        for source, before in zip(listed, passed.tolist(), strict=True):
            said = {"name": source.name, "count": source.count, "kept": ranges(source.kept)}
            sources.append(said | ({"passed": before} if before else {}))
        facts = {"step": step - 1, "format": _FORMAT, "place": place, "epoch": self._order.rows}
        return facts | ({"sources": sources} if sources else {})

    def flush(self) -> int:
        """Try to write what waits; how many lines still wait."""
        return self._sink.flush()

    def close(self) -> None:
        """Write what waits, or say what is lost."""
        self._sink.close()

    def facts(self) -> dict[str, str]:
        """For what a stage says of itself at its end: the digest of the file; nothing where there is none."""
        if not self.path.is_file():
            return {}
        with self.path.open("rb") as file:
            return {"ledger_sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def ranges(rows: np.ndarray | range) -> list[list[int]]:
    """Ascending rows as `[first, end]` of each run of them, the end not among them."""
    if not len(rows):
        return []
    if isinstance(rows, range):
        return [[rows.start, rows.stop]]
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    ends = np.append(starts[1:], len(rows)) - 1
    return [[int(rows[first]), int(rows[last]) + 1] for first, last in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Entry:
    """One line as it was read; None where it is no JSON object with a step."""

    line: bytes
    content: dict[str, Any] | None

    @property
    def torn(self) -> bool:
        """Whether its end is missing: the process was killed while it wrote."""
        return not self.line.endswith(b"\n")


def entries_of(path: Path) -> Iterator[Entry]:
    """The lines of a ledger, one in memory at a time."""
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
                known = isinstance(content, dict) and isinstance(content.get("step"), int)
            except ValueError:
                content, known = None, False
            yield Entry(line, content if known else None)


def _cut(path: Path, last: int) -> int | None:
    """Drop the lines after step `last` and a torn one; the place after those that stay, None where there are none."""
    if not path.exists():
        return None
    kept, place = 0, None
    for entry in entries_of(path):
        if entry.torn or (entry.content and entry.content["step"] > last):
            break
        kept += len(entry.line)
        place = _end_of(entry.content, place)
    os.truncate(path, kept)
    return place


def _end_of(content: dict[str, Any] | None, before: int | None) -> int | None:
    """The place after what a line says; that of the line before where this one was damaged."""
    if content is None:
        return before
    try:
        if "place" in content:
            return int(content["place"])
        return int(content["first"]) + (len(content["rows"]) if "rows" in content else int(content["count"]))
    except (TypeError, KeyError, ValueError):
        return before


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
