"""The stages that train on what they sample, which is PPO."""

from typing import Literal

from pydantic import model_validator

from rlhfjax.config.rewards import ModelReward, Rewards
from rlhfjax.config.sections import (
    Count,
    Fraction,
    NonNegative,
    Optimizer,
    Positive,
    RolloutBatch,
    Sampling,
    Section,
    Sources,
)

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 100.0  # at 0.01 logits that differ by 0.1 are e^10 apart


class MissingEos(Section):
    """What a response without EOS scores: `value` itself (replace) or its score minus `value` (subtract)."""

    mode: Literal["replace", "subtract", "keep"] = "replace"
    value: float = -1.0


class Kl(Section):
    """KL penalty against the SFT policy, nats. `stop` ends the update's epochs once approximate KL exceeds it."""

    coef: NonNegative = 0.02
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: Positive = 6.0
    horizon: Positive = 10_000.0
    stop: Positive | None = None


class Ptx(Section):
    """Pretraining mix of PPO-ptx: `coef` x the loss of `ratio` pretraining sequences an episode, in the same gradient.

    The loss is the mean over tokens, so `coef` is not InstructGPT's 27.8 (their normalisation is not published).
    """

    coef: NonNegative
    data: Sources
    ratio: Positive = 1.0
    length: Count


class Online(Section):
    """What they have in common: prompts, how responses are drawn and scored, the KL penalty, the pretraining mix.

    The score of a response is the weighted sum of `rewards`; the default is the reward model of this recipe.
    """

    data: Sources
    steps: Count
    batch: RolloutBatch
    sampling: Sampling
    rewards: Rewards = [ModelReward(model="reward")]
    missing_eos: MissingEos = MissingEos()
    kl: Kl = Kl()
    optimizer: Optimizer
    ptx: Ptx | None = None

    @model_validator(mode="after")
    def _samples(self):
        s = self.sampling
        if not LEAST_TEMPERATURE <= s.temperature <= MOST_TEMPERATURE:
            what = "greedy or next to it" if s.temperature < 1 else "next to uniform"
            raise ValueError(
                f"sampling.temperature {s.temperature:g} is {what}: training needs samples of the policy that differ, "
                f"give {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g} (1 is the policy itself)"
            )
        if (s.top_k, s.top_p, s.min_p) != (0, 1.0, 0.0):
            raise ValueError(
                f"sampling: top_k {s.top_k}, top_p {s.top_p:g} and min_p {s.min_p:g} must be off (0, 1 and 0): log-"
                "probabilities, ratio, KL and entropy are of the policy, and filters would sample from another one"
            )
        if self.ptx:
            rollouts = self.batch.minibatch or self.batch.size
            if (rollouts * self.ptx.ratio) % 1:
                raise ValueError(f"ptx.ratio {self.ptx.ratio} x minibatch {rollouts} must be a whole number")
        return self


class Returns(Section):
    """Rewards to advantages: GAE (Schulman et al. 2016) and masked whitening over the whole batch."""

    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False


class Value(Section):
    """The value model, a copy of the reward model (or of the policy, with a zero head) with its own learning rate.

    With `trunk: policy` there is no such model: a head, 0 at first, reads what the policy's last layer gives, and both
    losses train that trunk. One forward and one backward pass less, but another algorithm.
    """

    start_from: Literal["reward", "policy"] = "reward"
    trunk: Literal["own", "policy"] = "own"
    lr: Positive | None = None
    clip: Positive = 0.2
    coef: NonNegative = 0.1


class PolicyLoss(Section):
    """The clipped surrogate, less `entropy_coef` x the entropy of the policy."""

    clip: Positive = 0.2
    entropy_coef: NonNegative = 0.0


class Ppo(Online):
    """PPO with a per-token KL penalty, a separate value model and the pretraining mix (Ouyang et al. 2022, eq. 2)."""

    loss: PolicyLoss = PolicyLoss()
    returns: Returns = Returns()
    value: Value = Value()
