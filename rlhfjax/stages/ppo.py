"""Reinforcement learning from the reward model: PPO with the KL penalty and the pretraining mix."""

import itertools
from collections.abc import Hashable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms import Mix, Ppo, restrict
from rlhfjax.algorithms.likelihood import log_probs_and_values, token_log_probs, token_scores, token_values
from rlhfjax.algorithms.packing import on_packed, packed_experience
from rlhfjax.config import schema
from rlhfjax.functional import adaptive_kl, kl_estimate
from rlhfjax.functional.masking import at_last
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.models.lora import has_adapters, join, split
from rlhfjax.sharding import batch_sharding, constrain_parts, processes, replicated, state_shardings
from rlhfjax.sharding.sampling import split_caches
from rlhfjax.stages.compilation import Ahead, training_options
from rlhfjax.stages.data import open_batches
from rlhfjax.stages.guarded import go_back, restored_counts
from rlhfjax.stages.job import Job, sampler_of, sampling_params
from rlhfjax.stages.losses import training_loss
from rlhfjax.stages.offline import Facts
from rlhfjax.stages.parts import responses_a_row, rows_at_a_time
from rlhfjax.training.checkpoint import Checkpoints, meta_of
from rlhfjax.training.flops import OnlineFlops, attended, forward_flops, seen_by
from rlhfjax.training.guards import Guard, Memory, memory_of, with_rollbacks
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.online import OnlineSteps, train_online
from rlhfjax.training.optimizer import learning_rate, make_optimizer
from rlhfjax.training.profiling import Trace
from rlhfjax.training.state import abstract, init_state
from rlhfjax.training.stopping import held
from rlhfjax.training.update import online_update
from rlhfjax.types import OnlineState, Params, PromptBatch, Rollout, TokenBatch, TrainState


def ppo(job: Job) -> Facts:
    """Sample, score against the reward model and the frozen SFT policy, estimate advantages, update; c.steps times.

    With `optimizer.ema_decay` the moving average of the policy is handed on. What samples is the policy itself, and the
    metrics are of that one: importance ratios and the KL penalty are those of the distribution that was sampled.
    """
    c: schema.Ppo = job.config
    policy_model, policy = job.policy_from("sft", "pretrain")
    reward_model, reward = job.load("reward")
    from_reward, head = c.value.start_from == "reward", zero_head(policy_model.config.width)
    value_model = reward_model if from_reward else policy_model
    value = reward if from_reward else with_head(policy, head)
    if c.value.trunk == "policy":
        value_model, value = policy_model, {"head": head}
    sampling = sampling_params(c.sampling, job.tokenizer)
    algorithm = ppo_algorithm(c, policy_model, value_model, gather=job.mesh.size == 1)
    optimizer = ppo_optimizer(c, policy_model.config.width)

    base, trained = split({"policy": policy, "value": value})
    follow = (lambda params: params["policy"]) if c.optimizer.ema_decay is not None else None

    def fresh() -> OnlineState:
        train = init_state(job.mesh, trained, optimizer, follow)
        state = OnlineState(train, jnp.float32(c.kl.coef), jnp.int32(0))
        return jax.device_put(state, state_shardings(job.mesh, state))

    checkpoints = job.checkpoints()
    state, start, memory = _restore(checkpoints, fresh())
    guard = Guard(job.run.reliability.guards, job.dir, job.stage, memory)

    opened, place = open_batches(job), start + memory.left_out
    first = next(job.put(iter([opened["train"][place]])))
    mixed = next(job.put(iter([opened["ptx"][place]]))) if c.ptx else None
    frozen, ahead = {"reference": policy, "reward": reward}, Ahead(job)
    steps = compiled_steps(job, state, algorithm, optimizer, policy_model, reward_model, sampling, base)
    steps = ahead.online(steps, state, frozen, first, mixed)
    meta = meta_of("policy", policy_model, job.tokenizer, averaged=bool(follow), stage=job.stage, **job.lineage())
    writer = MetricsWriter(job.dir, start, job.run.logging.tensorboard)

    def save(state: OnlineState, iteration: int) -> None:
        average = {} if state.train.average is None else {"average": state.train.average}
        training = (state.train.optimizer, state.train.step, state.kl_coef, state.iteration)
        told = meta | {"guards": guard.memory.saved()}
        checkpoints.save(iteration, _stored(state.train.params) | average, training, told, metrics=writer.latest)

    watch = job.watch()

    def train(state: OnlineState) -> OnlineState:
        place = int(state.iteration) + guard.memory.left_out
        return train_online(
            steps,
            state,
            frozen,
            checkpoints.watched(job.put(opened["train"].iterate(place))),
            job.put(opened["ptx"].iterate(place)) if c.ptx else itertools.repeat(None),
            iterations=c.steps,
            key=job.key("steps"),
            stage=job.stage,
            writer=writer,
            learning_rate=learning_rate(c.optimizer, c.steps * updates_of(c), width=policy_model.config.width),
            updates=updates_of(c),
            episodes=c.batch.size,
            samples=partial(sample_rows, job),
            samples_every=job.run.logging.samples_every,
            save=save,
            save_every=job.run.checkpoints.every,
            flops=iteration_flops(c, (policy_model, policy), (value_model, value), (reward_model, reward), mixed),
            trace=Trace(job.dir, job.run.profile, job.stage),
            first_step=None if ahead.facts else ahead.first_step,  # after a rollback all is compiled
            watch=watch,
            guard=guard,
        )

    # A stage that is asked to stop finishes the save that is under way.
    with held(), closing(checkpoints), closing(writer), closing(watch):
        back = partial(go_back, job, guard, checkpoints, writer, lambda: _restore(checkpoints, fresh()))
        state = with_rollbacks(train, state, back)
        if checkpoints.latest() != c.steps:
            save(state, c.steps)
    facts = {"step": c.steps, "episodes": c.steps * c.batch.size, "kl_coef": float(state.kl_coef)}
    return facts | ahead.facts | watch.facts() | writer.gaps() | guard.memory.told()


def updates_of(c: schema.Ppo) -> int:
    """Optimizer steps in one iteration."""
    return c.batch.epochs * (c.batch.size // (c.batch.minibatch or c.batch.size))


def iteration_flops(c: schema.Ppo, policy: Any, value: Any, reward: Any, mixed: Any) -> OnlineFlops | None:
    """Model FLOPs of an iteration; each model is (model, parameters), `mixed` the pretraining batch of an iteration.

    None for an encoder–decoder, which reads prompt and response with different weights.
    """
    if any(isinstance(model, EncoderDecoder) for model, _ in (policy, value, reward)):
        return None
    of_policy, of_value, of_reward = (forward_flops(model.config, params) for model, params in (policy, value, reward))
    counts = (0.0, 0.0)
    if mixed is not None:
        real = mixed.segments > 0
        counts = float(real.sum()) / c.batch.epochs, float(attended(mixed.positions, real)) / c.batch.epochs
    adapted, passes = has_adapters(policy[1]), 1 + (c.sampling.old_log_probs == "recompute")
    return OnlineFlops(of_policy, of_value, of_reward, adapted, passes, *counts)


def ppo_algorithm(
    c: schema.Ppo, policy_model: SequenceModel, value_model: SequenceModel, gather: bool = True
) -> Ppo | Mix:
    """PPO over the two models, with the pretraining loss in the same gradient where the recipe has it.

    `gather` is for one device (see `rlhfjax.functional.vocabulary`).
    """

    def log_probs(params: Params, rows: Any) -> tuple[jax.Array, jax.Array]:
        settings = {"entropy_gradient": c.entropy_coef > 0, "gather": gather}
        return token_log_probs(policy_model, params["policy"], rows.batch, c.sampling.temperature, **settings)

    def both(params: Params, rows: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        settings = {"entropy_gradient": c.entropy_coef > 0, "gather": gather}
        parts = params["policy"], params["value"]["head"], rows.batch
        return log_probs_and_values(policy_model, *parts, c.sampling.temperature, **settings)

    algorithm = Ppo(
        log_probs=log_probs,
        values=lambda params, rows: token_values(value_model, params["value"], rows.batch),
        both=both if c.value.trunk == "policy" else None,
        clip=c.clip,
        value_clip=c.value.clip,
        value_coef=c.value.coef,
        entropy_coef=c.entropy_coef,
        **c.returns.model_dump(),
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    if c.ptx is None:
        return algorithm
    return Mix(
        algorithm, c.ptx.coef, training_loss(policy_model, decoder=lambda params: params["policy"], gather=gather)
    )


def ppo_optimizer(c: schema.Ppo, width: int | None = None) -> optax.GradientTransformation:
    """AdamW for the policy and AdamW for the value model, each with its own learning rate and its own clipping."""
    total = c.steps * updates_of(c)
    each: dict[Hashable, optax.GradientTransformation] = {
        "policy": make_optimizer(c.optimizer, total, width=width),
        "value": make_optimizer(c.optimizer, total, peak=c.value.lr, width=width),
    }
    return optax.partition(each, {"policy": "policy", "value": "value"})


@dataclass(frozen=True)
class _Rows:
    """Packed rows in the place of experience: what an algorithm's functions of a model read of it."""

    batch: TokenBatch


def compiled_steps(
    job: Job,
    state: OnlineState,
    algorithm: Ppo | Mix,
    optimizer: optax.GradientTransformation,
    policy_model: SequenceModel,
    reward_model: SequenceModel,
    sampling: SamplingParams,
    base: Params | None = None,
) -> OnlineSteps:
    """The four steps of an iteration, jitted with the layouts of the rules table; the state is donated to `update`.

    `base` holds the parameters of policy and value model that are not in the state because nothing trains them.
    """
    c: schema.Ppo = job.config
    estimator = algorithm.first if isinstance(algorithm, Mix) else algorithm
    rows, layout = batch_sharding(job.mesh), state_shardings(job.mesh, state)
    minibatch = c.batch.minibatch or c.batch.size
    sampler = split_caches(job.mesh, sampler_of(policy_model, c.sampling))
    group = responses_a_row(c, getattr(estimator, "group", 1), policy_model, reward_model)
    part, place = rows_at_a_time(c, job.mesh, group), partial(constrain_parts, job.mesh)

    def rollout(base: Params, trained: Params, prompts: PromptBatch, key: jax.Array) -> Rollout:
        return generate(sampler, join(base, trained)["policy"], prompts, key, sampling)

    def score(base: Params, trained: Params, frozen: Any, rollout: Rollout) -> Rollout:
        params = join(base, trained)

        def of_rows(batch: TokenBatch) -> tuple[jax.Array, ...]:
            rows = _Rows(batch)
            reference = estimator.log_probs({"policy": frozen["reference"]}, rows)[0]
            own, _, values = estimator.predict(params, rows)
            return own, reference, values, token_scores(reward_model, frozen["reward"], batch)

        own, reference, values, scores = on_packed(part, rollout, of_rows, place, group)
        log_probs = own if c.sampling.old_log_probs == "recompute" else rollout.sampled_log_probs
        return rollout.scored(log_probs, reference, values, at_last(scores, rollout.response_mask))

    def estimate(rollout: Rollout, kl_coef: Any):
        experience, metrics = estimator.estimate(rollout, kl_coef)
        return experience, metrics | seen_by(rollout)

    def update(base: Params, state: OnlineState, experience: Any, pretraining: Any, measured: dict, key: jax.Array):
        train, metrics = online_update(
            restrict(algorithm, partial(join, base)),
            optimizer,
            state.train,
            experience,
            pretraining,
            key,
            epochs=c.batch.epochs,
            minibatches=c.batch.size // minibatch,
            parts=minibatch // (c.batch.micro or minibatch),
            pack=partial(packed_experience, part, place=place, group=group),
            group=getattr(estimator, "group", 1),
            kl_stop=c.kl.stop,
            ema_decay=c.optimizer.ema_decay,
        )
        kl_coef = state.kl_coef
        if c.kl.controller == "adaptive":
            kl = measured["objective/kl"]
            moved = adaptive_kl(kl_coef, kl, target=c.kl.target, horizon=c.kl.horizon, episodes=c.batch.size)
            kl_coef = jnp.where(jnp.isfinite(moved), moved, kl_coef)  # one KL that is NaN would stay in it for good
        return OnlineState(train, kl_coef, state.iteration + 1), metrics

    learn = jax.jit(update, donate_argnums=1, out_shardings=(layout, None), compiler_options=training_options())
    # The base is an argument of the compiled programs like any other: they share its arrays, and none is copied.
    return OnlineSteps(
        rollout=partial(jax.jit(rollout, out_shardings=rows), base or {}),
        score=partial(jax.jit(score, out_shardings=rows, compiler_options=training_options()), base or {}),
        estimate=jax.jit(estimate, out_shardings=(rows, replicated(job.mesh))),
        update=partial(learn, base or {}),
    )


def sample_rows(job: Job, rollout: Rollout) -> list[dict[str, Any]]:
    """Rows for samples.jsonl: what was asked, what the policy that trains said, how it scored.

    The policy that is handed on may be its moving average: the evaluation samples from that one.
    """
    count = job.run.logging.samples
    some = processes.fetch(jax.tree.map(lambda x: x[:count], rollout))
    kl = jax.device_get(kl_estimate(some.log_probs, some.ref_log_probs, "k1")) * some.response_mask
    return [
        {
            "prompt": job.tokenizer.decode(some.prompt[i][some.prompt_mask[i]].tolist()),
            "response": job.tokenizer.decode_continuation(
                some.response[i][some.response_mask[i]].tolist(), int(some.prompt[i][-1])
            ),
            "score": float(some.scores[i]),
            "kl": float(kl[i].sum()),
            "length": int(some.response_mask[i].sum()),
            "finished": bool(some.finished[i]),
        }
        for i in range(len(some.scores))
    ]


def _stored(params: Params) -> Params:
    """Policy and value model as they are saved: a value head on the policy's trunk as a model of its own."""
    if set(params["value"]) != {"head"}:
        return params
    return params | {"value": with_head(params["policy"], params["value"]["head"])}


def _restore(checkpoints: Checkpoints, state: OnlineState) -> tuple[OnlineState, int, Memory]:
    """The state at the last checkpoint, if there is one; its iteration, and what its guards knew."""
    train = state.train
    average = {} if train.average is None else {"average": abstract(train.average)}
    training = abstract((train.optimizer, train.step, state.kl_coef, state.iteration))
    restored = checkpoints.restore_newest(abstract(_stored(train.params)) | average, training)
    if restored is None:
        return state, 0, Memory()
    models, (optimizer, step, kl_coef, iteration), meta = restored
    memory = memory_of(meta)
    skipped = restored_counts(train.skipped, memory)
    params = {"policy": models["policy"], "value": {name: models["value"][name] for name in train.params["value"]}}
    train = TrainState(params, optimizer, step, models.get("average"), skipped)
    return OnlineState(train, kl_coef, iteration), int(iteration), memory
