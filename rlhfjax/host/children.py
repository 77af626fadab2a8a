"""A function in a process of its own, which may die, hang or need too much memory, and how it ended.

Compilers do all three: libtpu has ended processes with a segmentation fault in the depth of one program's cost model.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STACK = 2**20  # KiB of address space for each thread: glibc takes the process's limit, which is 8 MiB, for all of them
_LINES, _BETWEEN = 20, 0.05


@dataclass(frozen=True)
class Ended:
    """How a call ended: `returned`, `exit 1` (an exception), a signal such as `SIGSEGV`, or `too long`.

    `value` is what came back, None without; `said` the last lines that it wrote to stderr; times are of a clock and of
    all its processors, `memory` the most bytes that it held.
    """

    how: str
    value: Any
    said: str
    seconds: float
    cpu_seconds: float
    memory: int

    @property
    def returned(self) -> bool:
        return self.how == "returned"


def call(
    function: str,
    arguments: Sequence[Any] = (),
    *,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """`function` ("package.module:name") of these arguments; they and what it returns are what JSON holds.

    It has this process's directory and variables, those of `environment` beside them, and at most so many `seconds`.
    """
    with TemporaryDirectory() as folder:
        made, errors = Path(folder, "made.json"), Path(folder, "stderr")
        command = [sys.executable, "-m", "rlhfjax.host.children", function, json.dumps(list(arguments)), str(made)]
        # Where the limit may not be raised, it stays.
        larger = ["/bin/sh", "-c", f'ulimit -Ss {STACK} 2>/dev/null; exec "$@"', "sh", *command]
        begun = time.monotonic()
        with errors.open("wb") as stderr:
            child = subprocess.Popen(
                larger, stdin=subprocess.DEVNULL, stderr=stderr, env=os.environ | dict(environment or {}),
                start_new_session=True,
            )  # fmt: skip
        how, usage = _waited(child, begun + seconds if seconds is not None else None)
        said = errors.read_text(errors="replace").splitlines()[-_LINES:]
        value = json.loads(made.read_text()) if how == "returned" else None
    busy = usage.ru_utime + usage.ru_stime
    return Ended(how, value, "\n".join(said), time.monotonic() - begun, busy, usage.ru_maxrss * 1024)


def _waited(child: subprocess.Popen, until: float | None) -> tuple[str, Any]:
    """How it ended, and what it used; nothing of it is left."""
    late = False
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if until is not None and time.monotonic() > until and not late:
            late = True
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(_BETWEEN)
    child.returncode = code = os.waitstatus_to_exitcode(status)
    if late:
        return "too long", usage
    if code < 0:
        return signal.Signals(-code).name, usage
    return f"exit {code}" if code else "returned", usage


def _main(function: str, arguments: str, made: str) -> None:
    module, name = function.split(":")
    value = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(made).write_text(json.dumps(value))


if __name__ == "__main__":
    _main(*sys.argv[1:])
