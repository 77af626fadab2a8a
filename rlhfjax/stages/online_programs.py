"""Programs of an online stage, apart from running it: its learner and the jitted steps of an iteration."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms import Mix, OnlineAlgorithm, online_part, restrict
from rlhfjax.algorithms.groups import refilled
from rlhfjax.algorithms.packing import on_packed, packed_experience
from rlhfjax.algorithms.scored_rollouts import without_dropped
from rlhfjax.functional import adaptive_kl
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.host_memory import on_device
from rlhfjax.models import SequenceModel
from rlhfjax.models.frozen import in_compute_type
from rlhfjax.models.lora import join, split
from rlhfjax.sharding import batch_sharding, constrain_parts, replicated, state_shapes, state_shardings
from rlhfjax.sharding.sampling import sampling_layout, sampling_on
from rlhfjax.stages.compilation import step_options
from rlhfjax.stages.models import rerouted, sampler_of
from rlhfjax.stages.offline import average_of
from rlhfjax.stages.packed_rows import responses_a_row, rows_at_a_time, token_shards
from rlhfjax.stages.rewards import Judges, load_judges
from rlhfjax.stages.starts import Starts, at_rest
from rlhfjax.training.averaging import Average
from rlhfjax.training.flops import seen_by
from rlhfjax.training.online import OnlineSteps, Refill
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import init_state, init_state_shapes
from rlhfjax.training.update import Passes, online_update
from rlhfjax.types import OnlineState, Params, PromptBatch, Rollout, TokenBatch


@dataclass(frozen=True)
class OnlineLearner:
    """What a stage brings to the hall: an algorithm over models, and the parameters that it begins with.

    `params` holds what is trained, `policy` among it; `models` has the model of each. `frozen` is {"reference": …,
    "rewards": {title: …}}, the parameters of models that are only asked. `offload` says whether moments lie in the
    hosts' memory.
    """

    algorithm: OnlineAlgorithm | Mix
    models: Mapping[str, SequenceModel]
    params: Mapping[str, Params]
    judges: Judges
    frozen: Mapping[str, Params]
    optimizer: optax.GradientTransformation
    offload: bool = False

    @property
    def policy(self) -> SequenceModel:
        return self.models["policy"]

    @property
    def online(self) -> OnlineAlgorithm:
        return online_part(self.algorithm)


def policy_learner(objective: Callable[..., Any], c: Any, mesh: jax.sharding.Mesh, starts: Starts) -> OnlineLearner:
    """The learner of an algorithm that trains the policy alone, with itself as it was as the reference.

    `objective(c, model)` is the algorithm over the policy.
    """
    model, policy = starts.policy_from()
    judges, scoring = load_judges(c.rewards, starts)
    return OnlineLearner(
        algorithm=objective(c, model),
        models={"policy": model},
        params={"policy": policy},
        judges=judges,
        frozen=frozen_of(model, policy, judges, scoring, starts.offloads("frozen")),
        optimizer=optimizer_of(c, model.config.width, ["policy"]),
        offload=starts.offloads("moments"),
    )


def frozen_of(
    policy: SequenceModel, reference: Params, judges: Judges, scoring: Mapping[str, Params], offload: bool
) -> dict[str, Params]:
    """`OnlineLearner.frozen`: what nothing trains, in the type that it is read in; with `offload` on the host."""

    def kept(model: SequenceModel, params: Params) -> Params:
        return at_rest(in_compute_type(model.config, params), offload)

    rewards = {title: kept(judges.models[title], params) for title, params in scoring.items()}
    return {"reference": kept(policy, reference), "rewards": rewards}


def first_state(c: Any, mesh: jax.sharding.Mesh, learner: OnlineLearner) -> OnlineState:
    """The state that a stage begins with, on the mesh."""
    average = policy_average(c)
    how = learner.optimizer, average and average.of, learner.offload
    train = init_state(mesh, split(learner.params)[1], *how)
    state = OnlineState(train, jnp.float32(c.kl.in_reward), jnp.int32(0))
    return jax.device_put(state, state_shardings(mesh, state))


def first_state_shapes(c: Any, mesh: jax.sharding.Mesh, learner: OnlineLearner) -> OnlineState:
    """The shapes and layouts of that state."""
    average = policy_average(c)
    how = learner.optimizer, average and average.of, learner.offload
    train = init_state_shapes(mesh, split(learner.params)[1], *how)
    number: Any = partial(jax.ShapeDtypeStruct, ())
    return state_shapes(mesh, OnlineState(train, number(jnp.float32), number(jnp.int32)))


def build(
    c: Any, mesh: jax.sharding.Mesh, learner: OnlineLearner, state: OnlineState, sampling: SamplingParams
) -> OnlineSteps:
    """The four steps of an iteration, jitted with the layouts of the rules table; the state is donated to `update`.

    `state` may be of shapes. The parameters that nothing trains are bound as the first argument of the programs, which
    share their arrays: none is copied.
    """
    online, base = learner.online, split(learner.params)[0] or {}
    rows, layout = batch_sharding(mesh), state_shardings(mesh, state)
    group = responses_a_row(c, online.group, learner.policy, *learner.judges.models.values())
    part, place = rows_at_a_time(c, mesh, group), partial(constrain_parts, mesh)
    packed = {"place": place, "group": group, "multiple": token_shards(mesh)}
    pack = partial(packed_experience, part, **packed)

    def score(base: Params, trained: Params, frozen: Any, rollout: Rollout) -> Rollout:
        params, frozen = join(base, trained), on_device(frozen)  # once, not for each part of the rows

        def of_rows(rows: TokenBatch) -> tuple[Any, ...]:
            others = rows.unrouted()
            reference = online.log_probs({"policy": frozen["reference"]}, others)[0]
            own, _, values = online.predict(params, rows if c.batch.routing == "replayed" else others)
            moved = rerouted(learner.policy, params["policy"], rows)
            return own, reference, values, moved, *learner.judges.by_token(frozen["rewards"], others)

        own, reference, values, moved, *scores = on_packed(part, rollout, of_rows, **packed)
        log_probs = own if c.sampling.old_log_probs == "recompute" else rollout.sampled_log_probs
        rollout = replace(rollout, rerouted=moved, routes=rollout.routes if c.batch.routing == "replayed" else None)
        judged = learner.judges.scored(rollout, scores)
        return judged.scored(log_probs, reference, values, judged.scores)

    def estimate(rollout: Rollout, kl_coef: Any):
        rollout, rewards = learner.judges.total(rollout)
        experience, metrics = online.estimate(without_dropped(rollout), kl_coef)
        return experience, metrics | rewards | seen_by(rollout)

    def update(base: Params, state: OnlineState, experience: Any, pretraining: Any, measured: dict, key: jax.Array):
        restricted = restrict(learner.algorithm, partial(join, base))
        how = passes_of(c, pack), online.group, policy_average(c)
        train, metrics = online_update(restricted, learner.optimizer, state.train, experience, pretraining, key, *how)
        return OnlineState(train, next_kl_coef(c, state.kl_coef, measured), state.iteration + 1), metrics

    options = step_options(mesh, (base, state.train.params, learner.frozen))
    learn = jax.jit(update, donate_argnums=1, out_shardings=(layout, None), compiler_options=options)
    return OnlineSteps(
        **sampling_steps(c, mesh, learner, state, sampling),
        score=partial(jax.jit(score, out_shardings=rows, compiler_options=options), base),
        estimate=jax.jit(estimate, out_shardings=(rows, replicated(mesh))),
        update=partial(learn, base),
        episodes=c.batch.size,
        refill=refill_of(c, mesh, learner),
    )


def sampling_steps(
    c: Any, mesh: jax.sharding.Mesh, learner: OnlineLearner, state: OnlineState, sampling: SamplingParams
) -> dict[str, Any]:
    """`rollout`, and on several devices `reshard`: what the rollout reads, in the layout that it has for sampling.

    The training state keeps its parameters, so nothing can be donated.
    """
    base, rows = split(learner.params)[0] or {}, batch_sharding(mesh)
    sampler = sampler_of(learner.policy, c.sampling, c.batch.routing != "own")

    def draw(policy: Any, prompts: PromptBatch, key: jax.Array) -> Rollout:
        return sampling_on(mesh, generate)(sampler, policy, prompts, key, sampling, samples=learner.online.group)

    def rollout(base: Params, trained: Params, prompts: PromptBatch, key: jax.Array) -> Rollout:
        return draw(join(base, trained)["policy"], prompts, key)

    def reshard(base: Params, trained: Params) -> Any:
        return sampling_on(mesh, sampler.arrange)(join(base, trained)["policy"], c.batch.size)

    if (devices := sampling_layout(mesh)) is None:
        return {"rollout": partial(jax.jit(rollout, out_shardings=rows), base)}
    lies = devices.weight_shardings(jax.eval_shape(reshard, base, state.train.params))
    return {
        "rollout": jax.jit(draw, out_shardings=rows),
        "reshard": partial(jax.jit(reshard, out_shardings=lies), base),
    }


def refill_of(c: Any, mesh: jax.sharding.Mesh, learner: OnlineLearner) -> Refill | None:
    """Dynamic sampling, where the stage asks for more than one rollout an iteration."""
    draws = getattr(getattr(c, "groups", None), "draws", 1)
    if draws == 1:
        return None

    def informative(rollout: Rollout) -> jax.Array:
        return learner.online.informative(learner.judges.total(rollout)[0])

    def merged(kept: Rollout, new: Rollout) -> Rollout:
        return refilled(kept, informative(kept), new, informative(new))[0]

    return Refill(
        draws,
        jax.jit(informative, out_shardings=replicated(mesh)),
        jax.jit(merged, out_shardings=batch_sharding(mesh)),
    )


def next_kl_coef(c: Any, kl_coef: jax.Array, measured: Mapping[str, jax.Array]) -> jax.Array:
    """The KL coefficient of the next iteration, by the controller of the section `kl`."""
    if c.kl.controller != "adaptive":
        return kl_coef
    kl = measured["objective/kl"]
    moved = adaptive_kl(kl_coef, kl, target=c.kl.target, horizon=c.kl.horizon, episodes=c.batch.size)
    return jnp.where(jnp.isfinite(moved), moved, kl_coef)  # one KL that is NaN would stay in it for good


def passes_of(c: Any, pack: Any = None) -> Passes:
    """How an iteration of an online stage learns."""
    minibatch = c.batch.minibatch or c.batch.size
    parts = minibatch // (c.batch.micro or minibatch)
    return Passes(c.batch.epochs, c.batch.size // minibatch, parts, pack, c.kl.stop)


def policy_average(c: Any) -> Average | None:
    """The moving average of the policy, where the stage keeps one."""
    return average_of(c, lambda params: params["policy"])


def optimizer_of(
    c: Any, width: int | None = None, trained: Iterable[str] = ("policy", "value")
) -> optax.GradientTransformation:
    """An optimizer for each of the models that are trained, with a clipping and perhaps a learning rate of its own."""
    total = c.steps * passes_of(c).steps
    each: dict[Hashable, optax.GradientTransformation] = {
        name: make_optimizer(c.optimizer, total, peak=c.value.lr if name == "value" else None, width=width)
        for name in trained
    }
    return optax.partition(each, {name: name for name in each})
