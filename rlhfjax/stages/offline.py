"""Tokenizer, pretraining, supervised fine-tuning and the reward model."""

import itertools
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import faults
from rlhfjax.algorithms import restrict
from rlhfjax.config import schema
from rlhfjax.data.batches import left_padded, right_padded
from rlhfjax.data.datasets import open_source
from rlhfjax.data.pipeline import Batches
from rlhfjax.errors import ConfigError
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import EncoderDecoder, SequenceModel
from rlhfjax.models.heads import init_head, rescale_head, with_head
from rlhfjax.models.lora import join, split
from rlhfjax.sharding import processes, state_shardings
from rlhfjax.stages.compilation import Ahead, training_options
from rlhfjax.stages.data import held_out, open_batches
from rlhfjax.stages.guarded import go_back, restored_counts
from rlhfjax.stages.job import Job, default_slots
from rlhfjax.stages.losses import reward_modelling, training_loss
from rlhfjax.stages.meters import Meter, accuracy_meter, loss_meter, named, reward_meter
from rlhfjax.stages.parts import ranking_packer
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import Checkpoints, find_checkpoint, meta_of, read_meta, tokenizer_of
from rlhfjax.training.flops import OfflineFlops, forward_flops, seen_by
from rlhfjax.training.guards import Guard, Memory, memory_of, with_rollbacks
from rlhfjax.training.metrics import MetricsWriter
from rlhfjax.training.offline import train_offline
from rlhfjax.training.optimizer import learning_rate, make_optimizer
from rlhfjax.training.profiling import Trace
from rlhfjax.training.state import abstract, init_state
from rlhfjax.training.stopping import held
from rlhfjax.training.update import Pack, offline_step
from rlhfjax.types import Params, PromptBatch, TrainState

Facts = dict[str, Any]
Validate = Callable[[Params, dict[str, Batches]], dict[str, float]]


def tokenizer(job: Job) -> Facts:
    """Train the tokenizer on documents, or take the one that the configuration or the starting model has."""
    processes.by_first(lambda: _tokenizer_of(job).save(job.dir), "tokenizer")
    made = load_tokenizer(job.dir)
    return {"vocab_size": made.vocab_size, "fingerprint": made.fingerprint}


def _tokenizer_of(job: Job) -> AnyTokenizer:
    c = job.run.tokenizer
    if c.path:
        return load_tokenizer(c.path)
    if job.run.model.checkpoint:
        made = tokenizer_of(read_meta(find_checkpoint(job.run.model.checkpoint)))
        if made is None:
            raise ConfigError(
                f"model.checkpoint: expected a model with a tokenizer, got {job.run.model.checkpoint} with none; "
                "import it again with its tokenizer files beside the weights"
            )
        return made
    texts = itertools.chain.from_iterable(
        (record["text"] for record in open_source(entry.source, entry.split, job.data_dir, kind="document"))
        for entry in c.data
    )
    return Tokenizer.train(itertools.islice(texts, c.documents), c.vocab_size, model_type=c.kind, seed=job.run.seed)


def pretrain(job: Job) -> Facts:
    """Next-token prediction on packed documents."""
    model, params = job.policy_from()
    return _train_policy(job, model, params)


def sft(job: Job) -> Facts:
    """Supervised fine-tuning on demonstrations, with an optional share of pretraining text."""
    model, params = job.policy_from("pretrain")
    return _train_policy(job, model, params)


def reward(job: Job) -> Facts:
    """The reward model: the policy's decoder with a scalar head, on K-way rankings; then its scores are centred."""
    c: schema.Reward = job.config
    model, policy = job.policy_from("sft", "pretrain") if c.start_from == "sft" else job.policy_from("pretrain")
    params = with_head(policy, init_head(job.key("init"), model.config.width))
    pack = ranking_packer(job, model, open_batches(job).values(), ends=True)
    measure = accuracy_meter(job, reward_modelling(model, c.loss), pack)

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        return named("eval/rm/accuracy", {name: measure(params, data) for name, data in held_out(opened).items()})

    return train_stage(
        job,
        reward_modelling(model, c.loss, c.dropout),
        model,
        params,
        role="reward",
        meter=measure,
        validate=validate,
        pack=pack,
        finish=partial(normalize_scores, job, model),
        shown=("train/rm/loss", "train/rm/accuracy", "eval/rm/accuracy", "perf/mfu"),
    )


def normalize_scores(job: Job, model: SequenceModel, params: Params) -> tuple[Params, Facts]:
    """Shift (and scale) the head so that the scores of reference responses have mean 0 (and deviation 1).

    The responses are people's demonstrations (Ouyang et al. 2022, C.2) or samples of the policy (Ziegler et al. 2019).
    """
    c: schema.Reward = job.config
    n = c.normalize
    if n.on == "none":
        return params, {}
    pairs = job.reader.demonstration_ids(n.data, c.batch.length, n.count)
    if n.on == "samples":
        pairs = _sampled(job, [prompt for prompt, _ in pairs], c.batch.length)
    tokens, mask = right_padded([prompt + response for prompt, response in pairs], job.tokenizer.pad_id)
    lengths = np.asarray([len(prompt) for prompt, _ in pairs], np.int32)

    def one(params: Params, row: tuple) -> jax.Array:
        return model.scores(params, *(part[None] for part in row))[0]

    score = jax.jit(lambda p, *rows: jax.lax.map(partial(one, p), rows, batch_size=64))
    before = score(params, tokens, mask, lengths)
    gain = 1.0 / jnp.maximum(before.std(), 1e-6) if n.scale else jnp.float32(1.0)
    params = params | {"head": rescale_head(params["head"], gain, -gain * before.mean())}
    after = score(params, tokens, mask, lengths)
    return params, {
        "eval/rm/normalized_mean": float(after.mean()),
        "eval/rm/normalized_std": float(after.std()),
        "normalized_gain": float(gain),
        "normalized_on": f"{len(pairs)} {n.on}",
    }


def _sampled(job: Job, prompts: list[list[int]], length: int) -> list[tuple[list[int], list[int]]]:
    model, policy = job.policy_from("sft", "pretrain")
    tokens, mask = left_padded(prompts, job.tokenizer.pad_id)
    t = job.tokenizer
    settings = SamplingParams(length - tokens.shape[1], t.eos_id, t.pad_id, slots=default_slots())
    batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens), dtype=jnp.int32))
    rollout = processes.fetch(jax.jit(partial(generate, model, sampling=settings))(policy, batch, job.key("samples")))
    return [
        (prompt, response[kept].tolist())
        for prompt, response, kept in zip(prompts, rollout.response, rollout.response_mask, strict=True)
    ]


def _train_policy(job: Job, model: SequenceModel, params: Params) -> Facts:
    measure = loss_meter(job, model)

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        losses = {name: measure(params, data) for name, data in held_out(opened).items()}
        return named("loss/validation", losses) | (reward_score(params) if reward_score else {})

    smoothing = job.config.loss.label_smoothing if job.stage == "sft" else 0.0
    reward_score = None
    if getattr(job.config, "select_by", "last") == "reward_score":
        reward_score = reward_meter(job, model)
    return train_stage(
        job,
        training_loss(
            model,
            job.config.dropout,
            label_smoothing=smoothing,
            gather=job.mesh.size == 1,
            ahead="mtp_heads" in split(params)[1],  # adapters leave the heads of their base as they are
        ),
        model,
        params,
        role="policy",
        meter=measure,
        validate=validate,
        shown=("loss/train", "loss/validation", "perf/train_tokens_per_s", "perf/mfu"),
    )


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
        measured = validate(join(fixed, state.params), opened) if step % c.validate_every == 0 or step == steps else {}
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
        # What is served is finished: the moving average where one is kept.
        served, facts = finish(join(frozen, state.params if state.average is None else state.average))
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
