"""Writes `RUN/time.jsonl` as a run goes: what process 0 spends its seconds on (`goodput` has the arithmetic).

Lines are appended and handed to the system at once, so that a killed process loses only the seconds since its last one.
"""

import atexit
import gc
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhfjax.host import marks
from rlhfjax.host.goodput import FILE, PRODUCTIVE, STARTING, Account, read_lines

_KIND = {
    marks.STARTING: STARTING,
    marks.RESTORING: "restore",
    marks.COMPILING: "compile",
    marks.SAVING: "save",
    marks.DATA: "waiting",
    marks.REWARDS: "waiting",
    marks.PROCESSES: "waiting",
}
_DENSE, _PERIOD = 1000, 5.0  # each step has a line while an attempt has so few; then there is one in so many seconds


class TimeLedger:
    """The ledger of one attempt, from the start of this process; one whose file cannot be written keeps no time."""

    def __init__(self, path: Path, redo: Iterable[str] = ()):
        self.account = Account(read_lines(path))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._zero, self._clock = time.time(), time.monotonic()  # the clock of the machine may be set in between
        self._spent: dict[str, float] = {}
        self._kind, self._since = STARTING, self._clock - age_of_process()
        self._flushed, self._lines, self._mark = self._clock, 0, marks.here()
        self._torn = b"\n" if path.stat().st_size else b""  # perhaps: an empty line says nothing
        line = {"is": "start", "attempt": len(self.account.attempts) + 1} | ({"redo": list(redo)} if redo else {})
        self._write(self._since, line)

    def told(self, mark: marks.Mark) -> None:
        """A listener of marks."""
        now, before = time.monotonic(), self._mark
        self._spend(now)
        self._kind, self._mark = _KIND.get(mark.region, PRODUCTIVE), mark
        if mark.stage and (mark.stage != before.stage or mark.done != before.done):
            backwards = mark.done is None or before.done is None or mark.done < before.done
            few = self._lines < _DENSE + (now - self._clock) / _PERIOD
            if backwards or few or mark.done == self.account.boundary:
                self._flush(now)
        elif now - self._flushed > _PERIOD or before.region == marks.SAVING != mark.region:
            self._flush(now)

    def end(self, code: int) -> None:
        """The attempt ends with an exit code, and the process soon after it."""
        now = time.monotonic()
        self._spend(now)
        self._flush(now, {"is": "end", "code": code})
        self._kind = STARTING

    def left(self) -> None:
        """The last that the interpreter does: what the process took to end is in the ledger, too."""
        now = time.monotonic()
        self._spend(now)
        self._flush(now)
        os.close(self._file)
        self._file = -1

    @property
    def goodput(self) -> float:
        """The productive share of the run's wall time until the last line."""
        return self.account.goodput

    def _spend(self, now: float) -> None:
        self._spent[self._kind] = self._spent.get(self._kind, 0.0) + now - self._since
        self._since = now

    def _flush(self, now: float, line: dict | None = None) -> None:
        place = {name: value for name in ("stage", "done") if (value := getattr(self._mark, name)) not in ("", None)}
        spent = {kind: round(seconds, 6) for kind, seconds in self._spent.items() if seconds >= 5e-7}
        self._write(now, {**(line or {}), **place, "s": spent})
        self._spent, self._flushed = {}, now
        self._lines += 1

    def _write(self, now: float, line: dict) -> None:
        whole = {"at": round(self._zero + now - self._clock, 6)} | line
        self.account.add(whole)
        with suppress(OSError):  # a full disk: what is not written is lost time to whoever reads the file
            os.write(self._file, self._torn + json.dumps(whole, separators=(",", ":")).encode() + b"\n")
            self._torn = b""


_open: TimeLedger | None = None
_kept: list[TimeLedger] = []


@atexit.register  # at the import, so that it comes after what libraries do at the end
def _leave() -> None:
    gc.freeze()  # what is alive goes with the process; to look through it for cycles takes a second after this line
    for ledger in _kept:
        ledger.left()


@contextmanager
def kept(run_dir: Path, writes: bool, redo: Iterable[str] = ()) -> Iterator[None]:
    """Inside, the time of a run is kept where this process writes it; errors end the attempt with their exit code."""
    global _open
    if not writes:
        yield
        return
    try:
        _open = ledger = TimeLedger(run_dir / FILE, redo)
    except OSError:
        yield
        return
    stop = marks.listen(ledger.told)
    _kept.append(ledger)
    try:
        yield
    except BaseException as error:
        end(130 if isinstance(error, KeyboardInterrupt) else int(getattr(error, "exit_code", 1)))
        raise
    else:
        end(0)
    finally:
        stop()
        _open = None


def end(code: int) -> None:
    """The attempt ends here, also where nothing is unwound."""
    if _open:
        _open.end(code)


def facts() -> dict[str, float]:
    """`timing/goodput` of the run so far, where this process keeps its time."""
    return {"timing/goodput": _open.goodput} if _open else {}


def age_of_process() -> float:
    """Seconds since the system started this process; 0.0 where it does not say."""
    if sys.platform != "linux":
        return 0.0
    try:
        ticks = int(Path("/proc/self/stat").read_text("ascii").rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return 0.0
