"""Metrics to metrics.jsonl and TensorBoard, sample rows to samples.jsonl, and the progress line."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends one JSON object a step to DIRECTORY/metrics.jsonl; numbers on the device are fetched here.

    Opening it drops what an interrupted run wrote after `start_step`, so that no step appears twice.
    """

    def __init__(self, directory: Path, start_step: int, tensorboard: bool = True):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._file = _open_from(directory / "metrics.jsonl", start_step)
        self._samples = _open_from(directory / "samples.jsonl", start_step)
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Write the metrics of one step; returns them as floats."""
        row = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        return row

    def write_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append sample rows (prompt, response, score, kl, …)."""
        self._samples.writelines(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows)
        self._samples.flush()

    def close(self) -> None:
        self._file.close()
        self._samples.close()
        if self._board:
            self._board.close()


def _open_from(path: Path, start_step: int):
    """Open for appending, without the rows after `start_step` and without a torn last line."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.chmod(part, 0o600)
    part.replace(path)
    return path.open("a", encoding="utf-8")


class ProgressLine:
    """Stage, step, rate, time left and a few metrics on one line; plain lines now and then where no terminal is."""

    def __init__(self, stage: str, start: int, total: int, plain_every: float = 15.0):
        self.stage, self.total, self.start = stage, total, start
        self._began = self._printed = time.monotonic()
        self._plain_every = plain_every
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
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
        elif step == self.total or now - self._printed >= self._plain_every:
            self._printed = now
            print(f"{self.stage:>9}  step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line of its own, above the progress."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _short(item: tuple[str, float]) -> str:
    """`kl 0.12`; parts of a whole in percent: `rollout 31%`, `mfu 42%`."""
    name, value = item
    part = name.removesuffix("_share")
    return f"{part} {value:.0%}" if part != name or name == "mfu" else f"{name} {value:.3g}"
