"""The offline loop: pretraining, supervised fine-tuning and reward modelling are the same few lines."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from rlhfjax.training.metrics import MetricsWriter, ProgressLine
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
    on_step: Callable[[TrainState, int], dict[str, float]],
) -> TrainState:
    """Run `step_fn` from the state's step to `steps`.

    `on_step` validates and saves when it is time, and returns what it measured. Metrics are written one step late, so
    that the device never waits for the host.
    """
    start = int(state.step)
    progress = ProgressLine(stage, start, steps)
    pending, latest, began = None, {}, time.monotonic()
    for step in range(start + 1, steps + 1):
        state, metrics = step_fn(state, next(batches), jax.random.fold_in(key, step))
        if pending:
            latest |= _write(writer, *pending)
        now = time.monotonic()
        seconds, began = now - began, now
        measured = on_step(state, step)
        began = time.monotonic() if measured else began
        pending = (step, metrics | {"lr": learning_rate(step - 1)} | measured, seconds)
        progress.show(step, {name.split("/")[-1]: latest[name] for name in shown if name in latest})
    if pending:
        _write(writer, *pending)
    progress.close()
    return state


def _write(writer: MetricsWriter, step: int, metrics: dict[str, Any], seconds: float) -> dict[str, float]:
    rate = float(metrics.pop("tokens")) / seconds
    return writer.write(step, metrics | {"perf/train_tokens_per_s": rate})
