"""The thread that owns the device: it steps the engines of all models, and does single tasks between two steps."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from rlhfjax.generation import Engine
from rlhfjax.serving.jobs import Delta, Job

_Delivery = tuple[Callable[[Delta], None], Delta]

_PATIENCE = 10.0  # seconds for a step to end


class Full(Exception):
    """As many responses wait as may."""


@dataclass(eq=False)
class Batch:
    """The responses that one engine writes, and those that wait for it."""

    engine: Engine
    jobs: list[Job] = field(default_factory=list)

    def advance(self) -> list[_Delivery]:
        """One more block of tokens for each, and what there is to tell of it."""
        self.engine.step()
        told = [(job.deliver, delta) for job in self.jobs if (delta := job.advance())]
        self.jobs = [job for job in self.jobs if not job.ended]
        return told


class Worker:
    """One thread that all work of the device goes through. `post` hands what came of a step to whoever listens.

    At most `queue` responses wait while no slot is free; who asks for more is told that it is full. Each step admits
    what waits to free slots, so a slot that is given back is taken in the next one.
    """

    def __init__(self, queue: int = 64, post: Callable[[list[_Delivery]], None] | None = None):
        self.queue, self.post = queue, post or _deliver
        self.failure: BaseException | None = None
        self.drawn = self.read = 0  # tokens so far, of responses and of prompts
        self._batches: list[Batch] = []
        self._arrived: deque[tuple[Batch, Job]] = deque()
        self._tasks: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._change, self._closing = threading.Condition(), False
        self._waiting = 0
        self._beat = monotonic()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after its step; what was under way is cancelled. A program that is being compiled goes on."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)

    @property
    def waiting(self) -> int:
        """Responses that have no slot yet."""
        return self._waiting

    @property
    def silent(self) -> float:
        """Seconds since the thread last looked for work, while there is some."""
        return monotonic() - self._beat if self._batches or self._tasks else 0.0

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def submit(self, batch: Batch, jobs: Sequence[Job]) -> None:
        """Let responses wait for slots, all of them or none. Raises Full, and RuntimeError once the device failed."""
        with self._change:
            if self.failure or self._closing:
                raise RuntimeError("the device is gone")
            if self._waiting and self._waiting + len(jobs) > self.queue + batch.engine.free:
                raise Full
            self._waiting += len(jobs)
            self._arrived.extend((batch, job) for job in jobs)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """End a response where it is; the next step gives its slot away."""
        job.response.finish_reason = job.response.finish_reason or "cancelled"

    def call(self, task: Callable[[], Any]) -> Future:
        """What a task of the device gives, done between two steps."""
        future: Future = Future()
        with self._change:
            if self.failure or self._closing:
                raise RuntimeError("the device is gone")
            self._tasks.append((future, task))
            self._change.notify()
        return future

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:  # everyone who waits must hear of it, whatever it was
            self.failure = error
            raise
        finally:
            self._abandon()

    def _round(self) -> bool:
        """Take in what arrived, do one task, and step each engine that has something to write."""
        with self._change:
            while not (self._arrived or self._tasks or self._batches or self._closing):
                self._change.wait()
            if self._closing:
                return False
            arrived, task = list(self._arrived), self._tasks.popleft() if self._tasks else None
            self._arrived.clear()
            self._beat = monotonic()
        for batch, job in arrived:
            self._begin(batch, job)
        if task:
            _fulfil(*task)
        for batch in list(self._batches):
            self._step(batch)
        return True

    def _begin(self, batch: Batch, job: Job) -> None:
        batch.engine.submit(job.response)
        batch.jobs.append(job)
        if batch not in self._batches:
            self._batches.append(batch)

    def _step(self, batch: Batch) -> None:
        before = {job: len(job.response.tokens) for job in batch.jobs}
        told = batch.advance()
        for job, count in before.items():
            drawn = len(job.response.tokens)
            self.drawn += drawn - count
            if not count and (drawn or job.ended):
                self.read += len(job.response.prompt) if drawn else 0
                with self._change:
                    self._waiting -= 1
        if told:
            self.post(told)
        if not batch.jobs:
            self._batches.remove(batch)

    def _abandon(self) -> None:
        """Tell all who wait that nothing comes any more."""
        with self._change:
            self._closing = True
            jobs = [job for batch in self._batches for job in batch.jobs] + [job for _, job in self._arrived]
            tasks, self._waiting = list(self._tasks), 0
        reason = "error" if self.failure else "cancelled"
        self.post([(job.deliver, Delta("", (), len(job.response.tokens), reason)) for job in jobs])
        for future, _ in tasks:
            future.cancel()


def _fulfil(future: Future, task: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)


def _deliver(told: list[_Delivery]) -> None:
    for deliver, delta in told:
        deliver(delta)
