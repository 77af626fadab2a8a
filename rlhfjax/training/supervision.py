"""Supervision of a loop: deadlines, requests to stop, faults on purpose, and how long things took."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from rlhfjax import faults
from rlhfjax.config.upkeep import Deadlines
from rlhfjax.host import lookout, marks, stopping
from rlhfjax.host.watchdog import Watchdog

_BROKEN_OFF = ("rollout", "score", "rewards")


class Watch:
    """Told of every unit of work that begins. Without `deadlines` nothing is taken for a hang.

    Several processes stop at the same unit: `agree()` is called by all of them at the same places, and says whether any
    of them was asked to stop.
    """

    def __init__(
        self,
        directory: Path | None = None,
        deadlines: Deadlines | None = None,
        agree: Callable[[], bool] | None = None,
    ):
        index = jax.process_index()
        stacks = f"stacks.{index}.txt" if index else "stacks.txt"
        self._dog = Watchdog(directory / stacks) if directory and deadlines else None
        self._stacks = str(directory / stacks) if self._dog and directory else ""
        self._deadlines, self._agree = deadlines, agree
        self._seen: set[str] = set()
        self._unit, self._began = "", time.monotonic()
        self.longest: dict[str, float] = {}  # seconds by unit, without those that compiled

    def begin(self, unit: str, step: int) -> None:
        """A unit of work of the loop begins, and the one before it has ended."""
        self.end()
        limits, seconds = self._deadlines, 0.0
        if self._dog and limits:
            seconds = limits.save if unit == "save" else limits.step if unit in self._seen else limits.compile
            self._dog.arm(seconds + lookout.grace())
        marks.unit(unit, step, seconds, self._stacks)
        if unit != "save":  # which has a fault of its own, in the middle
            faults.reach(unit, step)
        self._unit, self._began = unit, time.monotonic()

    def end(self) -> None:
        """The unit that was under way has ended; its deadline holds until the next begins."""
        if self._unit in self._seen:
            self.longest[self._unit] = max(self.longest.get(self._unit, 0.0), time.monotonic() - self._began)
        self._seen.add(self._unit)
        self._unit = ""
        marks.over()

    def asked(self) -> bool:
        """Whether the loop has to save and stop here."""
        return stopping.asked() if self._agree is None else self._agree()

    def poll(self) -> None:
        """Stop here, where all is saved or nothing would be lost."""
        if self.asked():
            raise stopping.stop()

    def wait(self, values: Any) -> Any:
        """`values` once they are there. A request to stop does not wait for them, if this process is alone."""
        arrays = jax.tree.leaves(values)
        with marks.inside(marks.PROGRAM):
            self.until(lambda: all(_is_there(array) for array in arrays))
            jax.block_until_ready(values)
        self.poll()
        return values

    def until(self, done: Callable[[], bool]) -> None:
        """Return when something is done, or at once where several processes have to wait for it together."""
        began = time.monotonic()
        while self._agree is None and not done():
            self.poll()
            time.sleep(min(max((time.monotonic() - began) / 100, 1e-4), 0.02))  # late by a hundredth at most

    def facts(self) -> dict[str, float]:
        """`timing/stop_s`: the longest that a request to stop had to wait, by what was seen: a unit and a save."""
        waits = self._agree is None  # for the units that `wait` breaks off
        units = {name: seconds for name, seconds in self.longest.items() if not (waits and name in _BROKEN_OFF)}
        if not units:
            return {}
        save = units.pop("save", 0.0)
        return {"timing/stop_s": round(max(units.values(), default=0.0) + save, 2)}

    def close(self) -> None:
        """The loop has ended: no deadline any more."""
        self.end()
        marks.closed()
        if self._dog:
            self._dog.close()


def _is_there(value: Any) -> bool:
    return not isinstance(value, jax.Array) or value.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
