"""The online loop: four compiled steps an iteration, whatever the algorithm."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from rlhfjax.training.flops import machine_peak
from rlhfjax.training.metrics import MetricsWriter, ProgressLine
from rlhfjax.training.profiling import Clock, Trace
from rlhfjax.types import Experience, OnlineState, Params, PromptBatch, Rollout

Metrics = dict[str, Any]


@dataclass(frozen=True)
class OnlineSteps:
    """The compiled functions of an iteration. `update` also moves the KL coefficient.

    `reshard`, where there is one, makes of the parameters what `rollout` reads: another layout or another type.
    """

    rollout: Callable[[Params, PromptBatch, jax.Array], Rollout]
    score: Callable[[Params, Any, Rollout], Rollout]
    estimate: Callable[[Rollout, jax.Array], tuple[Experience, Metrics]]
    update: Callable[[OnlineState, Experience, Any, Metrics, jax.Array], tuple[OnlineState, Metrics]]
    reshard: Callable[[Params], Any] | None = None


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
    flops: Callable[[Mapping[str, float]], float] | None = None,
    trace: Trace | None = None,
    first_step: Callable[[], str] | None = None,
) -> OnlineState:
    """Sample, score, estimate, update, from the iteration after the last saved one to `iterations`.

    `updates` is the optimizer steps of an iteration, `flops` its model FLOPs by its counts; `first_step` is called when
    the first iteration is done, for a line to show. Metrics are written one iteration late, while the device updates.
    """
    start = int(state.iteration)
    progress, trace = ProgressLine(stage, start, iterations), trace or Trace(writer.directory, None, stage)
    pending, latest = None, {}
    for iteration in range(start + 1, iterations + 1):
        rollout_key, update_key = jax.random.split(jax.random.fold_in(key, iteration))
        clock = Clock()
        with trace.step(iteration):
            rollout, experience, metrics = _collect(steps, state, frozen, next(prompts), rollout_key, clock)
            extra = next(pretraining)
            with clock("update"):
                state, update_metrics = steps.update(state, experience, extra, metrics, update_key)
                if pending:
                    latest = _write(writer, *pending, flops)
                if iteration % samples_every == 0 or iteration == 1:
                    writer.write_samples(iteration, samples(rollout))
                jax.block_until_ready(state)
        rate = learning_rate((iteration - 1) * updates)
        metrics = metrics | update_metrics | {"lr": rate, "episode": iteration * episodes} | clock.metrics()
        pending = (iteration, metrics)
        if iteration == start + 1:
            if first_step:
                progress.note(first_step())
            if flops:
                machine_peak()  # where it has to be measured, that must not fall into an iteration
        if iteration % save_every == 0 and iteration != iterations:
            latest, pending = _write(writer, *pending, flops), None  # a run that is killed after the save has the row
            save(state, iteration)
        progress.show(iteration, {name.split("/")[-1]: latest[name] for name in _SHOWN if name in latest})
    trace.close()
    if pending:
        _write(writer, *pending, flops)
    progress.close()
    return state


def _collect(
    steps: OnlineSteps, state: OnlineState, frozen: Any, prompts: PromptBatch, key: jax.Array, clock: Clock
) -> tuple[Rollout, Experience, Metrics]:
    """What an iteration learns from. The clock waits for each step, which the next one needs in any case."""
    params = state.train.params
    with clock("reshard"):
        served = params if steps.reshard is None else jax.block_until_ready(steps.reshard(params))
    with clock("rollout"):
        rollout = jax.block_until_ready(steps.rollout(served, prompts, key))
    with clock("score"):
        rollout = jax.block_until_ready(steps.score(params, frozen, rollout))
    with clock("estimate"):
        experience, metrics = jax.block_until_ready(steps.estimate(rollout, state.kl_coef))
    return rollout, experience, metrics


def _write(
    writer: MetricsWriter, iteration: int, metrics: Metrics, flops: Callable[[Mapping[str, float]], float] | None
) -> dict[str, float]:
    counts = {name: float(metrics[name]) for name in _COUNTS if name in metrics}
    tokens = counts["tokens"]
    rates = {
        "perf/decode_tokens_per_s": tokens / metrics["timing/rollout_s"],
        "perf/train_tokens_per_s": tokens * counts["policy/epochs_run"] / metrics["timing/update_s"],
    }
    if "work/prompt" in counts:
        rates["perf/prefill_tokens_per_s"] = counts["work/prompt"] / metrics["timing/rollout_s"]
    if flops and "work/pairs" in counts:
        rates["perf/mfu"] = flops(counts) / (metrics["timing/step_s"] * machine_peak())
    logged = {name: value for name, value in metrics.items() if name != "tokens" and not name.startswith("work/")}
    return writer.write(iteration, logged | rates)


_COUNTS = ("tokens", "work/prompt", "work/pairs", "policy/epochs_run")
_SHOWN = (
    *("objective/scores", "objective/kl", "objective/length", "loss/ptx"),
    *("timing/rollout_share", "timing/update_share", "perf/mfu"),
)
