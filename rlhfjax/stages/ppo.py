"""Reinforcement learning from the reward model: PPO with the KL penalty and the pretraining mix."""

from rlhfjax.config import schema
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.stages.objectives import ppo_objective
from rlhfjax.stages.online import OnlineLearner, learn_online, optimizer_of


def ppo(job: Job) -> Facts:
    """PPO against the reward model, with the SFT policy frozen as the reference (Ouyang et al. 2022, C.4)."""
    c: schema.Ppo = job.config
    policy_model, policy = job.policy_from()
    reward_model, reward = job.load("reward")
    from_reward, head = c.value.start_from == "reward", zero_head(policy_model.config.width)
    value_model = reward_model if from_reward else policy_model
    value = reward if from_reward else with_head(policy, head)
    if c.value.trunk == "policy":
        value_model, value = policy_model, {"head": head}
    learner = OnlineLearner(
        algorithm=ppo_objective(c, policy_model, value_model, gather=job.mesh.size == 1),
        models={"policy": policy_model, "value": value_model},
        params={"policy": policy, "value": value},
        reward_model=reward_model,
        frozen={"reference": policy, "reward": reward},
        optimizer=optimizer_of(c, policy_model.config.width),
    )
    return learn_online(job, learner)
