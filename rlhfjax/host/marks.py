"""Where this process stands: stage, step, unit of work, and the region of code that its main thread is in.

Those who keep the time (`time_ledger`) are told of every change; those who look for a hang (`lookout`) read the newest.
Other threads work beside the main one, and what they do moves no mark.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

STARTING, RESTORING, COMPILING, SAVING = "starting up", "restoring", "compiling", "saving"
WORKING, PROGRAM = "host code", "a program on its devices"
DATA, REWARDS, PROCESSES = "reading data", "waiting for rewards", "waiting for the other processes"


@dataclass(frozen=True)
class Mark:
    """The newest place of the main thread.

    `units` counts the units of work that have begun, and `meetings`, in the newest one, where processes came together,
    programs on their devices among them: the same numbers in each process at the same place. The unit that is under way
    `began` so (`time.monotonic`), and may take `limit` seconds, 0: any. `done` steps of the stage are done, None where
    it has none. `name` is that of what the region is for, `stacks` the file that takes the stacks of all threads.
    """

    stage: str = ""
    unit: str = ""
    step: int = 0
    done: int | None = None
    region: str = STARTING
    name: str = ""
    units: int = 0
    meetings: int = 0
    began: float = 0.0
    limit: float = 0.0
    stacks: str = ""

    @property
    def place(self) -> tuple[int, int, bool]:
        """Grows as processes go on together; last whether this one waits for another that has not come."""
        return self.units, self.meetings, self.region == PROCESSES


_mark = Mark()
_listeners: list[Callable[[Mark], None]] = []


def here() -> Mark:
    """The newest mark."""
    return _mark


def listen(to: Callable[[Mark], None]) -> Callable[[], None]:
    """Have `to` told of every mark, after it is set; gives what ends that."""
    _listeners.append(to)
    return lambda: _listeners.remove(to)


def _set(**changes: Any) -> None:
    global _mark
    if threading.current_thread() is not threading.main_thread():
        return
    _mark = replace(_mark, **changes)
    for listener in _listeners:
        listener(_mark)


def stage(name: str, region: str = STARTING) -> None:
    """A stage begins; what it is in until its first unit of work."""
    _set(stage=name, unit="", step=0, done=None, region=region, name="", limit=0.0, stacks="")


def unit(name: str, step: int, limit: float = 0.0, stacks: str = "") -> None:
    """A unit of work begins, and the one before it is over."""
    region = SAVING if name == "save" else WORKING
    began, units = time.monotonic(), _mark.units + 1
    _set(unit=name, step=step, region=region, name="", units=units, meetings=0, began=began, limit=limit, stacks=stacks)


def over() -> None:
    """The unit that was under way is over; its limit holds until the next begins."""
    if _mark.region == SAVING:
        _set(region=WORKING, name="")


def closed() -> None:
    """The units of a stage are over, and so is their limit; what is left is to save."""
    _set(unit="", limit=0.0, region=SAVING, name="")


def done(steps: int) -> None:
    """So many steps of the stage are done, by this attempt or before it."""
    _set(done=steps)


@contextmanager
def inside(region: str, name: str = "") -> Iterator[None]:
    """The main thread is in a region, and then where it was before. A program may go on beside what comes after it."""
    before = _mark.region, _mark.name
    _set(region=region, name=name, meetings=_mark.meetings + (region == PROGRAM))
    try:
        yield
    finally:
        _set(region=before[0], name=before[1])


def met() -> None:
    """The processes have come together here."""
    _set(meetings=_mark.meetings + 1)


def followed(region: str, items: Iterable[Any]) -> Iterator[Any]:
    """The items, each of which is waited for in a region."""
    each = iter(items)
    while True:
        with inside(region):
            try:
                item = next(each)
            except StopIteration:
                return
        yield item
