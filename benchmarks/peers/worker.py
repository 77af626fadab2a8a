"""The words of a timed process: standard library alone, because every peer runs it in an environment of its own.

A worker reads its workload as JSON from its only argument. It calls `lap()` after every step. The first `warmup` laps
are its warm-up; then it says that it is ready, and before every further step it waits for a line on its input, so
that processes take turns and sleep in between. What it says goes to its first output, one JSON object a line; whatever
libraries print goes to the error output. The line may say how long the responses of this turn are.
"""

import json
import os
import resource
import sys
import time
from typing import Any, NoReturn


class Worker:
    """The workload, and `lap`, which times the steps of a loop that somebody else may run."""

    def __init__(self) -> None:
        self._say = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.work: dict[str, Any] = json.loads(sys.argv[1])
        self._launched = float(os.environ.get("BENCHMARK_LAUNCHED", time.time()))
        self._laps, self._told = 0, None
        self._start()

    def lap(self, tokens: int | None = None, **facts: Any) -> None:
        """One step is over: `tokens` that count for it, `facts` such as seconds of its phases."""
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        self._laps += 1
        if self._laps == 1:
            self._first = {"first_step_seconds": seconds, "since_launch_seconds": time.time() - self._launched}
        if self._laps > self.work["warmup"]:
            self._tell(event="step", seconds=seconds, cpu_seconds=cpu, tokens=tokens, **facts)
        if self._laps >= self.work["warmup"]:
            if self._laps == self.work["warmup"]:
                self._tell(event="ready", **self._first, **facts)
            self._wait()
        self._start()

    @property
    def number(self) -> int:
        """How many steps are over, warm-up among them."""
        return self._laps

    def _start(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def lengths(self) -> list[int]:
        """How long the responses of the coming step are: what the turn said, else the next rows of the workload."""
        return self._told or response_lengths(self.work, self._laps)

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            self.finish()
        self._told = json.loads(line)["lengths"]

    def finish(self) -> NoReturn:
        """Says how much memory was used at most, and ends the process without waiting for other threads."""
        self._tell(event="end", peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        os._exit(0)

    def _tell(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._say, flush=True)


def response_lengths(work: dict[str, Any], step: int) -> list[int]:
    """How long the responses of this step are: the next `rows` of `lengths`, else all of full length."""
    lengths, rows = work["lengths"], work["rows"]
    if not lengths:
        return [work["response"]] * rows
    return [lengths[(step * rows + row) % len(lengths)] for row in range(rows)]
