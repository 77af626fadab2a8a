"""A stage that trains on batches, from its last checkpoint to its facts: pretraining, SFT, reward model and DPO."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhfjax import faults
from rlhfjax.algorithms import restrict
from rlhfjax.data.pipeline import Batches
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.models.lora import join, split
from rlhfjax.sharding import state_shardings
from rlhfjax.stages.compilation import Ahead, training_options
from rlhfjax.stages.data import held_out, open_batches
from rlhfjax.stages.guarded import go_back, restored_counts
from rlhfjax.stages.job import Job
from rlhfjax.stages.meters import Meter
from rlhfjax.training.averaging import handed_on
from rlhfjax.training.checkpoint import Checkpoints, meta_of
from rlhfjax.training.flops import OfflineFlops, forward_flops, seen_by
from rlhfjax.training.guards import Guard, Memory, memory_of, with_rollbacks
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.offline import train_offline
from rlhfjax.training.optimizer import learning_rate, make_optimizer
from rlhfjax.training.profiling import Trace
from rlhfjax.training.state import abstract, init_state
from rlhfjax.training.stopping import held
from rlhfjax.training.update import Pack, offline_step
from rlhfjax.types import Params, TrainState

Facts = dict[str, Any]
Validate = Callable[[Params, dict[str, Batches]], dict[str, float]]


def train_stage(
    job: Job,
    algorithm: Any,
    model: SequenceModel,
    params: Params,
    *,
    role: str,
    meter: Meter,
    validate: Validate,
    shown: tuple[str, ...],
    pack: Pack | None = None,
    finish: Callable[[Params], tuple[Params, Facts]] = lambda params: (params, {}),
    beside: Params | None = None,
) -> Facts:
    """Train from the stage's last checkpoint on, and save what `finish` makes of the result.

    The algorithm and `validate` find `beside`, which nothing trains, next to the parameters.
    """
    c, b = job.config, job.config.batch
    opened = open_batches(job)
    batches = opened["train"]
    steps = c.steps or batches.steps(c.epochs)
    optimizer = make_optimizer(c.optimizer, steps, width=model.config.width)
    follow = (lambda params: params) if c.optimizer.ema_decay is not None else None
    frozen, trained = split(params)
    fixed = frozen | (beside or {})
    fresh = partial(init_state, job.mesh, trained, optimizer, follow)
    meta = meta_of(role, model, job.tokenizer, averaged=bool(follow), stage=job.stage, **job.lineage())
    select = getattr(c, "select_by", "last")
    checkpoints = job.checkpoints(keep_best=select != "last")
    state, done, memory = _restore(checkpoints, fresh(), role)
    guard = Guard(job.run.reliability.guards, job.dir, job.stage, memory)
    if done:
        chosen = checkpoints.best() if select != "last" else steps
        checkpoints.close()
        return done | {"step": chosen}

    def save(state: TrainState, facts: Facts | None = None, score: float | None = None) -> None:
        average = {} if state.average is None else {"average": state.average}
        models = {role: state.params} | average
        training = (state.optimizer, state.step)
        told = meta | {"facts": facts, "guards": guard.memory.saved()}
        checkpoints.save(int(state.step), models, training, told, score, writer.latest)

    last_measured: dict[str, float] = {}

    def measure(state: TrainState, step: int) -> dict[str, float]:
        if step % c.validate_every and step != steps:
            return {}
        measured = validate(join(fixed, handed_on(state)), opened)
        last_measured.update(measured)
        return measured

    def keep(state: TrainState, step: int, measured: dict[str, float], stop: bool) -> Callable[[], None] | None:
        if step == steps:
            return None  # the last step is saved when the stage is finished with it
        if select != "last" and measured:
            return lambda: save(state, score=_selection_score(select, measured))
        return (lambda: save(state)) if stop or step % job.run.checkpoints.every == 0 else None

    parts = b.size // (b.micro or b.size)

    layout = state_shardings(job.mesh, state)

    @partial(jax.jit, donate_argnums=1, out_shardings=(layout, None), compiler_options=training_options())
    def step_fn(frozen: Params, state: TrainState, batch: Any, key: jax.Array, *poison: jax.Array):
        restricted = restrict(algorithm, partial(join, frozen))
        how = (parts, c.optimizer.ema_decay, poison[0] if poison else None, pack)
        state, metrics = offline_step(restricted, optimizer, state, batch, key, *how)
        return state, metrics | (seen_by(batch) if flops else {})

    flops = None
    if not isinstance(model, EncoderDecoder):
        flops = OfflineFlops(forward_flops(model.config, params), bool(frozen), predicts=role == "policy")
    first = next(job.put(iter([batches[int(state.step) + guard.memory.left_out]])))
    ahead = Ahead(job)
    poison = (np.float32(1),) if faults.wanted("update") else ()
    step = ahead.program(partial(step_fn, fixed), state, first, job.key("steps"), *poison)
    for data in list(held_out(opened).values())[:1]:  # all of them have batches of one shape
        ahead.afterwards(meter.total, *meter.shapes(join(fixed, state.params), data))
    writer = MetricsWriter(job.dir, int(state.step), job.run.logging.tensorboard)
    watch = job.watch()

    def train(state: TrainState) -> TrainState:
        return train_offline(
            step,
            state,
            checkpoints.watched(job.put(batches.iterate(int(state.step) + guard.memory.left_out))),
            steps=steps,
            key=job.key("steps"),
            stage=job.stage,
            writer=writer,
            learning_rate=learning_rate(c.optimizer, steps, width=model.config.width),
            shown=shown,
            measure=measure,
            keep=keep,
            flops=flops,
            trace=Trace(job.dir, job.run.profile, job.stage),
            first_step=None if ahead.facts else ahead.first_step,  # after a rollback all is compiled
            watch=watch,
            guard=guard,
            rows=lambda step: (step - 1 + guard.memory.left_out) * b.size + np.arange(b.size),
        )

    def restore() -> tuple[TrainState, int, Memory]:
        state, _, memory = _restore(checkpoints, fresh(), role)
        return state, int(state.step), memory

    # A stage that is asked to stop finishes the save that is under way.
    with held(), closing(checkpoints), closing(writer), closing(watch):
        back = partial(go_back, job, guard, checkpoints, writer, restore)
        state = with_rollbacks(train, state, back)
        served, facts = finish(join(frozen, handed_on(state)))
        trained = split(served)[1]
        sizes = {"parameters": _size(served)} | ({"trainable_parameters": _size(trained)} if frozen else {})
        facts = {"step": steps} | sizes | facts | ahead.facts | watch.facts() | writer.gaps() | guard.memory.told()
        score = None if select == "last" else _selection_score(select, last_measured)
        finished = {"params": trained} if state.average is None else {"average": trained}
        save(replace(state, **finished), facts, score)
        return facts | {"step": checkpoints.best() if select != "last" else steps}


def _size(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _selection_score(select: str, measured: dict[str, float]) -> float:
    """Higher is better: the reward model's mean score of samples, or the negative validation loss."""
    return measured["eval/reward_score"] if select == "reward_score" else -measured["loss/validation"]


def _restore(checkpoints: Checkpoints, state: TrainState, role: str) -> tuple[TrainState, Facts | None, Memory]:
    """The state at the last checkpoint, the stage's facts when that was its last step, and what its guards knew."""
    average = {} if state.average is None else {"average": abstract(state.average)}
    training = abstract((state.optimizer, state.step))
    restored = checkpoints.restore_newest({role: abstract(state.params)} | average, training)
    if restored is None:
        return state, None, Memory()
    models, (optimizer, step), meta = restored
    memory = memory_of(meta)
    skipped = restored_counts(state.skipped, memory)
    return TrainState(models[role], optimizer, step, models.get("average"), skipped), meta["facts"], memory
