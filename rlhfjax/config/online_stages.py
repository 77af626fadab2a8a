"""The stages that train on what they sample: PPO, GRPO and RLOO."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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

    @property
    def in_reward(self) -> float:
        """The coefficient that a stage begins with, of the penalty that joins the score."""
        return self.coef


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

    @property
    def responses(self) -> int:
        """Responses to each prompt."""
        return 1

    @property
    def prompts(self) -> int:
        """Prompts of one iteration; `batch.size` counts the responses to them."""
        return self.batch.size // self.responses

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
        if (routing := self.batch.routing) != "own" and s.speculate != "none":
            raise ValueError(
                f"batch.routing {routing}: not beside sampling.speculate {s.speculate}; remove one of them"
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


class Group(Section):
    """`size` responses per prompt, next to each other; `batch.size` and `minibatch` count responses."""

    size: Annotated[int, Field(ge=2)]


class Grouped(Online):
    """What stages have in common that compare the responses to a prompt with each other."""

    groups: Group

    @property
    def responses(self) -> int:
        return self.groups.size

    @model_validator(mode="after")
    def _groups_fit(self):
        size = self.groups.size
        for name, count in (("batch.size", self.batch.size), ("batch.minibatch", self.batch.minibatch)):
            if count is not None and count % size:
                raise ValueError(f"{name} {count} counts responses and must be a multiple of groups.size {size}")
        return self


class Groups(Group):
    """`size` responses per prompt, next to each other, compared with each other.

    Advantages are divided by the standard `deviation` of their group's scores. `overlong` punishes the last tokens of
    the longest responses (Yu et al. 2025, eq. 13). Up to `draws` rollouts are drawn for an iteration until not all
    scores of any group are alike, and groups that are count for nothing (dynamic sampling, eq. 11); 1 draws once.
    """

    size: Annotated[int, Field(ge=2)] = 8
    deviation: Literal["sample", "population", "none"] = "sample"
    overlong: Count | None = None
    draws: Count = 1


class GroupLoss(Section):
    """The clipped surrogate: the ratio within 1 - clip and 1 + clip_high (clip, where that is not given).

    Its `average` is over responses of their means over tokens (sequence, Shao et al. 2024), over all tokens (token, Yu
    et al. 2025), or over responses of their sums over tokens by the most tokens of a response (constant, Liu et al.
    2025).
    """

    clip: Positive = 0.2
    clip_high: Positive | None = None
    average: Literal["sequence", "token", "constant"] = "sequence"


class GroupKl(Kl):
    """KL to the SFT policy in the loss (k3, Shao et al. 2024, eq. 4), or taken from the score of a response (k1)."""

    coef: NonNegative = 0.04
    place: Literal["loss", "reward"] = "loss"

    @property
    def in_reward(self) -> float:
        return self.coef if self.place == "reward" else 0.0

    @property
    def in_loss(self) -> float:
        """The coefficient of the penalty that joins the loss."""
        return self.coef - self.in_reward

    @model_validator(mode="after")
    def _fixed_in_the_loss(self):
        if self.place == "loss" and self.controller == "adaptive":
            raise ValueError("kl: controller adaptive moves the penalty in the reward; give place: reward, or fixed")
        return self


class Grpo(Grouped):
    """Group relative policy optimisation (Shao et al. 2024), with the choices of Dr. GRPO and DAPO."""

    groups: Groups = Groups()
    kl: GroupKl = GroupKl()
    loss: GroupLoss = GroupLoss()


class LeaveOneOut(Group):
    """`size` responses per prompt, next to each other; the baseline of each is the mean score of the others."""

    size: Annotated[int, Field(ge=2)] = 4


class RlooLoss(Section):
    """REINFORCE by the importance ratio of a whole response (sequence) or of each token, within 1 ± `clip` if any."""

    clip: Positive | None = 0.2
    ratio: Literal["sequence", "token"] = "sequence"


class Rloo(Grouped):
    """REINFORCE leave-one-out (Ahmadian et al. 2024), with the KL penalty in the reward."""

    groups: LeaveOneOut = LeaveOneOut()
    loss: RlooLoss = RlooLoss()


class OnlineStages(Section):
    """They in the order of the recipe."""

    ppo: Ppo | None = None
    grpo: Grpo | None = None
    rloo: Rloo | None = None
