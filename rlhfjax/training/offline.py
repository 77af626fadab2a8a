"""The offline loop: pretraining, supervised fine-tuning, reward modelling and DPO are the same few lines."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhfjax import faults
from rlhfjax.host import marks, stopping
from rlhfjax.training.ledger import Taken
from rlhfjax.training.loop import Beside, Counts, Log
from rlhfjax.types import TrainState

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


def train_offline(
    step_fn: Step,
    state: TrainState,
    batches: Iterator[Any],
    *,
    steps: int,
    key: jax.Array,
    beside: Beside,
    measure: Callable[[TrainState, int], dict[str, float]],
    keep: Callable[[TrainState, int, dict[str, float], bool], Callable[[], None] | None],
    taken: Callable[[int], Taken | None] = lambda step: None,
) -> TrainState:
    """Run `step_fn` from the state's step to `steps`.

    `measure` validates when it is time; `keep` gives what saves the state when that is due, or when its last argument
    says that there was a request to stop, which ends the loop after that step. `taken` says what a step
    reads. Raises what it was asked to stop with.
    """
    start, watch, trace, stop = int(state.step), beside.watch, beside.trace, False
    log, began = Log(beside, start, steps), time.monotonic()
    for step in range(start + 1, steps + 1):
        watch.begin(beside.stage, step)
        with trace.step(step):
            state, metrics = step_fn(state, next(batches), jax.random.fold_in(key, step), *_poison(step))
            log.write()  # the row of the step before, while the device takes this one
            if step == start + 1 or trace.running:
                with marks.inside(marks.PROGRAM):
                    jax.block_until_ready(metrics)
        log.step_done(step)
        seconds, began = time.monotonic() - began, time.monotonic()
        watch.begin("measure", step)
        measured = measure(state, step)
        watch.end()
        stop = watch.asked()
        log.later(step, {"updates": step - 1} | metrics | measured, seconds, partial(_rates, seconds), taken(step))
        if save := keep(state, step, measured, stop) or (beside.spare(state, step) if step != steps else None):
            watch.begin("save", step)
            log.write()  # a run that is killed after the save has the row
            save()
            watch.end()
        if stop:
            break
        began = time.monotonic() if measured or save else began
        log.show(step)
    log.close()
    if stop and int(state.step) != steps:
        raise stopping.stop()
    return state


def _poison(step: int) -> tuple[np.float32, ...]:
    """One more argument of the step, which only a process with such a fault on purpose compiles."""
    return (np.float32(faults.factor("update", step)),) if faults.wanted("update") else ()


def _rates(seconds: float, counts: Counts) -> dict[str, float]:
    return {"timing/step_s": seconds, "perf/train_tokens_per_s": counts["tokens"] / seconds}
