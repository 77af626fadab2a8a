"""The offline hall: a stage that trains on batches of data, from its last checkpoint to its facts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhfjax import faults
from rlhfjax.algorithms import Objective, restrict
from rlhfjax.data.by_step import Batches
from rlhfjax.host_memory import on_device
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.models.lora import join, split
from rlhfjax.sharding import state_shardings
from rlhfjax.stages.batches import held_out, open_batches
from rlhfjax.stages.compilation import Ahead, step_options
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Begun, Facts, Learning, Stored, meta_for, rate_of
from rlhfjax.stages.measures.validation import Meter
from rlhfjax.training.averaging import Average, handed_on
from rlhfjax.training.flops import OfflineFlops, forward_flops, seen_by
from rlhfjax.training.ledger import Taken
from rlhfjax.training.offline import train_offline
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import init_state, init_state_shapes
from rlhfjax.training.update import Pack, offline_step
from rlhfjax.types import Params, TrainState

Validate = Callable[[Params, dict[str, Batches]], dict[str, float]]


@dataclass(frozen=True)
class OfflineLearner:
    """What a stage brings to the hall: the model that learns, its objective, and how it is measured.

    Objective and `validate` find `beside`, which nothing trains, next to the parameters; `finish` makes of the trained
    ones what the stage hands on, and facts. `shown` are the metrics of the progress line.
    """

    role: str
    model: SequenceModel
    params: Params
    objective: Objective
    meter: Meter
    validate: Validate
    shown: tuple[str, ...]
    pack: Pack | None = None
    finish: Callable[[Params], tuple[Params, Facts]] = lambda params: (params, {})
    beside: Params | None = None

    @property
    def fixed(self) -> Params:
        """Parameters that are not in the state because nothing trains them."""
        return split(self.params)[0] | (self.beside or {})

    @property
    def flops(self) -> OfflineFlops | None:
        """Model FLOPs of a step; None for an encoder–decoder, which reads its two texts with different weights."""
        if isinstance(self.model, EncoderDecoder):
            return None
        frozen = bool(split(self.params)[0])
        return OfflineFlops(forward_flops(self.model.config, self.params), frozen, predicts=self.role == "policy")


def learn_offline(job: Job, learner_of: Callable[[], OfflineLearner]) -> Facts:
    """Train from the stage's last checkpoint on, and save what `learner.finish` makes of the result."""
    c, opened, begun = job.config, open_batches(job), Begun(learner_of)
    learner = begun.learner
    steps, select = c.steps or opened["train"].steps(c.epochs), getattr(c, "select_by", "last")
    optimizer = make_optimizer(c.optimizer, steps, width=learner.model.config.width)
    learning = _learning(job, begun, optimizer, select)
    if learning.finished:
        chosen = learning.checkpoints.best() if select != "last" else steps
        learning.checkpoints.close()
        return learning.finished | {"step": chosen}
    ahead = Ahead(job.stage, job.shared.get("began"))
    step = _compiled(job, learner, learning, opened, ahead, optimizer)
    measured_last: dict[str, float] = {}

    def measure(state: TrainState, step: int) -> dict[str, float]:
        if step % c.validate_every and step != steps:
            return {}
        measured = learner.validate(on_device(join(learner.fixed, handed_on(state))), opened)
        measured_last.update(measured)
        return measured

    def keep(state: TrainState, step: int, measured: dict[str, float], stop: bool) -> Callable[[], None] | None:
        if step == steps:
            return None  # the last step is saved when the stage is finished with it
        if select != "last" and measured:
            return lambda: learning.save(state, score=_selection_score(select, measured))
        return (lambda: learning.save(state)) if stop or step % job.run.checkpoints.every == 0 else None

    def train(state: TrainState) -> TrainState:
        first = learning.place(state) - int(state.step)
        return train_offline(
            step,
            state,
            learning.batches(opened["train"].iterate(learning.place(state))),
            steps=steps,
            key=job.key("steps"),
            beside=learning.beside(ahead, rate_of(c.optimizer, steps, learner.model), learner.shown, learner.flops),
            measure=measure,
            keep=keep,
            taken=lambda step: Taken((step - 1 + first) * c.batch.size, c.batch.size),
        )

    def finish(state: TrainState) -> Facts:
        frozen = split(learner.params)[0]
        served, facts = learner.finish(on_device(join(frozen, handed_on(state))))
        trained = split(served)[1]
        sizes = {"parameters": _size(served)} | ({"trainable_parameters": _size(trained)} if frozen else {})
        facts = {"step": steps} | sizes | facts | ahead.facts | learning.facts()
        score = None if select == "last" else _selection_score(select, measured_last)
        finished = {"params": trained} if state.average is None else {"average": trained}
        learning.save(replace(state, **finished), facts, score)
        return facts | {"step": learning.checkpoints.best() if select != "last" else steps}

    return learning.run(train, finish, opened["train"])


def _learning(job: Job, begun: Begun[OfflineLearner], optimizer: Any, select: str) -> Learning[TrainState]:
    """The stage at its newest checkpoint."""
    average, learner = average_of(job.config), begun.learner
    how = optimizer, average and average.of, job.offloads("moments")
    shapes = init_state_shapes(job.mesh, split(learner.params)[1], *how)

    def fresh(learner: OfflineLearner) -> TrainState:
        return init_state(job.mesh, split(learner.params)[1], *how)

    meta = meta_for(job, learner.role, learner.model, averaged=average is not None)
    checkpoints = job.checkpoints(keep_best=select != "last")
    return Learning(job, checkpoints, stored_as(learner.role), begun, fresh, shapes, meta)


def _compiled(
    job: Job, learner: OfflineLearner, learning: Learning, opened: dict[str, Batches], ahead: Ahead, optimizer: Any
) -> Any:
    """The step of the stage, compiled while the stage goes on."""
    state, faulty = learning.state, faults.wanted("update")
    step = partial(build(job.config, job.mesh, learner, state, optimizer), learner.fixed)
    first = next(job.put(iter([opened["train"][learning.place(state)]])))
    program = ahead.program(step, state, first, job.key("steps"), *((np.float32(1),) if faulty else ()))
    for data in list(held_out(opened).values())[:1]:  # all of them have batches of one shape
        ahead.afterwards(learner.meter.total, *learner.meter.shapes(on_device(join(learner.fixed, state.params)), data))
    return program


def build(c: Any, mesh: jax.sharding.Mesh, learner: OfflineLearner, state: TrainState, optimizer: Any) -> Any:
    """The jitted step of an offline stage: (fixed, state, batch, key[, poison]) -> (state, metrics).

    `state` may be of shapes; it is donated. `poison`, in tests of guards, multiplies the gradient.
    """
    layout, flops = state_shardings(mesh, state), learner.flops
    parts, average = c.batch.size // (c.batch.micro or c.batch.size), average_of(c)

    options = step_options(mesh, (learner.fixed, state.params))

    @partial(jax.jit, donate_argnums=1, out_shardings=(layout, None), compiler_options=options)
    def step_fn(fixed: Params, state: TrainState, batch: Any, key: jax.Array, *poison: jax.Array):
        restricted = restrict(learner.objective, partial(join, on_device(fixed)))
        how = parts, average, poison[0] if poison else None, learner.pack
        state, metrics = offline_step(restricted, optimizer, state, batch, key, *how)
        return state, metrics | (seen_by(batch) if flops else {})

    return step_fn


def average_of(c: Any, of: Callable[[Params], Params] = lambda params: params) -> Average | None:
    """The moving average that a stage's optimizer section asks for."""
    return None if c.optimizer.ema_decay is None else Average(c.optimizer.ema_decay, of)


def stored_as(role: str) -> Stored[TrainState]:
    """A state of one model, as item `role`, with the moving average beside it."""

    def whole(fresh: TrainState, models: dict, training: tuple, skipped: Any) -> TrainState:
        optimizer, step = training
        return TrainState(models[role], optimizer, step, models.get("average"), skipped)

    return Stored(
        models=lambda state: {role: state.params} | ({} if state.average is None else {"average": state.average}),
        training=lambda state: (state.optimizer, state.step),
        whole=whole,
        skipped=lambda state: state.skipped,
        step=lambda state: int(state.step),
    )


def _size(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _selection_score(select: str, measured: dict[str, float]) -> float:
    """Higher is better: the reward model's mean score of samples, or the negative validation loss."""
    return measured["eval/reward_score"] if select == "reward_score" else -measured["loss/validation"]
