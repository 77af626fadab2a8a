"""Processes that start without the seconds of imports which each takes: forked from one that has imported all.

That one has one thread, no device and no program, so its child is what a fresh `python -m rlhfjax.cli` is that has
imported as much, with its own variables, directory, arguments, streams and exit code. A process that asked for a child
and is gone takes it along.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhfjax.launch.process_group import LAUNCHER, die_with_launcher

MOST = 2**17  # bytes of a request; the variables are most of it


def serve(place: Path) -> Any:
    """Fork a child for each request that comes to the socket `place`, for ever; in a child, what it is to be.

    A request is one message: arguments, directory and variables in JSON, with the three streams. The answers are the
    number of the process, and then its exit code as a shell has it.
    """
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.bind(str(place))
    door.listen(256)
    chosen = selectors.DefaultSelector()
    chosen.register(door, selectors.EVENT_READ)
    while True:
        for key, _ in chosen.select():
            if key.fileobj is not door:
                _heard(chosen, key)
                continue
            guest, _ = door.accept()
            if (request := _accepted(guest)) is None:
                guest.close()
                continue
            pid = os.fork()
            if not pid:
                for each in list(chosen.get_map().values()):
                    if each.data is not None:
                        os.close(each.fd)
                chosen.close()
                door.close()
                guest.close()
                return request
            for stream in request[1]:
                os.close(stream)
            ended = os.pidfd_open(pid)
            with suppress(OSError):
                guest.send(str(pid).encode())
            chosen.register(ended, selectors.EVENT_READ, (pid, ended, guest))
            chosen.register(guest, selectors.EVENT_READ, (pid, ended, guest))


def _heard(chosen: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """A child has ended, or who asked for it is gone."""
    pid, ended, guest = key.data
    if key.fileobj is guest:
        chosen.unregister(guest)
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        return
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    chosen.unregister(ended)
    if guest.fileno() in chosen.get_map():
        chosen.unregister(guest)
        with suppress(OSError):
            guest.send(str(status if status >= 0 else 128 - status).encode())
    guest.close()
    os.close(ended)


def _accepted(guest: socket.socket) -> tuple[Any, list[int]] | None:
    told, streams, _, _ = socket.recv_fds(guest, MOST, 3)
    return (json.loads(told), streams) if told and len(streams) == 3 else None


def become(request: Any, streams: list[int]) -> None:
    """This process is from now on `python -m rlhfjax.cli ARGUMENTS` in that directory, with these variables."""
    arguments, folder, variables = request
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(variables)
    os.environ[LAUNCHER] = str(os.getppid())  # it ends when that one does
    os.chdir(folder)
    # What a fresh Python looks through first, such as the versions of packages that a host has otherwise.
    sys.path[:0] = [each for each in variables.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.argv = ["rlhfjax", *arguments]
    importlib.invalidate_caches()
    importlib.reload(sys.modules["rlhfjax.faults"])  # which reads the variables
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_module("rlhfjax.cli", run_name="__main__", alter_sys=True)


def import_all() -> None:
    """What any verb imports, and out of the sight of the collector, so that children share its memory."""
    import rlhfjax

    for found in pkgutil.walk_packages(rlhfjax.__path__, "rlhfjax."):
        if not found.name.endswith("__main__"):
            with suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(found.name)
    gc.collect()
    gc.freeze()


def main() -> None:
    """`python -m rlhfjax.rehearsal.forking SOCKET`."""
    place = Path(sys.argv[1])
    die_with_launcher()
    import_all()
    become(*serve(place))


if __name__ == "__main__":
    main()
