"""What the stages do when a guard wants to go back: an older checkpoint, later data, and rows that are written anew."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from rlhfjax.stages.job import Job
from rlhfjax.training.checkpoint import Checkpoints
from rlhfjax.training.guards import Guard, Memory, RollBack, good_before
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.types import Skipped

State = TypeVar("State")


def go_back(
    job: Job,
    guard: Guard,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    restore: Callable[[], tuple[State, int, Memory]],
    rollback: RollBack,
) -> State:
    """The state of the newest checkpoint that was good, or of the start of the stage where there is none.

    Checkpoints after it are deleted: a run that is killed now must not go on from them. `restore()` reads the newest of
    what is left; it gives the state, its step and what the guards knew there.
    """
    checkpoints.forget_after(good_before(checkpoints.steps(), rollback.since) or 0)
    state, step, memory = restore()
    guard.rolled_back(rollback, step, memory)
    writer.back_to(step)
    job.report(f"{job.stage}: rolled back from step {rollback.step} to {step}; the batches in between are left out")
    return state


def restored_counts(skipped: Skipped, memory: Memory) -> Skipped:
    """What a checkpoint's meta counts, in the place of `skipped`."""
    counts = {"total": np.int32(memory.skipped), "in_a_row": np.int32(memory.in_a_row)}
    placed = {name: jax.device_put(count, getattr(skipped, name).sharding) for name, count in counts.items()}
    return Skipped(**placed)
