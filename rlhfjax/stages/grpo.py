"""Group relative policy optimisation: several responses per prompt, compared with each other."""

from functools import partial
from typing import Any

import jax

from rlhfjax.algorithms.grpo import Grpo
from rlhfjax.config import online_stages
from rlhfjax.models import SequenceModel
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import policy_log_probs, with_pretraining
from rlhfjax.stages.online import learn_online
from rlhfjax.stages.online_programs import OnlineLearner, policy_learner
from rlhfjax.stages.starts import Starts


def grpo(job: Job) -> Facts:
    """GRPO against the rewards of the section, with the SFT policy frozen as the reference (Shao et al. 2024)."""
    return learn_online(job, partial(learner, job.config, job.mesh, job))


def learner(c: online_stages.Grpo, mesh: jax.sharding.Mesh, starts: Starts) -> OnlineLearner:
    """The policy alone."""
    return policy_learner(grpo_objective, c, mesh, starts)


def grpo_objective(c: online_stages.Grpo, policy: SequenceModel) -> Any:
    """GRPO over the policy, with the pretraining loss in the same gradient where the recipe has it."""
    algorithm = Grpo(
        log_probs=policy_log_probs(policy, c.sampling.temperature),
        group=c.groups.size,
        clip=c.loss.clip,
        clip_high=c.loss.clip_high,
        beta=c.kl.in_loss,
        deviation=c.groups.deviation,
        average=c.loss.average,
        longest=c.sampling.max_new_tokens,
        overlong=c.groups.overlong,
        dynamic_sampling=c.groups.draws > 1,
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    return with_pretraining(algorithm, c.ptx, policy)
