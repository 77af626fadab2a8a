"""Looks out for a hang and says which process it is, where it stands and since when, before the run ends with 42.

Each process posts its newest mark once in `PERIOD` seconds, in the store that jax keeps for all; processes 0 and 1 read
them all. When a deadline passes, the process that is behind the others did not come; one that posts nothing any more is
stopped, dead or cut off. All of it is done by threads beside the main one, which may be anywhere.
"""

import faulthandler
import json
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rlhfjax.errors import Stopped
from rlhfjax.host import marks, processes

PERIOD = 1.0  # seconds between two posts
GRACE = 5.0  # seconds after a deadline until the watchdog, which can say nothing, ends a process that nobody ended
_BOARD, _VERDICT, _HEARD = "rlhfjax/marks", processes.VERDICT, "rlhfjax/heard"
_LAST_WORD = 5.0  # seconds that the speaker waits for the others to have heard it
_FRAMES = 3
_OVER = ("gone", "stopped by a signal", "stopped by a debugger")
_DEAD = 134  # what jax ends a process with when another one is dead


@dataclass(frozen=True)
class Seen:
    """What a process posted last, and when that was seen to be new here (`time.monotonic`)."""

    told: Mapping[str, Any]
    at: float

    @property
    def place(self) -> tuple[int, int, bool]:
        return tuple(self.told["place"])  # pyright: ignore[reportReturnType]

    def overdue(self, now: float) -> bool:
        """Whether its unit of work has taken longer than it may."""
        return bool(self.told["limit"]) and self.told["age"] + now - self.at > self.told["limit"]

    def silent(self, now: float, most: float) -> bool:
        """Whether it posts nothing any more, while it has a deadline; elsewhere libraries may hold its lock.

        What the system says of one of this machine, that it is stopped or gone, counts anywhere.
        """
        return now - self.at > most and (bool(self.told["limit"]) or state_of(self.told) in _OVER)


def verdict(seen: Mapping[int, Seen], now: float, most_silent: float) -> tuple[str, list[int]] | None:
    """The line that says which processes hold up the run, and their numbers; None while nothing is known to hang."""
    if silent := [index for index, each in seen.items() if each.silent(now, most_silent)]:
        index, each = silent[0], seen[silent[0]]
        how = f"says nothing since {now - each.at:.0f} s ({state_of(each.told)}); last it was {_stands(each, now)}"
        return f"{_named(index, each)} {how}{_others(silent)}", silent
    late = [index for index, each in seen.items() if each.overdue(now)]
    if not late:
        return None
    least = min(each.place for each in seen.values())
    behind = [index for index, each in seen.items() if each.place == least]
    waits = seen[late[0]]
    if len(behind) == len(seen) > 1:
        where = f"{_stands(waits, now)}; none is behind: look at devices and network"
        return f"all {len(seen)} processes have been too long {where}", behind
    index, each = behind[0], seen[behind[0]]
    others = [other for other in late if other not in behind]
    what = f"did not come out of {_place(each)} in {waits.told['limit']:g} s"
    if others:
        what = f"is waited for by process {others[0]} at {_place(seen[others[0]])}"
    return f"{_named(index, each)} {what}: it is {_stands(each, now)}{_others(behind)}", behind


def _named(index: int, seen: Seen) -> str:
    told = seen.told
    return f"process {index} ({told['host']}, {told['devices']}, pid {told['pid']})"


def _place(seen: Seen) -> str:
    told = seen.told
    return f"{told['stage']} step {told['step']}, {told['unit']}"


def _stands(seen: Seen, now: float) -> str:
    told = seen.told
    region = told["region"] + (f" ({told['name']})" if told["name"] else "")
    stacks = f"; stacks of its threads: {told['stacks']}" if told["stacks"] else ""
    since = f"for {told['age'] + now - seen.at:.0f} s"
    return f"in {_place(seen)}, {region}, {since}; at {told['frames'] or 'no line'}{stacks}"


def _others(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[1:8])) + (" …" if len(numbers) > 8 else "")
    return f"; so is process {shown}" if numbers[1:] else ""


def state_of(told: Mapping[str, Any]) -> str:
    """What the system says of the process, where it is one of this machine: stopped, gone, or that it runs."""
    if told["host"] != platform.node() or sys.platform != "linux":
        return "stopped, dead or cut off"
    try:
        state = Path(f"/proc/{told['pid']}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "gone"}.get(
        state, "it lives, and lets none of its threads run"
    )


class Lookout:
    """The threads of one process. `noted` is called with the line in every process, `say` where it is said."""

    def __init__(self, heartbeat: float, say: Callable[[str], None], noted: Callable[[str], None]):
        self._say, self._noted = say, noted
        self._index, self._count = jax.process_index(), processes.count()
        # Of a process, and of the store of process 0: jax itself takes notice after `heartbeat` and two seconds more.
        self._most_silent = max(0.7 * heartbeat, 2.0)
        self._period = min(PERIOD, heartbeat / 10)
        self._store = processes.shared_store() if self._count > 1 else None
        devices = [f"{device.platform}:{device.id}" for device in jax.local_devices()]
        shown = devices[0] + (f" to {devices[-1].rpartition(':')[2]}" if devices[1:] else "")
        self._who = {"host": platform.node(), "pid": os.getpid(), "devices": shown}
        self._main, self._beat, self._held_up = threading.main_thread().ident, 0, 0.0
        self._seen: dict[int, Seen] = {}
        self._answered, self._over, self._once = time.monotonic(), threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._judge, name="lookout", daemon=True)]
        self._threads += [threading.Thread(target=self._post, name="marks", daemon=True)] if self._store else []

    def __enter__(self) -> "Lookout":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    def _told(self) -> dict[str, Any]:
        """The mark of this process as others see it, with the innermost frames of its main thread."""
        mark, frame = marks.here(), sys._current_frames().get(self._main or 0)
        frames = [f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in traceback.extract_stack(frame)]
        self._beat += 1
        return self._who | {
            "beat": self._beat,
            "place": mark.place,
            "age": round(time.monotonic() - mark.began, 3),
            "frames": " < ".join(frames[: -_FRAMES - 1 : -1]),
            **{name: getattr(mark, name) for name in ("stage", "step", "unit", "region", "name", "limit", "stacks")},
        }

    def _post(self) -> None:
        store = self._store
        while store and not self._over.wait(self._period):
            try:
                store.key_value_set(f"{_BOARD}/{self._index}/mark", json.dumps(self._told()), allow_overwrite=True)
                found = store.key_value_dir_get(_BOARD if self._index < 2 else f"{_BOARD}/0")
                ended = store.key_value_dir_get(_VERDICT)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone, or about to end
            now = self._answered = time.monotonic()
            for key, text in found:
                index, told = int(key.split("/")[-2]), json.loads(text)
                if index not in self._seen or told["beat"] != self._seen[index].told["beat"]:
                    self._seen[index] = Seen(told, now)
            if ended:
                self._end(json.loads(ended[0][1]), speaks=False)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._period / 2):
            now = time.monotonic()
            if now - before > 2 * self._period:  # this process was held up itself, and has not listened
                self._held_up = now
            before = now
            if self._store is None:
                self._seen = {0: Seen(self._told(), now)}
            found, speaks = None, True
            if self._silent_store():
                first = {0: self._seen[0]} if 0 in self._seen else {}
                found, speaks = verdict(first, now, self._most_silent), self._index == 1
            elif self._index < 2:
                silence = self._most_silent if self._answered > self._held_up else math.inf
                found = verdict(dict(self._seen), now, silence)
            if found and not self._over.is_set():
                self._end({"line": found[0], "held_up_by": found[1]}, speaks)

    def _end(self, told: dict[str, Any], speaks: bool) -> None:
        """The process ends here; the first that says why is the only one."""
        if not self._once.acquire(blocking=False):
            return
        if speaks and self._store and not self._silent_store():
            try:
                self._store.key_value_set(f"{_VERDICT}/line", json.dumps(told))
            except jax.errors.JaxRuntimeError:
                speaks = False  # another process was faster
        if stacks := marks.here().stacks:
            with suppress(OSError), open(stacks, "a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if speaks:
            self._say(f"error: {told['line']}")
        with suppress(Exception):
            self._noted(told["line"])
        sys.stdout.flush()
        sys.stderr.flush()
        self._last_word(told["held_up_by"])
        os._exit(_DEAD if "(gone)" in told["line"] else Stopped.exit_code)

    def _last_word(self, held_up_by: list[int]) -> None:
        """Process 0, which keeps the store, leaves last: jax ends who has not heard why with a stack of its own."""
        if self._store is None or self._silent_store():
            return
        others, until = set(range(self._count)) - {self._index, *held_up_by}, time.monotonic() + _LAST_WORD
        with suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_HEARD}/{self._index}", "heard", allow_overwrite=True)
            while self._index == 0 and time.monotonic() < until:
                heard = {int(key.rpartition("/")[2]) for key, _ in self._store.key_value_dir_get(_HEARD)}
                if others <= heard:
                    return
                time.sleep(0.05)

    def _silent_store(self) -> bool:
        waited = time.monotonic() - max(self._answered, self._held_up)
        return self._index > 0 and waited > self._most_silent


_running = False


@contextmanager
def kept(heartbeat: float, say: Callable[[str], None], noted: Callable[[str], None]) -> Iterator[None]:
    """Inside, hangs are looked out for."""
    global _running
    with Lookout(heartbeat, say, noted):
        _running = True
        try:
            yield
        finally:
            _running = False


def grace() -> float:
    """Seconds that the watchdog waits after a deadline, for whoever can say what hangs to have said it."""
    return GRACE if _running else 0.0
