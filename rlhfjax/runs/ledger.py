"""The ledger of a stage, checked: every row of an epoch once, over kills, rollbacks and other numbers of processes.

What is checked stands in the file itself and in the metrics beside it; nothing is asked of the code that wrote them.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.errors import IntegrityError
from rlhfjax.runs.directory import COMPLETE
from rlhfjax.training.ledger import FILE, Entry, entries_of

_ROLLBACKS = "guard/rollbacks"


def stages_with_ledgers(root: Path) -> list[Path]:
    """Of a run or a stage: the folders that have a ledger, or say that they had one."""
    folders = [root, *sorted(path for path in root.glob("*/") if not path.is_symlink() or path.is_dir())]
    return [folder for folder in folders if (folder / FILE).is_file() or "ledger_sha256" in _told(folder)]


def require_right(stage_dir: Path) -> str:
    """What a stage's ledger says, in a line. Raises IntegrityError that names the first step and row that do not fit.

    A stage that is under way answers for what it has saved; the steps after that are dropped when it goes on.
    """
    path, told = stage_dir / FILE, _told(stage_dir)
    if not path.is_file():
        raise IntegrityError(f"{path}: expected it, as {COMPLETE} says, got nothing")
    try:
        said = _Check(stage_dir, bool(told)).run()
    except _Wrong as error:
        raise IntegrityError(f"{path}: {error}") from None
    if "ledger_sha256" in told:
        import hashlib

        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != told["ledger_sha256"]:
            expected = str(told["ledger_sha256"])[:12]
            raise IntegrityError(f"{path}: expected SHA-256 {expected}…, as {COMPLETE} has it, got {digest[:12]}…")
    return f"{path}: {said}"


class _Wrong(Exception):
    """What does not fit."""


@dataclass
class _Source:
    """The rows of one source that are read again and again: all of them before any comes again."""

    name: str
    kept: np.ndarray  # [count] bools
    position: int  # rows that were read so far
    size: int = 0
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [count] the turn in which a row came last
    at: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [count] the step at which it did

    def __post_init__(self) -> None:
        self.size = int(self.kept.sum())
        self.seen, self.at = np.zeros(len(self.kept), np.int32), np.zeros(len(self.kept), np.int32)

    def take(self, rows: np.ndarray, step: int) -> None:
        """Rows as they were read, at `step`. Raises _Wrong."""
        if not self.kept[rows].all():
            row = rows[~self.kept[rows]][0]
            raise _Wrong(f"step {step}: row {row} of {self.name} is none of the {self.size} that the stage reads")
        while len(rows):
            turn = self.position // self.size + 1
            part, rows = np.split(rows, [self.size - self.position % self.size])
            first = np.zeros(len(part), bool)
            first[np.unique(part, return_index=True)[1]] = True
            wrong = part[(self.seen[part] == turn) | ~first]
            if len(wrong):
                before = self.at[wrong[0]] if self.seen[wrong[0]] == turn else step
                raise _Wrong(
                    f"step {step}: row {wrong[0]} of {self.name} comes a second time in epoch {turn} of its rows, "
                    f"after step {before}"
                )
            self.seen[part], self.at[part] = turn, step
            self.position += len(part)


class _Check:
    """One pass through a ledger and the metrics beside it."""

    def __init__(self, stage_dir: Path, complete: bool):
        self._entries = entries_of(stage_dir / FILE)
        self._metrics = _metrics(stage_dir / "metrics.jsonl")
        saved = [int(path.name) for path in (stage_dir / "checkpoints").glob("*") if path.name.isdigit()]
        self._bound = float("inf") if complete else max(saved, default=0)
        self._steps = self._rows = self._left_out = 0

    def run(self) -> str:
        """A line that says what was found. Raises _Wrong."""
        heading = next(self._entries, None)
        if heading is None or heading.content is None:
            if self._bound:
                raise _Wrong("expected a heading in its first line, got none")
            return "nothing in it yet"
        start = self._read_heading(heading.content)
        rollbacks = 0
        for step, told in self._metrics:
            if step >= start:
                self._metrics = itertools.chain([(step, told)] if step > start else [], self._metrics)
                rollbacks = told if step == start else 0
                break
        for step in itertools.count(start + 1):
            entry, (told_step, told) = next(self._entries, None), next(self._metrics, (None, None))
            if entry is None and told_step is None:
                break
            if step > self._bound and (entry is None or entry.content is None or entry.torn or told_step is None):
                break  # killed in the middle of this step, or writing it just now
            content = self._of_step(step, entry, told_step)
            left_out = self._take(step, content)
            if told is not None and bool(left_out) != (told > (rollbacks or 0)):
                noted = "one is" if told > (rollbacks or 0) else "none is"
                raise _Wrong(
                    f"step {step}: {left_out} rows are left out, as a rollback leaves them out, and {noted} noted "
                    f"there ({_ROLLBACKS} in metrics.jsonl)"
                )
            rollbacks = told
        return self._summary()

    def _read_heading(self, heading: Mapping[str, Any]) -> int:
        try:
            self._place, self._epoch = int(heading["place"]), int(heading["epoch"])
            self._sources = [_source(said) for said in heading.get("sources", ())]
            self._before = np.cumsum([0, *(len(source.kept) for source in self._sources)])
            return int(heading["step"])
        except (KeyError, TypeError, ValueError, IndexError):
            raise _Wrong("expected a heading in its first line, got something else") from None

    def _of_step(self, step: int, entry: Entry | None, told_step: int | None) -> Mapping[str, Any]:
        if entry is None:
            raise _Wrong(f"step {step}: it is not there, and metrics.jsonl has step {told_step}")
        if entry.content is None or entry.torn:
            raise _Wrong(f"step {step}: expected a line with it, got one that cannot be read")
        if entry.content["step"] != step:
            raise _Wrong(f"step {step}: expected it, got step {entry.content['step']}")
        if told_step != step:
            raise _Wrong(f"step {step}: it is there, and metrics.jsonl has {told_step or 'no such step'}")
        return entry.content

    def _take(self, step: int, content: Mapping[str, Any]) -> int:
        """What a step read, and what was passed over before it; how many rows that was."""
        try:
            first = int(content["first"])
            if self._sources:
                left_out = np.asarray(content.get("left_out", ()), np.int64)
                numbers = np.concatenate([left_out, np.asarray(content["rows"], np.int64)])
                passed, count = len(left_out), len(numbers) - len(left_out)
            else:
                passed, count, numbers = int(content.get("left_out", 0)), int(content["count"]), None
        except (KeyError, TypeError, ValueError, OverflowError):
            raise _Wrong(f"step {step}: expected what it read, got a line without") from None
        if first != self._place + passed:
            raise _Wrong(f"step {step}: expected it to begin at place {self._place + passed}, got {first}")
        if count < 1:
            raise _Wrong(f"step {step}: expected rows that it read, got {count}")
        if numbers is not None:
            self._take_rows(step, numbers)
        self._place = first + count
        self._steps, self._rows, self._left_out = self._steps + 1, self._rows + count, self._left_out + passed
        return passed

    def _take_rows(self, step: int, numbers: np.ndarray) -> None:
        beyond = numbers[(numbers < 0) | (numbers >= self._before[-1])]
        if len(beyond):
            raise _Wrong(f"step {step}: expected a row below {self._before[-1]}, got {beyond[0]}")
        which = np.searchsorted(self._before, numbers, side="right") - 1
        for index, source in enumerate(self._sources):
            source.take(numbers[which == index] - self._before[index], step)

    def _summary(self) -> str:
        left_out = f", {self._left_out:,} more left out by rollbacks" if self._left_out else ""
        said = f"{self._steps:,} steps, {self._rows:,} rows{left_out}"
        if not self._sources:
            return f"{said}; an epoch has {self._epoch:,}, each place of the order was read once"
        epochs = (f"{source.name} {source.position / source.size:.2f} of {source.size:,}" for source in self._sources)
        return f"{said}; each row once an epoch: {', '.join(epochs)}"


def _source(said: Mapping[str, Any]) -> _Source:
    kept = np.zeros(int(said["count"]), bool)
    for first, end in said["kept"]:
        kept[int(first) : int(end)] = True
    if not kept.any():
        raise ValueError
    return _Source(str(said["name"]), kept, int(said.get("passed", 0)))


def _metrics(path: Path) -> Iterator[tuple[int, int | None]]:
    """The steps that have a row, each with the rollbacks that it counts, None where it counts none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                yield int(row["step"]), int(row[_ROLLBACKS]) if _ROLLBACKS in row else None
            except (ValueError, KeyError, TypeError):
                continue


def _told(stage_dir: Path) -> dict[str, Any]:
    """What a finished stage says of itself; nothing of one that is not, or whose mark cannot be read."""
    try:
        told = json.loads((stage_dir / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
