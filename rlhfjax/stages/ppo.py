"""Reinforcement learning from the reward model: PPO with the KL penalty and the pretraining mix."""

from functools import partial

import jax

from rlhfjax.algorithms import Mix
from rlhfjax.algorithms.likelihood import log_probs_and_values, token_values
from rlhfjax.algorithms.ppo import Ppo
from rlhfjax.config import schema
from rlhfjax.config.rewards import RECIPE
from rlhfjax.models import SequenceModel
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import policy_log_probs, with_pretraining
from rlhfjax.stages.online import learn_online
from rlhfjax.stages.online_programs import OnlineLearner, frozen_of, optimizer_of
from rlhfjax.stages.rewards import load_judges
from rlhfjax.stages.starts import Starts
from rlhfjax.types import Params, TokenBatch


def ppo(job: Job) -> Facts:
    """PPO against the reward model, with the SFT policy frozen as the reference (Ouyang et al. 2022, C.4)."""
    return learn_online(job, partial(learner, job.config, job.mesh, job))


def learner(c: schema.Ppo, mesh: jax.sharding.Mesh, starts: Starts) -> OnlineLearner:
    """Policy and value model, with the policy as it was as the reference."""
    policy_model, policy = starts.policy_from()
    judges, scoring = load_judges(c.rewards, starts)
    if c.value.trunk == "policy":
        value_model, value = policy_model, {"head": zero_head(policy_model.config.width)}
    elif c.value.start_from == "policy":
        value_model, value = policy_model, with_head(policy, zero_head(policy_model.config.width))
    else:
        value_model, value = judges.of_recipe(scoring) or starts.load(RECIPE)
    return OnlineLearner(
        algorithm=ppo_objective(c, policy_model, value_model),
        models={"policy": policy_model, "value": value_model},
        params={"policy": policy, "value": value},
        judges=judges,
        frozen=frozen_of(policy_model, policy, judges, scoring, starts.offloads("frozen")),
        optimizer=optimizer_of(c, policy_model.config.width),
        offload=starts.offloads("moments"),
    )


def ppo_objective(c: schema.Ppo, policy: SequenceModel, value: SequenceModel) -> Ppo | Mix:
    """PPO over the two models, with the pretraining loss in the same gradient where the recipe has it."""
    how = {"entropy_gradient": c.loss.entropy_coef > 0}

    def both(params: Params, rows: TokenBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        parts = params["policy"], params["value"]["head"], rows
        return log_probs_and_values(policy, *parts, c.sampling.temperature, **how)

    algorithm = Ppo(
        log_probs=policy_log_probs(policy, c.sampling.temperature, **how),
        values=lambda params, rows: token_values(value, params["value"], rows.unrouted()),
        both=both if c.value.trunk == "policy" else None,
        clip=c.loss.clip,
        value_clip=c.value.clip,
        value_coef=c.value.coef,
        entropy_coef=c.loss.entropy_coef,
        **c.returns.model_dump(),
        missing_eos=c.missing_eos.mode,
        missing_eos_value=c.missing_eos.value,
    )
    return with_pretraining(algorithm, c.ptx, policy)
