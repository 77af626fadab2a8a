"""The offline loop: pretraining, supervised fine-tuning and reward modelling are the same few lines."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhfjax import faults
from rlhfjax.training import stopping
from rlhfjax.training.flops import machine_peak
from rlhfjax.training.guards import Guard, write_row
from rlhfjax.training.metrics import MetricsWriter, ProgressLine, labelled
from rlhfjax.training.profiling import Trace
from rlhfjax.training.supervision import Watch
from rlhfjax.types import TrainState

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


def train_offline(
    step_fn: Step,
    state: TrainState,
    batches: Iterator[Any],
    *,
    steps: int,
    key: jax.Array,
    stage: str,
    writer: MetricsWriter,
    learning_rate: Callable[[int], Any],
    shown: tuple[str, ...],
    measure: Callable[[TrainState, int], dict[str, float]],
    keep: Callable[[TrainState, int, dict[str, float], bool], Callable[[], None] | None],
    flops: Callable[[Mapping[str, float]], float] | None = None,
    trace: Trace | None = None,
    first_step: Callable[[], str] | None = None,
    guard: Guard | None = None,
    rows: Callable[[int], Any] = lambda step: None,
    watch: Watch | None = None,
) -> TrainState:
    """Run `step_fn` from the state's step to `steps`.

    `measure` validates when it is time; `keep` gives what saves the state when that is due, or when its last argument
    says that `watch` heard a request to stop, which ends the loop after that step; `flops` are the model FLOPs of a
    step by its counts; `first_step` is called when the first one is done, for a line to show. Metrics are written one
    step late, so that the device never waits for the host, but before a save: what is saved has its row, and `guard`
    has seen that. `rows` numbers the rows that a step reads.
    """
    start = int(state.step)
    progress, trace = ProgressLine(stage, start, steps), trace or Trace(writer.directory, None, stage)
    write = partial(_write, partial(write_row, guard, writer, progress), learning_rate, flops)
    pending, latest, began, watch, stop = None, {}, time.monotonic(), watch or Watch(), False
    for step in range(start + 1, steps + 1):
        watch.begin(stage, step)
        with trace.step(step):
            state, metrics = step_fn(state, next(batches), jax.random.fold_in(key, step), *_poison(step))
            if pending:
                latest |= write(*pending)
            if step == start + 1 or trace.running:
                jax.block_until_ready(metrics)
        if step == start + 1:
            if first_step:
                progress.note(first_step())
            if flops:
                machine_peak()  # where it has to be measured, that must not fall into a step
        now = time.monotonic()
        seconds, began = now - began, now
        watch.begin("measure", step)
        measured = measure(state, step)
        watch.end()
        stop = watch.asked()
        pending = (step, metrics | measured, seconds, rows(step))
        if save := keep(state, step, measured, stop):
            watch.begin("save", step)
            latest |= write(*pending)
            pending = None
            save()
            watch.end()
        if stop:
            break
        began = time.monotonic() if measured or save else began
        progress.show(step, labelled(latest, shown))
    trace.close()
    if pending:
        write(*pending)
    progress.close()
    if stop and int(state.step) != steps:
        raise stopping.stop()
    return state


def _poison(step: int) -> tuple[np.float32, ...]:
    """One more argument of the step, which only a process with such a fault on purpose compiles."""
    return (np.float32(faults.factor("update", step)),) if faults.wanted("update") else ()


def _write(
    write: Callable[[int, dict[str, Any], Any], dict[str, float]],
    learning_rate: Callable[[int], Any],
    flops: Callable[[Mapping[str, float]], float] | None,
    step: int,
    metrics: dict[str, Any],
    seconds: float,
    rows: Any,
) -> dict[str, float]:
    counts = {name: float(metrics[name]) for name in ("tokens", "work/tokens", "work/pairs") if name in metrics}
    speed = {"timing/step_s": seconds, "perf/train_tokens_per_s": counts["tokens"] / seconds}
    if flops and "work/pairs" in counts:
        speed["perf/mfu"] = flops(counts) / (seconds * machine_peak())
    rate = {"lr": learning_rate(int(metrics.get("updates", step - 1)))}  # skipped updates do not move the schedule
    logged = {name: value for name, value in metrics.items() if name not in _UNLOGGED and not name.startswith("work/")}
    return write(step, logged | rate | speed, rows)


_UNLOGGED = ("tokens", "updates")
