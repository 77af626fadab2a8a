"""REINFORCE leave-one-out: several responses per prompt, each compared with the mean of the others."""

from rlhfjax.config import schema
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import rloo_objective
from rlhfjax.stages.online import learn_online, policy_learner


def rloo(job: Job) -> Facts:
    """RLOO against the rewards of the section, with the SFT policy frozen as the reference (Ahmadian et al. 2024)."""
    c: schema.Rloo = job.config
    model, policy = job.policy_from()
    objective = rloo_objective(c, model, gather=job.mesh.size == 1)
    return learn_online(job, policy_learner(job, objective, model, policy))
