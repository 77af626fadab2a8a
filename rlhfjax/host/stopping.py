"""Stopping early: SIGTERM and Ctrl-C ask for it once; the second time the process ends at once.

Where nothing would be lost, the request ends what is under way like any error. A loop holds it back (`held`), looks for
it between and within its units of work (`asked`), saves, and stops then. Python calls its handlers between two of its
own instructions, so a thread of its own watches for a request while the main thread is inside a library; what may be
thrown away is thrown away after `PATIENCE`.
"""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rlhfjax.errors import Stopped

PATIENCE = 5.0  # seconds
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Request:
    """What was asked of this process; signals are the process's, and so is this."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.holds = 0
        self.heard = self.together = False
        self.say: Callable[[str], None] = lambda text: None
        self.farewell: Callable[[int], None] = lambda code: None


_request = _Request()


@contextmanager
def honoured(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C stop what is under way; `say` tells people that a loop saves first."""
    global _request
    if threading.current_thread() is not threading.main_thread():  # no other thread can have handlers
        yield
        return
    _request = _Request()
    _request.say = say
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, _handle) for number in _SIGNALS if _is_ours(number)}
    fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, _request), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # which ends the watcher
        watcher.join()
        os.close(reading)
        _request = _Request()  # what was asked was asked of what ends here


def _is_ours(number: int) -> bool:
    """A shell's background job ignores Ctrl-C, and what runs in it shall go on ignoring it."""
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def held() -> Iterator[None]:
    """Inside, a request waits until somebody asks for it; at the latest it is met at the end."""
    _request.holds += 1
    try:
        yield
    finally:
        _request.holds -= 1
    if asked() and not _request.holds:
        raise stop()


@contextmanager
def interrupts() -> Iterator[None]:
    """Inside, Ctrl-C is KeyboardInterrupt however often it comes, for whoever answers it and goes on."""
    if signal.getsignal(signal.SIGINT) is not _handle:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fd = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, _handle)


def asked() -> bool:
    """Whether somebody wants this process to stop."""
    return _request.signal is not None


def stop() -> BaseException:
    """The error to stop with: Stopped, or KeyboardInterrupt after Ctrl-C."""
    number = _request.signal
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    by = "a preemption" if number is None else signal.Signals(number).name
    return Stopped(f"stopped by {by}; what was done is saved, the same command goes on from there")


def pass_on() -> None:
    """From here on this is one of several processes, where SIGTERM is jax's and Ctrl-C becomes one."""
    _request.together = True


def before_exit(farewell: Callable[[int], None]) -> None:
    """What is called with the exit code when the process ends without unwinding."""
    _request.farewell = farewell


def _handle(number: int, _: FrameType | None) -> None:
    if _request.together and number == signal.SIGINT and _request.signal is None:
        _request.heard = True
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if _request.signal is not None:
        _leave(_request, 128 + number)
    _request.signal, _request.heard = number, True
    if _request.holds:
        _request.say(f"{signal.Signals(number).name}: stopping as soon as all is saved; once more stops at once")
    else:
        raise stop()


def _watch(reading: int, request: _Request) -> None:
    """Runs beside the main thread, which may be inside a library for long."""
    first = os.read(reading, 1)
    if not first:
        return
    again, _, _ = select.select([reading], [], [], PATIENCE)
    if not again and not (request.heard or request.holds):
        _leave(request, 130 if first[0] == signal.SIGINT else Stopped.exit_code)
    if more := os.read(reading, 1):
        _leave(request, 128 + more[0])


def _leave(request: _Request, code: int) -> None:
    try:
        request.farewell(code)
    finally:
        os._exit(code)
