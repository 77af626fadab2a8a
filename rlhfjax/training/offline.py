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
    measure: Callable[[TrainState, int], dict[str, float]],
    keep: Callable[[TrainState, int, dict[str, float]], Callable[[], None] | None],
) -> TrainState:
    """Run `step_fn` from the state's step to `steps`.

    `measure` validates when it is time; `keep` gives what saves the state when that is due. Metrics are written one
    step late, so that the device never waits for the host, but before a save: what is saved has its row.
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
        measured = measure(state, step)
        pending = (step, metrics | {"lr": learning_rate(step - 1)} | measured, seconds)
        if save := keep(state, step, measured):
            latest |= _write(writer, *pending)
            pending = None
            save()
        began = time.monotonic() if measured or save else began
        progress.show(step, {name.split("/")[-1]: latest[name] for name in shown if name in latest})
    if pending:
        _write(writer, *pending)
    progress.close()
    return state


def _write(writer: MetricsWriter, step: int, metrics: dict[str, Any], seconds: float) -> dict[str, float]:
    rate = float(metrics.pop("tokens")) / seconds
    return writer.write(step, metrics | {"perf/train_tokens_per_s": rate})
