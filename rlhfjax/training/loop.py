"""Companions of both loops: rows of metrics, a progress line, guards, deadlines and traces.

None of it changes a number that is trained on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from rlhfjax.host import marks, time_ledger
from rlhfjax.training.expected import Expected
from rlhfjax.training.flops import machine_peak
from rlhfjax.training.guards import Guard, write_row
from rlhfjax.training.ledger import Taken
from rlhfjax.training.metrics import MetricsWriter, ProgressLine, labelled
from rlhfjax.training.profiling import Trace
from rlhfjax.training.supervision import Watch

Metrics = dict[str, Any]
Counts = Mapping[str, float]

_COUNTED = ("tokens", "policy/epochs_run")  # and work/*: rates are worked out from them


@dataclass(frozen=True)
class Beside:
    """The companions of a loop.

    `learning_rate(updates)` is that after so many optimizer steps; `shown` are the metrics of the progress line;
    `flops(counts)` the model FLOPs of a step; `first_step` is called when the first step is done, for a line to show;
    `spare(state, step)` gives what saves a state on the hosts' own disks, when that is due; `expected` is what a plan
    says of its steps.
    """

    stage: str
    writer: MetricsWriter
    learning_rate: Callable[[int], Any]
    shown: tuple[str, ...] = ()
    flops: Callable[[Counts], float] | None = None
    watch: Watch = field(default_factory=Watch)
    guard: Guard | None = None
    trace: Trace = field(default_factory=lambda: Trace(Path(), None, ""))
    first_step: Callable[[], str] | None = None
    spare: Callable[[Any, int], Callable[[], None] | None] = lambda state, step: None
    expected: Expected | None = None


class Log:
    """The rows and the progress line of a loop from step `start` to `total`.

    A row waits until the device works on the next step, so that the device never waits for the host; it is written
    before a save, so that what is saved has its row and the guard has seen it.
    """

    def __init__(self, beside: Beside, start: int, total: int):
        self._beside, self._first, self._total = beside, start + 1, total
        self._progress = ProgressLine(beside.stage, start, total)
        self._pending: tuple | None = None
        self._latest: dict[str, float] = {}
        marks.done(start)

    def step_done(self, step: int) -> None:
        """After each step; the first one has compiled."""
        marks.done(step)
        if step != self._first:
            return
        if self._beside.first_step:
            self._progress.note(self._beside.first_step())
        if self._beside.flops:
            machine_peak()  # where it has to be measured, that must not fall into a step

    def later(
        self,
        step: int,
        metrics: Metrics,
        seconds: float,
        rates: Callable[[Counts], dict[str, float]],
        taken: Taken | None = None,
    ) -> None:
        """The row of a step that took `seconds` and read what was `taken`; `rates` are worked out from its counts."""
        self._pending = step, metrics, seconds, rates, taken

    def write(self) -> None:
        """The row that waits, if there is one. Raises Diverged or RollBack where the guard says so."""
        if self._pending is None:
            return
        (step, metrics, seconds, rates, taken), self._pending = self._pending, None
        with marks.inside(marks.PROGRAM):
            jax.block_until_ready(metrics)
        counts = {name: float(metrics[name]) for name in metrics if name in _COUNTED or name.startswith("work/")}
        row = {name: value for name, value in metrics.items() if name not in ("tokens", "updates")}
        row = {name: value for name, value in row.items() if not name.startswith("work/")}
        # The schedule follows the optimizer's own count: steps that were skipped, or left out, do not move it.
        row["lr"] = self._beside.learning_rate(int(metrics["updates"]))
        row |= rates(counts) | time_ledger.facts()
        if self._beside.flops and "work/pairs" in counts:
            row["perf/mfu"] = self._beside.flops(counts) / (seconds * machine_peak())
        if self._beside.expected and step != self._first:
            row |= self._beside.expected.compared(row, self._progress.note)
        self._latest |= write_row(self._beside.guard, self._beside.writer, self._progress, step, row, taken)

    def show(self, step: int) -> None:
        """The progress line after a step."""
        self._progress.show(step, labelled(self._latest, self._beside.shown))

    def close(self) -> None:
        """Write what waits and end the line."""
        self._beside.trace.close()
        self.write()
        self._progress.close()
