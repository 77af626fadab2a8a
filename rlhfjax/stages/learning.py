"""The envelope around the loop of a stage that learns, offline and online alike.

A stage goes on from its newest checkpoint, saves with what its guards know, goes back where a guard wants it, and
closes what it opened, whatever happens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from rlhfjax.config.recipe import FACTS
from rlhfjax.host import marks
from rlhfjax.host.stopping import held
from rlhfjax.models import SequenceModel
from rlhfjax.models.lora import join, split
from rlhfjax.stages import contract
from rlhfjax.stages.compilation import Ahead
from rlhfjax.stages.job import Job
from rlhfjax.training.checkpoint import Checkpoints, meta_of
from rlhfjax.training.guards import Guard, Memory, RollBack, good_before, memory_of, with_rollbacks
from rlhfjax.training.ledger import Order
from rlhfjax.training.local import restored_newest
from rlhfjax.training.loop import Beside, Counts
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.optimizer import learning_rate
from rlhfjax.training.profiling import Trace
from rlhfjax.training.state import abstract
from rlhfjax.types import Params, Skipped

State = TypeVar("State")
Learner = TypeVar("Learner")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Stored(Generic[State]):
    """How a state lies in a checkpoint: its models by item, and the rest of it.

    `whole(fresh, models, training, skipped)` is the state again, in the form of a fresh one.
    """

    models: Callable[[State], dict[str, Params]]
    training: Callable[[State], tuple]
    whole: Callable[[State, dict[str, Params], tuple, Skipped], State]
    skipped: Callable[[State], Skipped]
    step: Callable[[State], int]


class Begun(Generic[Learner]):
    """What a stage begins with, held until its first state is there: what is trained lies in the state alone then.

    `learner` is what `make()` gives, with shapes in the place of the parameters that are trained.
    """

    def __init__(self, make: Callable[[], Learner]):
        whole: Any = make()
        self._make, self._held = make, [whole]
        base, trained = split(whole.params)
        self.learner: Learner = replace(whole, params=join(base, abstract(trained)))

    def whole(self) -> Learner:
        """The learner with its parameters, for the last time: a stage that goes back to its start makes them again."""
        return self._held.pop() if self._held else self._make()

    def let_go(self) -> None:
        """No state is made of them."""
        self._held.clear()


class Learning(Generic[State]):
    """A stage between its checkpoints and its loop. `fresh(learner)` is the state that it begins with, `shapes` its
    shapes. Where there is a checkpoint no such state is made, and what it would be made of is let go before it is read.

    `state` is that of the newest checkpoint, `finished` what the stage said of itself when that was its last one.
    """

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        stored: Stored[State],
        begun: Begun,
        fresh: Callable[[Any], State],
        shapes: State,
        meta: Facts,
    ):
        self._job, self.checkpoints, self._stored, self._meta = job, checkpoints, stored, meta
        self._begun, self._fresh, self._shapes = begun, fresh, shapes
        self.local = job.local_steps()
        self.saved = 0  # the newest step that a checkpoint holds
        self.state, memory, self.finished = self._restored()
        if self.finished and self.local:
            self.local.finish()
        self.guard = Guard(job.run.reliability.guards, job.dir, job.stage, memory)

    def _restored(self) -> tuple[State, Memory, Facts | None]:
        shapes, stored = self._shapes, self._stored
        with marks.inside(marks.RESTORING):
            restored = self._newest(stored.models(shapes), stored.training(shapes))
        self.saved = self.checkpoints.latest() or 0
        if restored is None:
            return self._fresh(self._begun.whole()), Memory(), None
        models, training, meta = restored
        memory = memory_of(meta)
        skipped = _restored_counts(stored.skipped(shapes), memory)
        return stored.whole(shapes, models, training, skipped), memory, meta.get("facts")

    def _newest(self, models: dict[str, Params], training: tuple) -> Any:
        if self.local is None:
            if self.checkpoints.latest() is not None:
                self._begun.let_go()
            return self.checkpoints.restore_newest(models, training)
        rows = self._job.dir / "metrics.jsonl"
        restored, local = restored_newest(self.checkpoints, self.local, rows, models, training, self._begun.let_go)
        if restored and local and (note := self._job.shared.get("note")):
            note(resumed_from={"stage": self._job.stage, "step": restored[2]["step"], "local": True})
        return restored

    def place(self, state: State) -> int:
        """The batch that comes after a state: rollbacks pass over some."""
        return self._stored.step(state) + self.guard.memory.left_out

    def save(self, state: State, facts: Facts | None = None, score: float | None = None) -> None:
        """A checkpoint; with `facts` the last one of the stage, `score` is what the best is chosen by."""
        told = self._meta | {"facts": facts, "guards": self.guard.memory.saved()}
        models, training = self._stored.models(state), self._stored.training(state)
        self.saved = self._stored.step(state)
        with marks.inside(marks.SAVING):
            self.checkpoints.save(self.saved, models, training, told, score, self.writer.latest)

    def spare(self, state: State, step: int) -> Callable[[], None] | None:
        """What saves a step on the hosts' own disks, when that is due."""
        local = self.local
        if local is None or step % local.every:
            return None
        told = {"facts": None, "guards": self.guard.memory.saved()}
        return lambda: local.save(step, self._stored.models(state), self._stored.training(state), told)

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches on the mesh, between which failed saves show."""
        return marks.followed(marks.DATA, self.checkpoints.watched(self._job.put(batches)))

    def beside(
        self,
        ahead: Ahead,
        rate: Callable[[int], Any],
        shown: tuple[str, ...],
        flops: Callable[[Counts], float] | None,
    ) -> Beside:
        """The companions of the loop. After a rollback all is compiled."""
        job, plan = self._job, contract.current()
        return Beside(
            stage=job.stage,
            writer=self.writer,
            learning_rate=rate,
            shown=(*shown, "plan/step_ratio") if plan else shown,
            flops=flops,
            watch=self.watch,
            guard=self.guard,
            trace=Trace(job.dir, job.run.profile, job.stage),
            first_step=None if ahead.facts else ahead.first_step,
            spare=self.spare,
            expected=plan and plan.expected(job.stage, FACTS[job.stage].online),
        )

    def run(self, train: Callable[[State], State], finish: Callable[[State], Facts], order: Order) -> Facts:
        """`finish` of what `train` makes of the state; the stage reads rows in an `order`, of which it keeps a ledger.

        A stage that is asked to stop ends the save that is under way.

        Raises ConfigError where metrics cannot be written, and what the loop raises.
        """
        board = self._job.run.logging.tensorboard
        self.writer = MetricsWriter(self._job.dir, self._stored.step(self.state), board, order=order)
        self.watch = self._job.watch()
        with held(), ExitStack() as opened:
            for each in (self.local, self.checkpoints, self.writer, self.watch):
                if each:
                    opened.enter_context(closing(each))
            facts = finish(with_rollbacks(train, self.state, self._back))
        if self.local:
            self.local.finish()
        return facts

    def facts(self) -> Facts:
        """What there is to say of the way: how long a stop would have taken, rows not written, what guards did."""
        return self.watch.facts() | self.writer.facts() | self.guard.memory.told()

    def _back(self, rollback: RollBack) -> State:
        """The state of the newest checkpoint that was good, or of the start of the stage where there is none.

        Checkpoints after it are deleted: a run that is killed now must not go on from them.
        """
        if self.local:
            self.local.forget()
        self.checkpoints.forget_after(good_before(self.checkpoints.steps(), rollback.since) or 0)
        state, memory, _ = self._restored()
        step = self._stored.step(state)
        self.guard.rolled_back(rollback, step, memory)
        self.writer.back_to(step)
        self._job.report(
            f"{self._job.stage}: rolled back from step {rollback.step} to {step}; the batches in between are left out"
        )
        return state


def meta_for(job: Job, role: str, model: SequenceModel, averaged: bool) -> Facts:
    """What a checkpoint of a stage says of its model."""
    return meta_of(role, model, job.tokenizer, averaged=averaged, stage=job.stage, **job.lineage())


def rate_of(optimizer: Any, steps: int, model: SequenceModel) -> Callable[[int], Any]:
    """The learning rate after so many updates."""
    return learning_rate(optimizer, steps, width=model.config.width)


def _restored_counts(skipped: Skipped, memory: Memory) -> Skipped:
    """What a checkpoint's meta counts, in the place of `skipped`."""
    counts = {"total": np.int32(memory.skipped), "in_a_row": np.int32(memory.in_a_row)}
    placed = {name: jax.device_put(count, getattr(skipped, name).sharding) for name, count in counts.items()}
    return Skipped(**placed)
