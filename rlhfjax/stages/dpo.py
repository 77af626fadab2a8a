"""Direct preference optimisation: the SFT policy learns from rankings, without a reward model."""

from functools import partial

import jax

from rlhfjax.config import schema
from rlhfjax.data.by_step import Batches
from rlhfjax.stages.batches import held_out, longest, open_batches
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.measures.validation import accuracy_meter, named
from rlhfjax.stages.objectives import preference_optimisation
from rlhfjax.stages.offline import OfflineLearner, learn_offline
from rlhfjax.stages.packed_rows import ranking_packer
from rlhfjax.stages.starts import Starts, at_rest
from rlhfjax.types import Params


def dpo(job: Job) -> Facts:
    """DPO on K-way rankings; the reference is the policy that it starts from, frozen."""
    return learn_offline(job, partial(learner, job.config, job.mesh, job, longest(open_batches(job))))


def learner(c: schema.Dpo, mesh: jax.sharding.Mesh, starts: Starts, longest: int) -> OfflineLearner:
    """A policy beside the one that it starts from; the longest comparison has `longest` tokens."""
    model, policy = starts.policy_from()
    objective = preference_optimisation(model, c.loss)
    pack = ranking_packer(c.batch, mesh, model, longest)
    measure = accuracy_meter(mesh, objective, pack, "rewards/accuracies")

    def validate(params: Params, opened: dict[str, Batches]) -> dict[str, float]:
        return named("eval/dpo/accuracy", {name: measure(params, data) for name, data in held_out(opened).items()})

    return OfflineLearner(
        role="policy",
        model=model,
        params=policy,
        objective=objective,
        meter=measure,
        validate=validate,
        pack=pack,
        beside={"reference": at_rest(policy, starts.offloads("frozen"))},
        shown=("loss/train", "rewards/accuracies", "rewards/margins", "eval/dpo/accuracy"),
    )
