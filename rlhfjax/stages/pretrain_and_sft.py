"""Pretraining and supervised fine-tuning: what makes the policy that PPO starts from."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax

from rlhfjax.config import schema
from rlhfjax.data.by_step import Batches
from rlhfjax.models.lora import split
from rlhfjax.stages.batches import held_out
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.measures.draws import last_sampling
from rlhfjax.stages.measures.validation import loss_meter, named, reward_meter
from rlhfjax.stages.objectives import training_loss
from rlhfjax.stages.offline import OfflineLearner, learn_offline
from rlhfjax.stages.starts import Starts
from rlhfjax.types import Params


def pretrain(job: Job) -> Facts:
    """Next-token prediction on packed documents."""
    return learn_offline(job, partial(learner, job.config, job.mesh, job))


def sft(job: Job) -> Facts:
    """Supervised fine-tuning on demonstrations, with an optional share of pretraining text."""
    begin = partial(learner, job.config, job.mesh, job)
    return learn_offline(job, begin if job.config.select_by != "reward_score" else partial(_scored, job, begin))


def _scored(job: Job, begin: Callable[[], OfflineLearner]) -> OfflineLearner:
    """The learner, measured by the scores of its samples, too."""
    made = begin()
    how = job.config, job.reader, job.mesh, made.model
    rest = job.offloads("frozen")
    score, validate = reward_meter(*how, last_sampling(job.run), job.key("samples"), offload=rest), made.validate
    return replace(made, validate=lambda params, opened: validate(params, opened) | score(params))


def learner(
    c: schema.Pretrain | schema.Sft, mesh: jax.sharding.Mesh, starts: Starts, longest: int = 0
) -> OfflineLearner:
    """A policy that learns the next token, of documents or of responses. `longest` is for comparisons."""
    model, params = starts.policy_from()
    measure = loss_meter(mesh, model)

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        return named("loss/validation", {name: measure(params, data) for name, data in held_out(opened).items()})

    objective = training_loss(
        model,
        c.dropout,
        label_smoothing=c.loss.label_smoothing if isinstance(c, schema.Sft) else 0.0,
        ahead="mtp_heads" in split(params)[1],  # adapters leave the heads of their base as they are
    )
    return OfflineLearner(
        role="policy",
        model=model,
        params=params,
        objective=objective,
        meter=measure,
        validate=validate,
        shown=("loss/train", "loss/validation", "perf/train_tokens_per_s", "perf/mfu"),
    )
