"""Group relative policy optimisation: several responses per prompt, compared with each other."""

from rlhfjax.config import schema
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import grpo_objective
from rlhfjax.stages.online import learn_online, policy_learner


def grpo(job: Job) -> Facts:
    """GRPO against the rewards of the section, with the SFT policy frozen as the reference (Shao et al. 2024)."""
    c: schema.Grpo = job.config
    model, policy = job.policy_from()
    objective = grpo_objective(c, model, gather=job.mesh.size == 1)
    return learn_online(job, policy_learner(job, objective, model, policy))
