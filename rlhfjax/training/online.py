"""The online loop: four compiled steps an iteration, whatever the algorithm."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from rlhfjax.training.metrics import MetricsWriter, ProgressLine
from rlhfjax.types import Experience, OnlineState, Params, PromptBatch, Rollout

Metrics = dict[str, Any]


@dataclass(frozen=True)
class OnlineSteps:
    """The compiled functions of an iteration. `update` also moves the KL coefficient."""

    rollout: Callable[[Params, PromptBatch, jax.Array], Rollout]
    score: Callable[[Params, Any, Rollout], Rollout]
    estimate: Callable[[Rollout, jax.Array], tuple[Experience, Metrics]]
    update: Callable[[OnlineState, Experience, Any, Metrics, jax.Array], tuple[OnlineState, Metrics]]


def train_online(
    steps: OnlineSteps,
    state: OnlineState,
    frozen: Any,
    prompts: Iterator[PromptBatch],
    pretraining: Iterator[Any],
    *,
    iterations: int,
    key: jax.Array,
    stage: str,
    writer: MetricsWriter,
    learning_rate: Callable[[int], Any],
    updates: int,
    episodes: int,
    samples: Callable[[Rollout], list[dict[str, Any]]],
    samples_every: int,
    save: Callable[[OnlineState, int], None],
    save_every: int,
) -> OnlineState:
    """Sample, score, estimate, update, from the iteration after the last saved one to `iterations`.

    `updates` is the optimizer steps of an iteration. Metrics are written one iteration late.
    """
    start = int(state.iteration)
    progress = ProgressLine(stage, start, iterations)
    pending, latest = None, {}
    for iteration in range(start + 1, iterations + 1):
        rollout_key, update_key = jax.random.split(jax.random.fold_in(key, iteration))
        clock = _Clock()
        rollout = clock("rollout", steps.rollout(state.train.params, next(prompts), rollout_key))
        rollout = clock("score", steps.score(state.train.params, frozen, rollout))
        experience, metrics = clock("estimate", steps.estimate(rollout, state.kl_coef))
        state, update_metrics = clock("update", steps.update(state, experience, next(pretraining), metrics, update_key))
        if pending:
            latest = _write(writer, *pending)
        metrics = metrics | update_metrics | clock.seconds
        rate = learning_rate((iteration - 1) * updates)
        pending = (iteration, metrics | {"lr": rate, "episode": iteration * episodes})
        if iteration % samples_every == 0 or iteration == 1:
            writer.write_samples(iteration, samples(rollout))
        if iteration % save_every == 0 and iteration != iterations:
            latest, pending = _write(writer, *pending), None  # a run that is killed after the save has the row
            save(state, iteration)
        progress.show(iteration, {name.split("/")[-1]: latest[name] for name in _SHOWN if name in latest})
    if pending:
        _write(writer, *pending)
    progress.close()
    return state


def _write(writer: MetricsWriter, iteration: int, metrics: Metrics) -> dict[str, float]:
    tokens = float(metrics.pop("tokens"))
    rates = {
        "perf/decode_tokens_per_s": tokens / metrics["timing/rollout_s"],
        "perf/train_tokens_per_s": tokens * float(metrics["policy/epochs_run"]) / metrics["timing/update_s"],
    }
    return writer.write(iteration, metrics | rates)


_SHOWN = ("objective/scores", "objective/kl", "objective/length", "loss/ptx")


class _Clock:
    """Seconds of each step of an iteration; waits for the device, which the next step needs in any case."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, name: str, result: Any) -> Any:
        jax.block_until_ready(result)
        now = time.monotonic()
        self.seconds[f"timing/{name}_s"], self._last = now - self._last, now
        return result
