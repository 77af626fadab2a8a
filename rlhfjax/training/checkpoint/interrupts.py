"""Ctrl-C while a checkpoint is written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the save that is under way; the second one does not.

    Inside Orbax it would be logged as a failed save, traceback and all.
    """
    main = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = []

    def remember(*_: Any) -> None:
        pressed.append(True)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, remember)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
