"""REINFORCE leave-one-out: several responses per prompt, each compared with the mean of the others."""

import jax

from rlhfjax.config import schema
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import rloo_objective
from rlhfjax.stages.online import learn_online
from rlhfjax.stages.online_programs import OnlineLearner, policy_learner
from rlhfjax.stages.rewards import load_judges
from rlhfjax.stages.starts import Starts


def rloo(job: Job) -> Facts:
    """RLOO against the rewards of the section, with the SFT policy frozen as the reference (Ahmadian et al. 2024)."""
    return learn_online(job, learner(job.config, job.mesh, job))


def learner(c: schema.Rloo, mesh: jax.sharding.Mesh, starts: Starts) -> OnlineLearner:
    """The policy alone, with itself as it was as the reference."""
    model, policy = starts.policy_from()
    objective = rloo_objective(c, model, gather=mesh.size == 1)
    return policy_learner(c, objective, model, policy, load_judges(c.rewards, starts))
