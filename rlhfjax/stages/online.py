"""The online hall: a stage whose policy learns from its own responses, whatever the algorithm."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms import Mix, OnlineAlgorithm, online_part, restrict
from rlhfjax.algorithms.likelihood import token_scores
from rlhfjax.algorithms.packing import on_packed, packed_experience
from rlhfjax.functional import adaptive_kl, kl_estimate
from rlhfjax.functional.masking import at_last
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.models.heads import with_head
from rlhfjax.models.lora import has_adapters, join, split
from rlhfjax.sharding import batch_sharding, constrain_parts, processes, replicated, state_shardings
from rlhfjax.sharding.sampling import split_caches
from rlhfjax.stages.compilation import Ahead, training_options
from rlhfjax.stages.data import open_batches
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts, Learning, Stored, meta_for, rate_of
from rlhfjax.stages.models import sampler_of, sampling_params
from rlhfjax.stages.offline import average_of
from rlhfjax.stages.parts import responses_a_row, rows_at_a_time
from rlhfjax.training.averaging import Average
from rlhfjax.training.flops import OnlineFlops, attended, forward_flops, seen_by
from rlhfjax.training.online import OnlineSteps, train_online
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import init_state
from rlhfjax.training.update import Passes, online_update
from rlhfjax.types import OnlineState, Params, PromptBatch, Rollout, TokenBatch, TrainState

SHOWN = (
    *("objective/scores", "objective/kl", "objective/length", "loss/ptx"),
    *("timing/rollout_share", "timing/update_share", "perf/mfu"),
)


@dataclass(frozen=True)
class OnlineLearner:
    """What a stage brings to the hall: an algorithm over models, and the parameters that it begins with.

    `params` holds what is trained, `policy` among it; `models` has the model of each, `frozen` the parameters of the
    reference and the reward model.
    """

    algorithm: OnlineAlgorithm | Mix
    models: Mapping[str, SequenceModel]
    params: Mapping[str, Params]
    reward_model: SequenceModel
    frozen: Mapping[str, Params]
    optimizer: optax.GradientTransformation

    @property
    def policy(self) -> SequenceModel:
        return self.models["policy"]

    @property
    def online(self) -> OnlineAlgorithm:
        return online_part(self.algorithm)


def learn_online(job: Job, learner: OnlineLearner) -> Facts:
    """Sample, score, estimate, update: `steps` times, from the stage's last checkpoint on.

    With `optimizer.ema_decay` the moving average of the policy is handed on. What samples is the policy itself, and the
    metrics are of that one: importance ratios and the KL penalty are those of the distribution that was sampled.
    """
    c, passes = job.config, passes_of(job.config)
    learning, opened = _learning(job, learner), open_batches(job)
    place = learning.place(learning.state)
    first = next(job.put(iter([opened["train"][place]])))
    mixed = next(job.put(iter([opened["ptx"][place]]))) if c.ptx else None
    ahead, sampling = Ahead(job.stage, job.shared.get("began")), sampling_params(c.sampling, job.tokenizer)
    steps = build(c, job.mesh, learner, learning.state, sampling)
    steps = ahead.online(steps, learning.state, learner.frozen, first, mixed)
    rate, flops = rate_of(c.optimizer, c.steps * passes.steps, learner.policy), iteration_flops(c, learner, mixed)

    def keep(state: OnlineState, iteration: int, stop: bool) -> Callable[[], None] | None:
        return (lambda: learning.save(state)) if stop or iteration % job.run.checkpoints.every == 0 else None

    def sampled(iteration: int, rollout: Rollout) -> None:
        if iteration % job.run.logging.samples_every == 0 or iteration == 1:
            learning.writer.write_samples(iteration, sample_rows(job, rollout))

    def train(state: OnlineState) -> OnlineState:
        place = learning.place(state)
        return train_online(
            steps,
            state,
            learner.frozen,
            learning.batches(opened["train"].iterate(place)),
            job.put(opened["ptx"].iterate(place)) if c.ptx else itertools.repeat(None),
            iterations=c.steps,
            key=job.key("steps"),
            beside=learning.beside(ahead, rate, SHOWN, flops),
            sampled=sampled,
            keep=keep,
        )

    def finish(state: OnlineState) -> Facts:
        if learning.checkpoints.latest() != c.steps:
            learning.save(state)
        facts = {"step": c.steps, "episodes": c.steps * c.batch.size, "kl_coef": float(state.kl_coef)}
        return facts | ahead.facts | learning.facts()

    return learning.run(train, finish)


def _learning(job: Job, learner: OnlineLearner) -> Learning[OnlineState]:
    """The stage at its newest checkpoint."""
    c, average = job.config, policy_average(job.config)
    trained = split(learner.params)[1]

    def fresh() -> OnlineState:
        train = init_state(job.mesh, trained, learner.optimizer, average and average.of)
        state = OnlineState(train, jnp.float32(c.kl.coef), jnp.int32(0))
        return jax.device_put(state, state_shardings(job.mesh, state))

    meta = meta_for(job, "policy", learner.policy, averaged=average is not None)
    return Learning(job, job.checkpoints(), STORED, fresh, meta)


def build(
    c: Any, mesh: jax.sharding.Mesh, learner: OnlineLearner, state: OnlineState, sampling: SamplingParams
) -> OnlineSteps:
    """The four steps of an iteration, jitted with the layouts of the rules table; the state is donated to `update`.

    `state` may be of shapes. The parameters that nothing trains are bound as the first argument of the programs, which
    share their arrays: none is copied.
    """
    online, base = learner.online, split(learner.params)[0] or {}
    rows, layout = batch_sharding(mesh), state_shardings(mesh, state)
    sampler = split_caches(mesh, sampler_of(learner.policy, c.sampling))
    group = responses_a_row(c, online.group, learner.policy, learner.reward_model)
    part, place = rows_at_a_time(c, mesh, group), partial(constrain_parts, mesh)
    pack = partial(packed_experience, part, place=place, group=group)

    def rollout(base: Params, trained: Params, prompts: PromptBatch, key: jax.Array) -> Rollout:
        return generate(sampler, join(base, trained)["policy"], prompts, key, sampling)

    def score(base: Params, trained: Params, frozen: Any, rollout: Rollout) -> Rollout:
        params = join(base, trained)

        def of_rows(rows: TokenBatch) -> tuple[jax.Array, ...]:
            reference = online.log_probs({"policy": frozen["reference"]}, rows)[0]
            own, _, values = online.predict(params, rows)
            return own, reference, values, token_scores(learner.reward_model, frozen["reward"], rows)

        own, reference, values, scores = on_packed(part, rollout, of_rows, place, group)
        log_probs = own if c.sampling.old_log_probs == "recompute" else rollout.sampled_log_probs
        return rollout.scored(log_probs, reference, values, at_last(scores, rollout.response_mask))

    def estimate(rollout: Rollout, kl_coef: Any):
        experience, metrics = online.estimate(rollout, kl_coef)
        return experience, metrics | seen_by(rollout)

    def update(base: Params, state: OnlineState, experience: Any, pretraining: Any, measured: dict, key: jax.Array):
        restricted = restrict(learner.algorithm, partial(join, base))
        how = passes_of(c, pack), online.group, policy_average(c)
        train, metrics = online_update(restricted, learner.optimizer, state.train, experience, pretraining, key, *how)
        return OnlineState(train, next_kl_coef(c, state.kl_coef, measured), state.iteration + 1), metrics

    options = training_options()
    learn = jax.jit(update, donate_argnums=1, out_shardings=(layout, None), compiler_options=options)
    return OnlineSteps(
        rollout=partial(jax.jit(rollout, out_shardings=rows), base),
        score=partial(jax.jit(score, out_shardings=rows, compiler_options=options), base),
        estimate=jax.jit(estimate, out_shardings=(rows, replicated(mesh))),
        update=partial(learn, base),
        episodes=c.batch.size,
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


def iteration_flops(c: Any, learner: OnlineLearner, mixed: TokenBatch | None) -> OnlineFlops | None:
    """Model FLOPs of an iteration; `mixed` is the pretraining batch of one.

    None for an encoder–decoder, which reads prompt and response with different weights.
    """
    reward = learner.reward_model, learner.frozen["reward"]
    policy, value = ((learner.models[name], learner.params[name]) for name in ("policy", "value"))
    if any(isinstance(model, EncoderDecoder) for model, _ in (policy, value, reward)):
        return None
    of_policy, of_value, of_reward = (forward_flops(model.config, params) for model, params in (policy, value, reward))
    counts = (0.0, 0.0)
    if mixed is not None:
        real = mixed.segments > 0
        counts = float(real.sum()) / c.batch.epochs, float(attended(mixed.positions, real)) / c.batch.epochs
    adapted, passes = has_adapters(policy[1]), 1 + (c.sampling.old_log_probs == "recompute")
    return OnlineFlops(of_policy, of_value, of_reward, adapted, passes, *counts)


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


def _models(state: OnlineState) -> dict[str, Params]:
    """The models of a state as they are saved: a value head on the policy's trunk as a model of its own."""
    params, average = state.train.params, state.train.average
    value = params.get("value")
    if value is not None and set(value) == {"head"}:
        params = params | {"value": with_head(params["policy"], value["head"])}
    return params | ({} if average is None else {"average": average})


def _whole(fresh: OnlineState, models: dict[str, Params], training: tuple, skipped: Any) -> OnlineState:
    optimizer, step, kl_coef, iteration = training
    params = {name: {part: models[name][part] for part in tree} for name, tree in fresh.train.params.items()}
    return OnlineState(TrainState(params, optimizer, step, models.get("average"), skipped), kl_coef, iteration)


STORED = Stored[OnlineState](
    models=_models,
    training=lambda state: (state.train.optimizer, state.train.step, state.kl_coef, state.iteration),
    whole=_whole,
    skipped=lambda state: state.train.skipped,
    step=lambda state: int(state.iteration),
)
