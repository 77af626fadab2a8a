"""The worker for this package: the compiled steps of its stages, on random tokens and fresh weights.

python -m benchmarks.ours WORKLOAD_AS_JSON
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.peers.worker import Worker, response_lengths
from benchmarks.product import GrpoLoop, OfflineLoop, PpoLoop, Texts

Step = Callable[[int], dict[str, Any]]


class Compilations:
    """Counts what XLA compiles in this process, and the seconds that it takes."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count, self.seconds = self.count + 1, self.seconds + seconds


def sft(work: dict[str, Any]) -> Step:
    loop = OfflineLoop.sft(work)
    return _tokens_of_batches(loop, work["rows"] * work["length"])


def reward(work: dict[str, Any]) -> Step:
    return _tokens_of_batches(OfflineLoop.reward(work), work["rows"] * work["length"])


def dpo(work: dict[str, Any]) -> Step:
    return _tokens_of_batches(OfflineLoop.dpo(work), work["rows"] * work["length"])


def _tokens_of_batches(loop: OfflineLoop, tokens: int) -> Step:
    def step(number: int) -> dict[str, Any]:
        loop(number)
        return {"tokens": tokens}

    return step


def generation(work: dict[str, Any]) -> Step:
    texts = Texts(work)

    def step(number: int) -> dict[str, Any]:
        made = texts(number)
        expected = sum(response_lengths(work, number))
        if made != expected:
            raise AssertionError(f"expected {expected} response tokens, got {made}")
        return {"tokens": made}

    return step


def ppo(work: dict[str, Any]) -> Step:
    return PpoLoop(work)


def grpo(work: dict[str, Any]) -> Step:
    return GrpoLoop(work)


TASKS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "generation": generation,
    "generation_ragged": generation,
    "decode_batch1": generation,
    "ppo": ppo,
    "ppo_ragged": ppo,
    "grpo": grpo,
}


def main() -> None:
    worker = Worker()
    compilations = Compilations()
    step = TASKS[worker.work["task"]](worker.work)
    for number in itertools.count():
        before = compilations.count
        facts = step(number)
        worker.lap(**facts, compilations=compilations.count - before, compile_seconds=compilations.seconds)


if __name__ == "__main__":
    np.random.seed(0)  # noqa: NPY002
    main()
