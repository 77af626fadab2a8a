"""Pretraining and supervised fine-tuning: what makes the policy that PPO starts from."""

from rlhfjax.data.pipeline import Batches
from rlhfjax.models import SequenceModel
from rlhfjax.models.lora import split
from rlhfjax.stages.batches import held_out
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.measures.validation import loss_meter, named, reward_meter
from rlhfjax.stages.objectives import training_loss
from rlhfjax.stages.offline import OfflineLearner, learn_offline
from rlhfjax.types import Params


def pretrain(job: Job) -> Facts:
    """Next-token prediction on packed documents."""
    model, params = job.policy_from()
    return _train_policy(job, model, params)


def sft(job: Job) -> Facts:
    """Supervised fine-tuning on demonstrations, with an optional share of pretraining text."""
    model, params = job.policy_from()
    return _train_policy(job, model, params)


def _train_policy(job: Job, model: SequenceModel, params: Params) -> Facts:
    measure = loss_meter(job.mesh, model)

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        losses = {name: measure(params, data) for name, data in held_out(opened).items()}
        return named("loss/validation", losses) | (reward_score(params) if reward_score else {})

    smoothing = job.config.loss.label_smoothing if job.stage == "sft" else 0.0
    reward_score = None
    if getattr(job.config, "select_by", "last") == "reward_score":
        reward_score = reward_meter(job, model)
    objective = training_loss(
        model,
        job.config.dropout,
        label_smoothing=smoothing,
        gather=job.mesh.size == 1,
        ahead="mtp_heads" in split(params)[1],  # adapters leave the heads of their base as they are
    )
    learner = OfflineLearner(
        role="policy",
        model=model,
        params=params,
        objective=objective,
        meter=measure,
        validate=validate,
        shown=("loss/train", "loss/validation", "perf/train_tokens_per_s", "perf/mfu"),
    )
    return learn_offline(job, learner)
