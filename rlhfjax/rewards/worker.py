"""The process that a function, a command or a regular expression runs in; it imports no jax.

It has a session of its own and speaks over one socket. What is printed goes to standard error. When the run is gone,
however it ended, a thread kills the whole process group: the function may hang, and have children that do.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rlhfjax.rewards.calls import command, function, moderation, pattern
from rlhfjax.rewards.example import Example
from rlhfjax.rewards.frames import framed, read_message

_KINDS: Mapping[str, Callable[..., Any]] = {
    "function": function,
    "command": command,
    "moderation": moderation,
    "pattern": pattern,
}


def main(descriptor: int) -> None:
    """Load what the first message names, then answer each list of examples, until null comes."""
    os.set_inheritable(descriptor, False)
    os.dup2(2, 1)  # what anybody prints, below Python too, must not be lost and belongs to no protocol
    connection, own = socket.socket(fileno=descriptor), os.getpid()
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), daemon=True).start()
    score: Callable[[list[Example]], dict[str, Any]] | None = None
    while (message := messages.get()) is not None:
        if score is None:
            score, answer = _loaded(message)
        else:
            answer = score([Example.of_json(each) for each in message])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the function may have closed it
                stream.flush()
        if os.getpid() != own:  # a child that the function made, and that came back
            os._exit(0)
        connection.sendall(framed(answer))


def _loaded(message: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _KINDS[message.pop("kind")](**message)


def _listen(connection: socket.socket, messages: queue.SimpleQueue) -> None:
    while True:
        try:
            messages.put(read_message(connection))
        except (EOFError, OSError):
            os.killpg(os.getpgrp(), signal.SIGKILL)
