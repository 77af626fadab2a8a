"""The online loop: four compiled steps an iteration, whatever the algorithm."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from rlhfjax import faults
from rlhfjax.errors import Stopped
from rlhfjax.training import stopping
from rlhfjax.training.flops import machine_peak
from rlhfjax.training.guards import Guard, write_row
from rlhfjax.training.metrics import MetricsWriter, ProgressLine, labelled
from rlhfjax.training.profiling import Clock, Trace
from rlhfjax.training.supervision import Watch
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
    watch: Watch | None = None,
    guard: Guard | None = None,
) -> OnlineState:
    """Sample, score, estimate, update, from the iteration after the last saved one to `iterations`.

    `updates` is the optimizer steps of an iteration, `flops` its model FLOPs by its counts; `first_step` is called when
    the first iteration is done, for a line to show. Metrics are written one iteration late, while the device updates,
    but before a save: what is saved has its row, and `guard` has seen that. A request to stop that `watch` hears of
    ends an iteration before its update, which does not wait for the device, or after it; the state of the last whole
    iteration is saved. Raises what it was asked to stop with.
    """
    start = saved = int(state.iteration)
    progress, trace = ProgressLine(stage, start, iterations), trace or Trace(writer.directory, None, stage)
    pending, latest, watch, stop = None, {}, watch or Watch(), False
    write = partial(_write, partial(write_row, guard, writer, progress), learning_rate, flops)
    for iteration in range(start + 1, iterations + 1):
        rollout_key, update_key = jax.random.split(jax.random.fold_in(key, iteration))
        watch.begin(stage, iteration)
        clock, batch = Clock(), next(prompts)
        with trace.step(iteration):
            try:
                collected = _collect(steps, state, frozen, batch, rollout_key, clock, watch, iteration)
            except (Stopped, KeyboardInterrupt):
                progress.close()
                if pending and iteration - 1 > saved:
                    write(*pending)
                    save(state, iteration - 1)
                raise
            rollout, experience, metrics = collected
            extra = next(pretraining)
            watch.begin("update", iteration)
            with clock("update"):
                state, update_metrics = steps.update(state, experience, extra, metrics, update_key)
                if pending:
                    latest = write(*pending)
                if iteration % samples_every == 0 or iteration == 1:
                    writer.write_samples(iteration, samples(rollout))
                jax.block_until_ready(state)
        metrics = {"updates": (iteration - 1) * updates} | metrics | update_metrics | clock.metrics()
        pending = (iteration, metrics | {"episode": iteration * episodes}, getattr(batch, "uid", None))
        if iteration == start + 1:
            if first_step:
                progress.note(first_step())
            if flops:
                machine_peak()  # where it has to be measured, that must not fall into an iteration
        watch.end()
        stop = watch.asked()
        if (stop or iteration % save_every == 0) and iteration != iterations:
            watch.begin("save", iteration)
            latest, pending = write(*pending), None  # a run that is killed after the save has the row
            save(state, iteration)
            saved = iteration
        if stop:
            break
        progress.show(iteration, labelled(latest, _SHOWN))
    trace.close()
    if pending:
        write(*pending)
    progress.close()
    if stop and int(state.iteration) != iterations:
        raise stopping.stop()
    return state


def _collect(
    steps: OnlineSteps,
    state: OnlineState,
    frozen: Any,
    prompts: PromptBatch,
    key: jax.Array,
    clock: Clock,
    watch: Watch,
    iteration: int,
) -> tuple[Rollout, Experience, Metrics]:
    """What an iteration learns from. The clock waits for each step, which the next one needs in any case."""
    params = state.train.params
    with clock("reshard"):
        served = params if steps.reshard is None else watch.wait(steps.reshard(params))
    watch.begin("rollout", iteration)
    with clock("rollout"):
        rollout = watch.wait(steps.rollout(served, prompts, key))
    watch.begin("score", iteration)
    with clock("score"):
        rollout = watch.wait(steps.score(params, frozen, rollout))
    rollout = _poisoned("score", iteration, rollout, "scores")
    with clock("estimate"):
        experience, metrics = watch.wait(steps.estimate(rollout, state.kl_coef))
    return rollout, _poisoned("update", iteration, experience, "advantages"), metrics


def _poisoned(point: str, iteration: int, made: Any, name: str) -> Any:
    """What a step made, with the numbers that a fault on purpose asks for."""
    if not faults.wanted(point):
        return made
    return replace(made, **{name: getattr(made, name) * faults.factor(point, iteration)})


def _write(
    write: Callable[[int, Metrics, Any], dict[str, float]],
    learning_rate: Callable[[int], Any],
    flops: Callable[[Mapping[str, float]], float] | None,
    iteration: int,
    metrics: Metrics,
    prompts: Any,
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
    # The schedule follows the optimizer's own count: steps that were skipped, or left out by kl.stop, do not move it.
    rate = {"lr": learning_rate(int(metrics["updates"]))}
    logged = {name: value for name, value in metrics.items() if name not in _UNLOGGED and not name.startswith("work/")}
    return write(iteration, logged | rate | rates, prompts)


_UNLOGGED = ("tokens", "updates")
_COUNTS = ("tokens", "work/prompt", "work/pairs", "policy/epochs_run")
_SHOWN = (
    *("objective/scores", "objective/kl", "objective/length", "loss/ptx"),
    *("timing/rollout_share", "timing/update_share", "perf/mfu"),
)
