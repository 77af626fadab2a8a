"""The worker for this package: the compiled steps of its stages, on random tokens and fresh weights.

    python -m benchmarks.ours WORKLOAD_AS_JSON

With BENCHMARK_TRACE=DIRECTORY the last step of the warm-up leaves a trace there.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from benchmarks import standins
from benchmarks.peers.worker import Worker

standins.install()

from benchmarks.flops import parameters  # noqa: E402
from rlhfjax.host.memory import collect_seldom, keep_freed_memory, run_in_caller  # noqa: E402

if __name__ == "__main__":  # as `rlhfjax run` does before it imports jax
    collect_seldom()
    keep_freed_memory(parameters(json.loads(sys.argv[1])["shape"]))
    run_in_caller()

import jax  # noqa: E402

from benchmarks import product  # noqa: E402

Step = Callable[[int], dict[str, Any]]


class Compilations:
    """Counts what XLA compiles in this process, and the seconds that it takes."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count, self.seconds = self.count + 1, self.seconds + seconds


def step_of(work: dict[str, Any]) -> Step:
    """A function of the step's number that does one step and says how many tokens count for it."""
    if work["task"].startswith("ppo"):
        return product.PpoLoop(work)
    if work["task"] == "grpo":
        return product.GrpoLoop(work)
    if work["task"].startswith(("generation", "decode")):
        return _counted(product.Texts(work))
    loop = {"sft": product.sft, "reward": product.reward, "dpo": product.dpo}[work["task"]](work)
    return lambda number: {"tokens": work["rows"] * work["length"]} | (loop(number) or {})


def _counted(texts: product.Texts) -> Step:
    def step(number: int) -> dict[str, Any]:
        lengths = texts(number)
        return {"tokens": sum(lengths), "lengths": lengths}

    return step


def device_bytes() -> int | None:
    """The most that the accelerator's memory has held; None where the device is the host."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def main() -> None:
    """Steps until nobody asks for one."""
    worker = Worker()
    compilations, trace = Compilations(), os.environ.get("BENCHMARK_TRACE", "")
    step = step_of(worker.work)
    for number in itertools.count():
        before = compilations.count
        traced = trace and number == worker.work["warmup"] - 1
        with jax.profiler.trace(trace) if traced else nullcontext():
            facts = step(number)
        counted = {"compilations": compilations.count - before, "compile_seconds": compilations.seconds}
        worker.lap(**facts, **counted, device_bytes=device_bytes())


if __name__ == "__main__":
    main()
