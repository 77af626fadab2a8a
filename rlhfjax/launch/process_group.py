"""Processes that live and die together, and are started again as long as that gets a run further."""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rlhfjax.errors import ConfigError

COMMAND = (sys.executable, "-m", "rlhfjax.cli")
LAUNCHER = "RLHFJAX_LAUNCHER"
_PREEMPTED, _DIED = 42, 128  # exit codes: saved, run again; and from here on, ended by a signal
_LONGEST_DELAY = 60.0


@dataclass
class Restarts:
    """How often processes are started again, and whether it helps: a run that gets no further is given up."""

    preempted: int
    failed: int
    run_dir: Path | None
    _used: dict[str, int] = field(default_factory=lambda: {"preempted": 0, "failed": 0})
    _idle: int = 0
    _reached: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self._reached = progress(self.run_dir)

    def after(self, code: int, say: Callable[[str], None]) -> float | None:
        """Seconds to wait before the next start; None where there is none, with the reason said."""
        if code != _PREEMPTED and code < _DIED:
            return None  # it would end the same
        kind, allowed = ("preempted", self.preempted) if code == _PREEMPTED else ("failed", self.failed)
        reached, started_again = progress(self.run_dir), sum(self._used.values()) > 0
        self._idle = 0 if reached > self._reached else self._idle + started_again
        self._reached = max(reached, self._reached)
        if self._idle == 2:
            say(f"launch: two restarts got no step further in {self.run_dir or 'what runs'}; not started again")
            return None
        if self._used[kind] == allowed:
            if allowed:
                say(f"launch: {kind} {allowed + 1} times, and --restarts-{kind} is {allowed}; not started again")
            return None
        self._used[kind] += 1
        delay = min(2.0 ** (self._used[kind] - 1), _LONGEST_DELAY)
        say(f"launch: {kind} with exit code {code}; restart {self._used[kind]} of {allowed} in {delay:.0f} s")
        return delay


def progress(run_dir: Path | None) -> tuple[int, int]:
    """How far a run has come: finished stages, and steps that are saved, over all stages."""
    if run_dir is None or not run_dir.is_dir():
        return 0, 0
    finished = len(list(run_dir.glob("*/complete.json")))
    steps: dict[Path, int] = {}
    for path in run_dir.glob("*/checkpoints/*"):
        if path.name.isdigit():
            steps[path.parent.parent] = max(steps.get(path.parent.parent, 0), int(path.name))
    for path in run_dir.glob("*/local.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            local = int(json.loads(path.read_text(encoding="utf-8"))["step"])
            steps[path.parent] = max(steps.get(path.parent, 0), local)
    return finished, sum(steps.values())


def supervise(
    arguments: list[str],
    count: int,
    devices: int | None,
    restarts: Restarts,
    grace: float,
    say: Callable[[str], None],
) -> int:
    """Run `rlhfjax ARGUMENTS` in `count` processes to the end; the exit code of the first that failed, or 0."""
    with _signals() as received:
        while True:
            code = Group(arguments, count, devices, grace, say).run(received)
            if code == 0 or received:
                return code
            delay = restarts.after(code, say)
            if delay is None:
                return code
            until = time.monotonic() + delay
            while time.monotonic() < until:
                if received:
                    return code
                time.sleep(0.05)


class Group:
    """The processes of one attempt."""

    def __init__(
        self, arguments: list[str], count: int, devices: int | None, grace: float, say: Callable[[str], None]
    ) -> None:
        self._grace, self._say = grace, say
        self._streams = selectors.DefaultSelector()
        coordinator = f"127.0.0.1:{_free_port()}"
        self._processes = [self._start(arguments, count, index, devices, coordinator) for index in range(count)]

    def _start(self, arguments: list[str], count: int, index: int, devices: int | None, coordinator: str) -> Any:
        environment = os.environ | {
            "RLHFJAX_COORDINATOR": coordinator,
            "RLHFJAX_NUM_PROCESSES": str(count),
            "RLHFJAX_PROCESS_ID": str(index),
            LAUNCHER: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        if devices:
            own = range(index * devices, (index + 1) * devices)
            environment |= {"RLHFJAX_DEVICES_PER_PROCESS": str(devices)}
            environment |= {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))}  # which GPUs jax takes
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is for the launcher, which passes it on
        )
        for stream, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self._streams.register(stream, selectors.EVENT_READ, _Lines(f"[p{index}] ", target))
        return process

    def run(self, received: list[int]) -> int:
        """Until the last process has ended; the exit code of the first that failed, or 0."""
        try:
            return self._watch(received)
        finally:
            self._signal_all(signal.SIGKILL)
            for process in self._processes:
                process.wait()
            self._drain()

    def _watch(self, received: list[int]) -> int:
        code, forwarded, deadline = 0, False, float("inf")
        while any(process.poll() is None for process in self._processes):
            self._pump(0.05)
            if len(received) > 1:
                self._say("launch: second signal; killed")
                return _DIED + received[1]
            if received and not forwarded:
                forwarded = True
                # Processes agree on a step to stop after SIGTERM; Ctrl-C would stop each where it is.
                self._signal_all(received[0] if len(self._processes) == 1 else signal.SIGTERM)
            if code == 0 and (failed := self._failed()):
                index, code = failed
                deadline = time.monotonic() + self._grace
                if len(self._processes) > 1:
                    self._say(f"launch: process {index} ended with exit code {code}; the others have to end")
                if code != _PREEMPTED and not forwarded:
                    self._signal_all(signal.SIGTERM)
            if time.monotonic() > deadline:
                return code
        return code or (self._failed() or (0, 0))[1]

    def _failed(self) -> tuple[int, int] | None:
        """The process that failed, and how. Of several at once the one whose code says most: others died of it."""
        codes = {index: _exit_code(process.poll()) for index, process in enumerate(self._processes)}
        return min(
            ((index, code) for index, code in codes.items() if code), key=lambda each: (each[1], each[0]), default=None
        )

    def _signal_all(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, number) if number != signal.SIGKILL else os.killpg(process.pid, number)

    def _drain(self) -> None:
        """What the processes wrote at last; a child of theirs that is left may hold a stream open for long."""
        until = time.monotonic() + 1.0
        while self._streams.get_map() and time.monotonic() < until:
            self._pump(0.05)
        for key in list(self._streams.get_map().values()):
            self._end(key)
        self._streams.close()

    def _end(self, key: Any) -> None:
        key.data.end()
        self._streams.unregister(key.fileobj)
        key.fileobj.close()

    def _pump(self, wait: float) -> None:
        """Pass on what the processes wrote; waits up to `wait` seconds for something."""
        if not self._streams.get_map():
            time.sleep(min(wait, 0.05))
        for key, _ in self._streams.select(wait) if self._streams.get_map() else ():
            stream: Any = key.fileobj
            data = stream.read(1 << 16)
            if data:
                key.data.write(data)
            elif data == b"":
                self._end(key)


class _Lines:
    """Bytes to whole lines with a prefix."""

    def __init__(self, prefix: str, target: Any):
        self._prefix, self._target, self._rest = prefix.encode(), target, b""

    def write(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._print(lines)

    def end(self) -> None:
        if self._rest:
            self._print([self._rest])

    def _print(self, lines: list[bytes]) -> None:
        out: BinaryIO = self._target.buffer
        out.writelines(self._prefix + line + b"\n" for line in lines)
        out.flush()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGTERMs and SIGINTs that came, in order, instead of what they do by default."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    wakeup = signal.set_wakeup_fd(-1)  # by which a process that trains hears of them
    try:
        yield received
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(returned: int | None) -> int:
    """As a shell tells it: 128 and the number of the signal that ended a process."""
    return 0 if returned is None else returned if returned >= 0 else _DIED - returned


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_launcher() -> None:
    """A process that `launch local` started ends when the launcher does, however that ends."""
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        return
    if not launcher.isdigit():
        raise ConfigError(f"{LAUNCHER}: expected the number of a process, got {launcher!r}; unset it")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when every thread of this one is stuck
    else:
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True).start()
    if os.getppid() != int(launcher):  # it was too late
        os._exit(128 + signal.SIGKILL)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    os._exit(128 + signal.SIGKILL)
