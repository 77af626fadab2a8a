"""The programs of a recipe, compiled side by side in processes of their own, each within limits of time and memory."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from rlhfjax.planning.compiler import Job

Answers = dict[str, dict[str, Any]]
# The compilers of the longest programs begin first, or one core would wait for them at the end.
_LONGEST_FIRST = ("update", "step", "responses", "rollout", "score")
_POLL = 0.2


@dataclass(frozen=True)
class Limits:
    """Of the compiler of one program: seconds, bytes of memory, and how many run side by side."""

    seconds: float = 600.0
    memory: int = field(default_factory=lambda: memory_of_host() * 8 // 10 // _side_by_side())
    workers: int = field(default_factory=lambda: _side_by_side())


def memory_of_host() -> int:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _side_by_side() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 4))


def compiled(
    job: Job, stages: Iterable[str], limits: Limits, say: Callable[[str], None], only: Iterable[str] | None = None
) -> tuple[Answers, Answers]:
    """What each stage holds, and what each program is, by `STAGE/NAME`; one that could not be made says why.

    `only` names programs, where not all of them are asked for.
    """
    stages = list(stages)
    held = _asked(job, stages, limits, lambda name, answer, left: None)
    names = [f"{stage}/{name}" for stage in stages for name in held[stage].get("programs", ())]
    wanted = names if only is None else [name for name in names if name in set(only)]
    began = time.monotonic()

    def progress(name: str, answer: Mapping[str, Any], left: int) -> None:
        done, passed = len(wanted) - left, time.monotonic() - began
        rest = f", about {passed / done * left:.0f} s left" if left else ""
        how = answer.get("said") or f"{answer['compile_s']:.0f} s"
        say(f"{name}: {how} ({done} of {len(wanted)}{rest})")

    return held, _asked(job, sorted(wanted, key=partial(_turn, wanted)), limits, progress)


def _turn(names: list[str], name: str) -> int:
    """Of two samplers of one stage the second waits until the first is remembered: they are mostly the same program."""
    stage, *parts = name.split("/")
    again = "responses" in parts and name != next(one for one in names if one.startswith(f"{stage}/responses"))
    places = (place for place, long in enumerate(_LONGEST_FIRST) if long in parts and not again)
    return next(places, len(_LONGEST_FIRST) + again)


def _asked(job: Job, names: list[str], limits: Limits, told: Callable[[str, Mapping[str, Any], int], None]) -> Answers:
    """The answers of compilers to what is asked, each from the next process that is free."""
    waiting: Queue[str] = Queue()
    for name in names:
        waiting.put(name)
    answers: Answers = {}
    lock = threading.Lock()

    def work() -> None:
        worker = None
        try:
            while True:
                try:
                    name = waiting.get_nowait()
                except Empty:
                    return
                worker = worker or _Worker(job)
                answer = worker.ask(name, limits)
                if worker.ended:
                    worker = None
                with lock:
                    answers[name] = answer
                    told(name, answer, len(names) - len(answers))
        finally:
            if worker:
                worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(limits.workers, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: answers[name] for name in names if name in answers}


class _Worker:
    """A process that compiles."""

    def __init__(self, job: Job):
        words = [sys.executable, "-m", "rlhfjax.planning.compiler"]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.ended = False
        self._tell(job.text())

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            self._said = [*self._said[-20:], line.rstrip()]

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # its end is noticed when it is asked
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def ask(self, name: str, limits: Limits) -> dict[str, Any]:
        """Its answer; where it dies or goes beyond a limit, what happened."""
        self._tell(name)
        assert self._process.stdout
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not selector.select(_POLL):
                took, memory = time.monotonic() - began, self._size()
                if took > limits.seconds:
                    return self._stopped("time", f"the compiler was stopped after {took:.0f} s")
                if memory > limits.memory:
                    return self._stopped("memory of this host", f"the compiler was stopped with {memory / 1e9:.1f} GB")
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        said = signal.Signals(-code).name if code < 0 else f"exit {code}"
        last = next((line for line in reversed(self._said) if line.strip()), "")
        return self._stopped("the compiler died", f"the compiler died: {said} {last[:200]}".strip())

    def _stopped(self, why: str, said: str) -> dict[str, Any]:
        self.close()
        return {"failed": why, "said": said}

    def _size(self) -> int:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Nothing of it is left."""
        self.ended = True
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()
