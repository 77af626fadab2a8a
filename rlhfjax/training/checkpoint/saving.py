"""The checkpoints of one stage, saved while training goes on and restored from the newest that is whole."""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax import faults
from rlhfjax.errors import ConfigError, IntegrityError, RlhfjaxError, Stopped
from rlhfjax.host import exchange, processes
from rlhfjax.training.checkpoint import steps as on_disk
from rlhfjax.training.checkpoint.interrupts import uninterrupted
from rlhfjax.training.checkpoint.items import joined, read_item, told_entries
from rlhfjax.training.checkpoint.meta import read_meta
from rlhfjax.training.checkpoint.retention import Retention
from rlhfjax.training.checkpoint.writing import arguments, by_item, saver
from rlhfjax.training.digests import Pending, fetched, started

_log = logging.getLogger("rlhfjax")
Restored = tuple[dict[str, Any], Any, dict[str, Any]]


class Checkpoints:
    """The checkpoints of one stage; saving is asynchronous, `close` waits for the last one.

    `Retention` says which stay. Raises ConfigError when the directory cannot be written to. A save that failed raises
    Stopped at the next call of `save`, `wait` or `check`, or from a loop over `watched`.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        keep_best: bool = False,
        *,
        keep_every: int | None = None,
        best_metric: str | None = None,
        fall_back: bool = True,
        report: Callable[[str], None] = _log.warning,
    ):
        self.directory = Path(os.path.abspath(directory))
        self._retention = Retention(keep, keep_every, keep_best, best_metric)
        self._fall_back, self._report = fall_back, report
        self._committing: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        processes.by_first(self._prepare, "checkpoints")
        self._saver = saver()
        logging.getLogger("absl").addFilter(_not_about_failed_saves)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self._steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest score; the newest one where scores are not kept."""
        steps = self._steps()
        best = self._retention.best(self.directory, steps)
        return max(steps, default=None) if best is None else best

    def steps(self) -> list[int]:
        """The steps that are on the disk, in their order."""
        return self._steps()

    def forget_after(self, step: int) -> None:
        """Delete the steps after this one, which training goes back to."""

        def forget() -> None:
            for later in on_disk.steps_in(self.directory):
                if later > step:
                    on_disk.remove(self.directory / str(later))

        self._steps()  # nothing is being saved any more
        # In one turn: a process that comes late sees fewer steps than the first, and would take fewer turns than that.
        processes.by_first(forget, f"forget after {step}")

    def save(
        self,
        step: int,
        models: Mapping[str, Any],
        training: Any,
        meta: Mapping[str, Any],
        score: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save a step, and return as soon as its arrays may change.

        `metrics` are those of the step, for the one that says which step is best. Raises Stopped when there is no room
        for it, or when the save before failed; the steps before stay.
        """
        self.wait()
        items = {**models, "training": training}
        processes.by_first(lambda: self._require_room(step, items), f"room for {step}")
        described = dict(meta) | {"step": step} | self._retention.figures(score, metrics or {})
        args, turn = arguments(items, described), processes.turn_of("saved")
        part = on_disk.unfinished(self.directory / str(step))
        with uninterrupted():
            digests = started(items)
            try:
                self._saver.save(part, args=args, force=True)
            except Exception as error:
                self._drop(part)
                raise self._stopped(step, _reason(error)) from error
            self._committing = threading.Thread(
                target=self._commit, args=(step, part, digests, turn), name=f"commit {step}"
            )
            self._committing.start()
            faults.reach("save", step)

    def watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, and a save that failed is raised before the next of them."""
        for batch in batches:
            self.check()
            yield batch

    def check(self) -> None:
        """Raises Stopped when a save has failed, once."""
        if self._failed:
            (step, error), self._failed = self._failed, None
            raise self._stopped(step, _reason(error)) from error

    def wait(self) -> None:
        """Until everything is on disk. Raises as `check`."""
        if self._committing:
            with uninterrupted():
                self._committing.join()
            self._committing = None
        self.check()

    def restore(self, step: int, models: Mapping[str, Any], training: Any) -> Restored:
        """Models, training state and meta of a step, in the shapes and shardings of the given abstract trees.

        Raises IntegrityError when the step is not what was written.
        """
        self.wait()
        place, items = self.directory / str(step), {**models, "training": training}
        meta = read_meta(place)
        found = {name: read_item(place, name, tree, "cannot be read") for name, tree in items.items()}
        return {name: found[name] for name in models}, found["training"], meta

    def restore_newest(self, models: Mapping[str, Any], training: Any) -> Restored | None:
        """`restore` of the newest step that is whole, None where there is no step.

        A damaged one is set aside as STEP.damaged, with a line that names the file, once an older one was restored.
        Raises IntegrityError when none is whole or the run is not to fall back, ConfigError when the disk has no room
        for the next save.
        """
        items = {**models, "training": training}
        processes.by_first(lambda: self._require_room(None, items), "room")
        damaged: dict[int, IntegrityError] = {}
        for step in reversed(self._steps()):
            try:
                restored = self.restore(step, models, training)
            except IntegrityError as error:
                if not self._fall_back:
                    raise
                damaged[step] = error
                continue
            processes.by_first(lambda good=step: self._leave_out(damaged, good), "damaged steps")
            return restored
        if damaged:
            newest = damaged[max(damaged)]
            raise IntegrityError(f"{newest} (no older step in {self.directory} is whole)") from newest
        return None

    def close(self) -> None:
        """Wait until everything is on disk. Raises as `check`."""
        try:
            self.wait()
        finally:
            with uninterrupted():
                self._saver.close()
            logging.getLogger("absl").removeFilter(_not_about_failed_saves)

    def _commit(self, step: int, part: Path, digests: Pending, turn: str) -> None:
        """In a thread: once Orbax is done, the manifests and then the name; after that, steps that need not stay go."""
        try:
            arrays = by_item(fetched(digests))  # while Orbax writes
            self._saver.wait_until_finished()
            if processes.is_first():
                faults.reach("commit", step)
            if told := exchange.collected(turn, told_entries(part)):
                on_disk.put_in_place(part, self.directory / str(step), arrays, joined(told))
                steps = on_disk.steps_in(self.directory)
                for old in set(steps) - self._retention.of(self.directory, steps):
                    on_disk.remove(self.directory / str(old))
        except BaseException as error:
            self._drop(part)
            self._failed = step, error

    def _drop(self, part: Path) -> None:
        """A save that failed leaves nothing: a full disk would stay full of it."""
        for left in self.directory.glob(f"{part.name}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _prepare(self) -> None:
        on_disk.require_writable(self.directory)
        on_disk.tidy(self.directory, self._report)

    def _steps(self) -> list[int]:
        self.wait()
        processes.barrier("saved")  # the first of several processes gives a step its name
        return on_disk.steps_in(self.directory)

    def _require_room(self, step: int | None, items: Mapping[str, Any]) -> None:
        try:
            missing = on_disk.shortage(self.directory, _bytes(items))
        except OSError as error:
            missing = f"{self.directory}: {error.strerror}"
        if missing and step is None:
            raise ConfigError(f"{missing}; make room, or use another --run-dir")
        if missing:
            raise self._stopped(step, missing)

    def _leave_out(self, damaged: Mapping[int, IntegrityError], good: int) -> None:
        for step, error in damaged.items():
            aside = on_disk.set_aside(self.directory / str(step))
            self._report(f"{error}\nset aside as {aside.name}; going on from step {good}")

    def _stopped(self, step: int | None, reason: str) -> RlhfjaxError:
        last = max(on_disk.steps_in(self.directory), default=None)
        kept = "no step before it is there" if last is None else f"step {last} is whole"
        stopped = Stopped(
            f"{self.directory / str(step)} could not be saved: {reason}\n{kept}; make room or repair the directory, "
            "and run the same command again"
        )
        stopped.everywhere = processes.count() == 1  # pyright: ignore[reportAttributeAccessIssue]  # others know nothing
        return stopped


def _bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of the shapes of some."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _reason(error: BaseException) -> str:
    """One line. What tensorstore says of a full disk is ten."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any("No space left" in line or "RESOURCE_EXHAUSTED" in line for line in lines):
        return "No space left on device"
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {lines[0][:300]}"


def _not_about_failed_saves(record: logging.LogRecord) -> bool:
    return not record.exc_info or "orbax" not in record.pathname  # `check` says it in two lines, without a traceback
