"""Metrics to metrics.jsonl and TensorBoard, sample rows to samples.jsonl, and the progress line."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rlhfjax.errors import ConfigError
from rlhfjax.plain_json import dumps, number
from rlhfjax.training.ledger import Ledger, Order, Taken
from rlhfjax.training.sinks import Board, Report, Sink, to_stderr


class MetricsWriter:
    """Appends one JSON object a step to DIRECTORY/metrics.jsonl; numbers on the device are fetched here.

    With an `order` a ledger stands beside it, of what each step read (`rlhfjax.training.ledger`).

    Opening it drops what an interrupted run wrote after `start_step`, so that no step appears twice, and reports steps
    that are missing. What cannot be written later waits in memory (`rlhfjax.training.sinks`), and training goes on.
    Of several processes only the first writes; the others know the same numbers. Raises ConfigError when the
    files cannot be written to begin with.
    """

    def __init__(
        self,
        directory: Path,
        start_step: int,
        tensorboard: bool = True,
        report: Report = to_stderr,
        order: Order | None = None,
    ):
        self.directory, self._tensorboard, self._report, self._order = directory, tensorboard, report, order
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        directory, report = self.directory, self._report
        path, samples = directory / "metrics.jsonl", directory / "samples.jsonl"
        writes = jax.process_index() == 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = _keep_until(path, start_step, writes)
            if writes:
                _keep_until(samples, start_step, writes)
            places = (path, samples) if writes else (Path(os.devnull), Path(os.devnull))
            self._file, self._samples = (Sink(place, report) for place in places)
            self._ledger = Ledger(directory, start_step, self._order, report) if self._order and writes else None
            self._board = Board(directory / "tensorboard", start_step, report) if self._tensorboard and writes else None
        except OSError as error:
            raise ConfigError(f"{error.filename or directory}: cannot be written: {error.strerror}") from None
        # The last value of every metric, also of steps before a resume: which checkpoint is best depends on it.
        values = ((name, number(value)) for row in kept for name, value in row.items() if name != "step")
        self.latest: dict[str, float] = {name: value for name, value in values if value is not None}
        missing = sorted(set(range(1, start_step + 1)) - {row["step"] for row in kept})
        if missing and writes:
            report(f"{path} lacks {len(missing)} steps of the {start_step} before, the first is {missing[0]}")

    def back_to(self, step: int) -> None:
        """Drop the rows after `step`, where training goes on from."""
        self.close()
        self._open(step)

    def write(self, step: int, metrics: Mapping[str, Any], taken: Taken | None = None) -> dict[str, float]:
        """Write the metrics of one step, and what it read; returns them as floats."""
        if self._ledger and taken:
            self._ledger.write(step, taken)
        row = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._file.append(_line({"step": step} | row))
        if self._board:
            self._board.write(step, row)
        self.latest |= row
        return row

    def write_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append sample rows (prompt, response, score, kl, …)."""
        for row in rows:
            self._samples.append(_line({"step": step} | row))

    def gaps(self) -> dict[str, Any]:
        """For what a stage says of itself: how many rows of which file could not be written; nothing if all were."""
        waiting = {"metrics.jsonl": self._file.flush(), "samples.jsonl": self._samples.flush()}
        waiting |= {"ledger.jsonl": self._ledger.flush()} if self._ledger else {}
        lost = {name: count for name, count in waiting.items() if count}
        return {"rows_not_written": lost} if lost else {}

    def facts(self) -> dict[str, Any]:
        """For what a stage says of itself at its end: the gaps, and the digest of the ledger."""
        return self.gaps() | (self._ledger.facts() if self._ledger else {})

    def close(self) -> None:
        for sink in (self._file, self._samples, self._board, self._ledger):
            if sink:
                sink.close()


def _line(row: Mapping[str, Any]) -> bytes:
    return (dumps(row) + "\n").encode()


def _keep_until(path: Path, last: int, writes: bool) -> list[dict[str, Any]]:
    """Drop the rows after step `last` and a torn last line, from the file where this process `writes` it; the rest."""
    kept, rows = [], []
    if path.exists():
        # Not splitlines, which also cuts where a text holds U+2028.
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                if row["step"] <= last:
                    kept.append(_line(row).decode())  # and rows of older versions, which wrote NaN, become JSON
                    rows.append(row)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    if not writes:
        return rows
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.chmod(part, 0o600)
    part.replace(path)
    return rows


def labelled(row: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Those of `names` that the row has, by the last part of each, or by all of it where others end alike."""
    last = [name.rpartition("/")[2] for name in names]
    labels = {name: name if last.count(end) > 1 else end for name, end in zip(names, last, strict=True)}
    return {labels[name]: row[name] for name in names if name in row}


class ProgressLine:
    """Stage, step, rate, time left and a few metrics on one line; plain lines now and then where no terminal is.

    Of several processes only the first shows anything.
    """

    def __init__(self, stage: str, start: int, total: int, plain_every: float = 15.0):
        self.stage, self.total, self.start = stage, total, start
        self._began = self._printed = time.monotonic()
        self._plain_every = plain_every
        console = Console(stderr=True)
        self._bar, self._silent = None, jax.process_index() != 0
        if console.is_terminal and not self._silent:
            columns = (
                TextColumn("[bold]{task.description:>9}"),
                BarColumn(20),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(stage, total=total, completed=start, text="compiling")

    def show(self, step: int, shown: Mapping[str, float]) -> None:
        """Report that `step` steps are done."""
        now = time.monotonic()
        rate = (step - self.start) / max(now - self._began, 1e-9)
        left = (self.total - step) / max(rate, 1e-9)
        values = "  ".join(map(_short, shown.items()))
        text = f"{rate:.2f} steps/s  {int(left // 60)}:{int(left % 60):02d} left  {values}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif not self._silent and (step == self.total or now - self._printed >= self._plain_every):
            self._printed = now
            print(f"{self.stage:>9}  step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the progress."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _short(item: tuple[str, float]) -> str:
    """`kl 0.12`; parts of a whole in percent: `rollout 31%`, `mfu 42%`."""
    name, value = item
    part = name.removesuffix("_share")
    return f"{part} {value:.0%}" if part != name or name == "mfu" else f"{name} {value:.3g}"
