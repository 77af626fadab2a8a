"""The offline loop: pretraining, supervised fine-tuning and reward modelling are the same few lines."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from rlhfjax.training.flops import machine_peak
from rlhfjax.training.metrics import MetricsWriter, ProgressLine
from rlhfjax.training.profiling import Trace
from rlhfjax.types import TrainState

Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, Any]]]


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
    keep: Callable[[TrainState, int, dict[str, float]], Callable[[], None] | None],
    flops: Callable[[Mapping[str, float]], float] | None = None,
    trace: Trace | None = None,
    first_step: Callable[[], str] | None = None,
) -> TrainState:
    """Run `step_fn` from the state's step to `steps`.

    `measure` validates when it is time; `keep` gives what saves the state when that is due; `flops` are the model FLOPs
    of a step by its counts; `first_step` is called when the first one is done, for a line to show. Metrics are written
    one step late, so that the device never waits for the host, but before a save: what is saved has its row.
    """
    start = int(state.step)
    progress, trace = ProgressLine(stage, start, steps), trace or Trace(writer.directory, None, stage)
    pending, latest, began = None, {}, time.monotonic()
    for step in range(start + 1, steps + 1):
        with trace.step(step):
            state, metrics = step_fn(state, next(batches), jax.random.fold_in(key, step))
            if pending:
                latest |= _write(writer, *pending, flops)
            if step == start + 1 or trace.running:
                jax.block_until_ready(metrics)
        if step == start + 1:
            if first_step:
                progress.note(first_step())
            if flops:
                machine_peak()  # where it has to be measured, that must not fall into a step
        now = time.monotonic()
        seconds, began = now - began, now
        measured = measure(state, step)
        pending = (step, metrics | {"lr": learning_rate(step - 1)} | measured, seconds)
        if save := keep(state, step, measured):
            latest |= _write(writer, *pending, flops)
            pending = None
            save()
        began = time.monotonic() if measured or save else began
        progress.show(step, {name.split("/")[-1]: latest[name] for name in shown if name in latest})
    trace.close()
    if pending:
        _write(writer, *pending, flops)
    progress.close()
    return state


def _write(
    writer: MetricsWriter,
    step: int,
    metrics: dict[str, Any],
    seconds: float,
    flops: Callable[[Mapping[str, float]], float] | None,
) -> dict[str, float]:
    counts = {name: float(metrics[name]) for name in ("tokens", "work/pairs") if name in metrics}
    speed = {"timing/step_s": seconds, "perf/train_tokens_per_s": counts["tokens"] / seconds}
    if flops and "work/pairs" in counts:
        speed["perf/mfu"] = flops(counts) / (seconds * machine_peak())
    logged = {name: value for name, value in metrics.items() if name != "tokens" and not name.startswith("work/")}
    return writer.write(step, logged | speed)
