"""Processes that take turns: each is started alone, then one step of each at a time, over and over."""

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload


class WorkerError(Exception):
    """A worker ended, or said nothing for too long; the end of its log is in the message."""


@dataclass
class Timed:
    """What one process said: its readiness, its steps, its end."""

    workload: Workload
    system: str
    rounds: int = 1_000
    ready: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Process:
    """A worker of benchmarks.peers.worker, seen from outside. `limit` is how many seconds one answer may take."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, limit: float):
        self._log, self._limit = log, limit
        told = os.environ | environment | {"BENCHMARK_LAUNCHED": repr(time.time())}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=told, text=True
            )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)  # pyright: ignore[reportArgumentType]

    def answer(self) -> dict[str, Any]:
        """Its next line. Raises WorkerError."""
        if not self._selector.select(self._limit):
            self.kill()
            raise WorkerError(f"no answer within {self._limit:.0f} s")
        line = self._process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        if not line:
            raise WorkerError(f"ended with {self._exit_status()}: {self._last_words()}")
        return json.loads(line)

    def step(self, lengths: list[int] | None = None) -> dict[str, Any]:
        """One more step, with responses of these lengths where they are given. Raises WorkerError."""
        try:
            self._process.stdin.write(json.dumps({"lengths": lengths}) + "\n")  # pyright: ignore[reportOptionalMemberAccess]
            self._process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
        except BrokenPipeError:
            raise WorkerError(f"ended with {self._exit_status()}: {self._last_words()}") from None
        return self.answer()

    def finish(self) -> dict[str, Any]:
        """No more steps; what it says at its end."""
        self._process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            return self.answer()
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]

    def _exit_status(self) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()
        return self._process.returncode

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


@dataclass(frozen=True)
class System:
    """Who is timed: how to start it, and at most how many seconds one answer of it may take."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    limit: float = 300.0
    arguments: tuple[str, ...] = ()  # after the workload
    warmup: int = 1  # steps that do not count
    rounds: int = 1_000  # at most so many steps that count


def interleaved(workload: Workload, systems: Sequence[System], logs: Path) -> list[Timed]:
    """One step of each system in turn, `workload.repeats` times. A system that fails is reported, the others go on.

    Where responses end by chance, the first system draws and says how long each is, and the others repeat that.
    """
    logs.mkdir(parents=True, exist_ok=True)
    live, found, lengths = [], [], workload.lengths
    for system in systems:
        timed = Timed(workload, system.name, system.rounds)
        found.append(timed)
        described = json.dumps(workload.described() | {"warmup": system.warmup, "lengths": lengths})
        log = logs / f"{workload.name.replace('/', '_')}_{system.name.replace(' ', '_')}.log"
        command = [*system.command, described, *system.arguments]
        process = Process(command, system.environment, log, system.limit)
        try:
            timed.ready = process.answer()
            live.append((process, timed))
            lengths = lengths and timed.ready.get("lengths", lengths)
        except WorkerError as error:
            timed.error = str(error)
    for number in range(workload.repeats):
        lengths = None
        for process, timed in live:
            if number < timed.rounds:
                lengths = _take_turn(process, timed, lengths) or lengths
        live = [(process, timed) for process, timed in live if not timed.error]
    for process, timed in live:
        try:
            timed.end = process.finish()
        except WorkerError as error:
            timed.error = str(error)
    return found


def _take_turn(process: Process, timed: Timed, lengths: list[int] | None) -> list[int] | None:
    """One step; the lengths of its responses where the system drew them itself."""
    try:
        step = process.step(lengths)
    except WorkerError as error:
        timed.error = str(error)
        return None
    timed.steps.append({"lengths": lengths} | step)
    return step.get("lengths")
