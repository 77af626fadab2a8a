"""Ends a process that hangs: when a deadline passes, the stacks of all threads are written and it exits with 42.

The timer is the kernel's and what it calls is C, so it also works while a thread holds the interpreter's lock.
"""

import ctypes
import faulthandler
import sys
from pathlib import Path

from rlhfjax.errors import Stopped

# A handler is called with the number of its signal: `_exit` as the handler of (real-time) signal 42 exits with 42.
_SIGNAL = Stopped.exit_code
_MONOTONIC, _SIGEV_SIGNAL = 1, 0  # CLOCK_MONOTONIC, and how an expired timer tells


class _Event(ctypes.Structure):
    """struct sigevent."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    ]


class _Times(ctypes.Structure):
    """struct itimerspec: how often, and when first; seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("again_s", "again_ns", "first_s", "first_ns")]


class Watchdog:
    """A deadline that can be set again and again; `stacks` is the file that tells where the threads were.

    Off Linux, where there are no such timers, faulthandler's own thread does it, and the exit code is 1.
    """

    def __init__(self, stacks: Path):
        stacks.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._stacks, self._file = stacks, stacks.open("w")
        self._timer = ctypes.c_void_p()
        self._c = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        if self._c is None:
            return
        self._c.signal.argtypes, self._c.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        self._c.signal(_SIGNAL, ctypes.cast(self._c._exit, ctypes.c_void_p))
        faulthandler.register(_SIGNAL, self._file, all_threads=True, chain=True)
        event = _Event(signal=_SIGNAL, notify=_SIGEV_SIGNAL)
        if self._c.timer_create(_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def arm(self, seconds: float) -> None:
        """The process ends so many seconds from now, unless it is armed anew or disarmed; 0 disarms."""
        if self._c is None:
            if seconds:
                faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)
            else:
                faulthandler.cancel_dump_traceback_later()
            return
        whole = int(seconds)
        times = _Times(first_s=whole, first_ns=int((seconds - whole) * 1e9))
        self._c.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def close(self) -> None:
        """No deadline any more. The file goes if nothing was written."""
        self.arm(0.0)
        if self._c is not None:
            self._c.timer_delete(self._timer)
            faulthandler.unregister(_SIGNAL)
            self._c.signal(_SIGNAL, None)  # as it was: the signal's own action
        self._file.close()
        if self._stacks.exists() and not self._stacks.stat().st_size:
            self._stacks.unlink()
