"""REINFORCE leave-one-out: several responses per prompt, each compared with the mean of the others."""

from functools import partial
from typing import Any

import jax

from rlhfjax.algorithms.rloo import Rloo
from rlhfjax.config import online_stages
from rlhfjax.models import SequenceModel
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import policy_log_probs, with_pretraining
from rlhfjax.stages.online import learn_online
from rlhfjax.stages.online_programs import OnlineLearner, policy_learner
from rlhfjax.stages.starts import Starts


def rloo(job: Job) -> Facts:
    """RLOO against the rewards of the section, with the SFT policy frozen as the reference (Ahmadian et al. 2024)."""
    return learn_online(job, partial(learner, job.config, job.mesh, job))


def learner(c: online_stages.Rloo, mesh: jax.sharding.Mesh, starts: Starts) -> OnlineLearner:
    """The policy alone."""
    return policy_learner(rloo_objective, c, mesh, starts)


def rloo_objective(c: online_stages.Rloo, policy: SequenceModel) -> Any:
    """RLOO over the policy, with the pretraining loss in the same gradient where the recipe has it."""
    algorithm = Rloo(
        log_probs=policy_log_probs(policy, c.sampling.temperature),
        group=c.groups.size,
        clip=c.loss.clip,
        ratio=c.loss.ratio,
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    return with_pretraining(algorithm, c.ptx, policy)
