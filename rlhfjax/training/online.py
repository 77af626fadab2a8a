"""The online loop: four compiled steps per iteration, whatever the algorithm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax

from rlhfjax import faults
from rlhfjax.errors import RewardError, Stopped
from rlhfjax.host import marks, stopping
from rlhfjax.training.ledger import Taken
from rlhfjax.training.loop import Beside, Counts, Log, Metrics
from rlhfjax.training.profiling import Clock
from rlhfjax.types import Experience, OnlineState, Params, PromptBatch, Rollout


class Asked(Protocol):
    """Rewards that the host is finding."""

    def done(self) -> bool:
        """Whether they are there."""
        ...

    def put(self, scored: Rollout) -> tuple[Rollout, Metrics]:
        """Wait for them, and put them into the rollout. Raises RewardError in every process."""
        ...


@dataclass(frozen=True)
class Refill:
    """Dynamic sampling (Yu et al. 2025): `draws` rollouts at most, until every group of responses is `informative`."""

    draws: int
    informative: Callable[[Rollout], jax.Array]
    merged: Callable[[Rollout, Rollout], Rollout]


@dataclass(frozen=True)
class OnlineSteps:
    """The compiled functions of an iteration over `episodes` responses. `update` also moves the KL coefficient.

    `reshard`, where there is one, makes of the parameters what `rollout` reads: another layout or another type. `judge`
    asks for the rewards that are found on the host, which goes on while the device scores. `refill` draws more where
    not all groups of responses teach something.
    """

    rollout: Callable[[Params, PromptBatch, jax.Array], Rollout]
    score: Callable[[Params, Any, Rollout], Rollout]
    estimate: Callable[[Rollout, jax.Array], tuple[Experience, Metrics]]
    update: Callable[[OnlineState, Experience, Any, Metrics, jax.Array], tuple[OnlineState, Metrics]]
    reshard: Callable[[Params], Any] | None = None
    episodes: int = 1
    judge: Callable[[Rollout], Asked] | None = None
    refill: Refill | None = None


def train_online(
    steps: OnlineSteps,
    state: OnlineState,
    frozen: Any,
    prompts: Iterator[PromptBatch],
    pretraining: Iterator[Any],
    *,
    iterations: int,
    key: jax.Array,
    beside: Beside,
    sampled: Callable[[int, Rollout], Taken | None],
    keep: Callable[[OnlineState, int, bool], Callable[[], None] | None],
) -> OnlineState:
    """Sample, score, estimate, update, from the iteration after the last saved one to `iterations`.

    `sampled` is shown every rollout, and says which prompts the iteration read; `keep` gives what saves the state when
    that is due, or when its last argument says that it must be, unless it is saved, because of a request to stop. Such
    a request ends an iteration before its update, which does not wait for the device, or after it; the state of the
    last whole iteration is saved. Raises what it was asked to stop with.
    """
    start = int(state.iteration)
    log, watch, stop = Log(beside, start, iterations), beside.watch, False
    for iteration in range(start + 1, iterations + 1):
        rollout_key, update_key = jax.random.split(jax.random.fold_in(key, iteration))
        watch.begin(beside.stage, iteration)
        clock = Clock()
        with beside.trace.step(iteration):
            try:
                collected = _collect(steps, state, frozen, prompts, rollout_key, _Timed(beside, clock, iteration))
            except (Stopped, KeyboardInterrupt, RewardError):
                log.close()
                if save := keep(state, iteration - 1, True):
                    save()
                raise
            rollout, experience, metrics = collected
            extra = next(pretraining)
            watch.begin("update", iteration)
            with clock("update"):
                state, update_metrics = steps.update(state, experience, extra, metrics, update_key)
                log.write()  # the row of the iteration before, while the device updates
                taken = sampled(iteration, rollout)
                with marks.inside(marks.PROGRAM):
                    jax.block_until_ready(state)
        metrics |= update_metrics | clock.metrics() | {"episode": iteration * steps.episodes}
        log.later(iteration, metrics, metrics["timing/step_s"], partial(_rates, metrics), taken)
        log.step_done(iteration)
        watch.end()
        stop = watch.asked()
        if iteration != iterations and (save := keep(state, iteration, stop) or beside.spare(state, iteration)):
            watch.begin("save", iteration)
            log.write()  # a run that is killed after the save has the row
            save()
        if stop:
            break
        log.show(iteration)
    log.close()
    if stop and int(state.iteration) != iterations:
        raise stopping.stop()
    return state


@dataclass(frozen=True)
class _Timed:
    """The steps of one iteration before its update: each is timed, has a deadline, and can be stopped."""

    beside: Beside
    clock: Clock
    iteration: int

    def __call__(self, name: str, step: Callable[..., Any], *arguments: Any, unit: bool = True) -> Any:
        """What a step gives, once it is there: the next one needs it in any case."""
        if unit:
            self.beside.watch.begin(name, self.iteration)
        with self.clock(name):
            return self.beside.watch.wait(step(*arguments))

    def poisoned(self, point: str, made: Any, name: str) -> Any:
        """What a step made, with the numbers that a fault on purpose asks for."""
        if not faults.wanted(point):
            return made
        return replace(made, **{name: getattr(made, name) * faults.factor(point, self.iteration)})


def _collect(
    steps: OnlineSteps, state: OnlineState, frozen: Any, prompts: Iterator[Any], key: jax.Array, timed: _Timed
) -> tuple[Rollout, Experience, Metrics]:
    """What an iteration learns from."""
    params = state.train.params
    counted: Metrics = {}  # over all rollouts of the iteration

    def draw(key: jax.Array) -> Rollout:
        batch = next(prompts)
        # Only a rollout reads what it reads: nothing but the parameters is there when the device scores.
        with timed.clock("reshard"):
            served = params if steps.reshard is None else timed.beside.watch.wait(steps.reshard(params))
        rollout = timed("rollout", steps.rollout, served, batch, key)
        del served
        asked = steps.judge(rollout) if steps.judge else None
        scored = timed.poisoned("score", timed("score", steps.score, params, frozen, rollout), "scores")
        if asked:
            timed.beside.watch.begin("rewards", timed.iteration)
            with timed.clock("rewards"):
                with marks.inside(marks.REWARDS):
                    timed.beside.watch.until(asked.done)
                scored, counts = asked.put(scored)
            counted.update({name: counted.get(name, 0.0) + count for name, count in counts.items()})
        return scored

    rollout = draw(key)
    if steps.refill:
        rollout, drawn = _refilled(steps.refill, rollout, lambda turn: draw(jax.random.fold_in(key, turn)))
        counted["objective/draws"] = drawn
    experience, metrics = timed("estimate", steps.estimate, rollout, state.kl_coef, unit=False)
    return rollout, timed.poisoned("update", experience, "advantages"), metrics | counted


def _refilled(refill: Refill, rollout: Rollout, draw: Callable[[int], Rollout]) -> tuple[Rollout, int]:
    """A rollout whose groups all teach something, or as many as were found, and how many rollouts were drawn."""
    for turn in range(1, refill.draws):
        if bool(jax.device_get(refill.informative(rollout)).all()):
            return rollout, turn
        rollout = refill.merged(rollout, draw(turn))
    return rollout, refill.draws


def _rates(metrics: Metrics, counts: Counts) -> dict[str, float]:
    tokens = counts["tokens"]
    rates = {
        "perf/decode_tokens_per_s": tokens / metrics["timing/rollout_s"],
        "perf/train_tokens_per_s": tokens * counts["policy/epochs_run"] / metrics["timing/update_s"],
    }
    if "work/prompt" in counts:
        rates["perf/prefill_tokens_per_s"] = counts["work/prompt"] / metrics["timing/rollout_s"]
    return rates
