"""Direct preference optimisation: the SFT policy learns from rankings, without a reward model."""

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import Dpo
from rlhfjax.algorithms.likelihood import token_log_probs
from rlhfjax.config import schema
from rlhfjax.data.pipeline import Batches
from rlhfjax.models import SequenceModel
from rlhfjax.stages.data import held_out, open_batches
from rlhfjax.stages.job import Job
from rlhfjax.stages.meters import accuracy_meter, named
from rlhfjax.stages.offline import Facts, train_stage
from rlhfjax.stages.parts import ranking_packer
from rlhfjax.types import Params, RankedBatch, TokenBatch, TokenRanking


def dpo(job: Job) -> Facts:
    """DPO on K-way rankings; the reference is the policy that it starts from, frozen."""
    c: schema.Dpo = job.config
    model, policy = job.policy_from("sft", "pretrain")
    algorithm = preference_optimisation(model, c.loss, gather=job.mesh.size == 1)
    pack = ranking_packer(job, model, open_batches(job).values())
    measure = accuracy_meter(job, algorithm, pack, "rewards/accuracies")

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        return named("eval/dpo/accuracy", {name: measure(params, data) for name, data in held_out(opened).items()})

    return train_stage(
        job,
        algorithm,
        model,
        policy,
        role="policy",
        meter=measure,
        validate=validate,
        pack=pack,
        beside={"reference": policy},
        shown=("loss/train", "rewards/accuracies", "rewards/margins", "eval/dpo/accuracy"),
    )


def preference_optimisation(model: SequenceModel, loss: schema.PreferenceLoss, gather: bool = True) -> Dpo:
    """DPO of a model; its parameters have those of the reference beside them, under `reference`.

    Dropout is off: the ratio to the reference would be noise. `gather` is for one device.
    """

    def log_probs(params: Params, batch: RankedBatch | TokenRanking) -> jax.Array:
        if isinstance(batch, TokenRanking):
            return batch.of_candidates(token_log_probs(model, params, batch.batch, gather=gather)[0])
        each, _ = token_log_probs(model, params, joined_rows(batch), gather=gather)
        return each.sum(axis=1).reshape(batch.ranks.shape)

    def of_policy(params: Params, batch: RankedBatch | TokenRanking, key: jax.Array | None) -> jax.Array:
        return log_probs({name: tree for name, tree in params.items() if name != "reference"}, batch)

    def of_reference(params: Params, batch: RankedBatch | TokenRanking) -> jax.Array:
        return log_probs(params["reference"], batch)

    return Dpo(of_policy, of_reference, loss.beta, loss.kind, loss.label_smoothing)


def joined_rows(batch: RankedBatch) -> TokenBatch:
    """One row a candidate, prompt and response joined; response tokens are the targets."""
    length, candidates = batch.tokens.shape[-1], batch.ranks.shape[1]
    mask = (batch.token_mask & batch.mask[:, :, None]).reshape(-1, length)
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], mask.shape)
    response = slots >= jnp.repeat(batch.prompt_lengths, candidates)[:, None]
    return TokenBatch(batch.tokens.reshape(-1, length), mask.astype(jnp.int32), slots, mask & response)
