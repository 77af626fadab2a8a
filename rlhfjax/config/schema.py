"""The run configuration: frozen, strict, and as the file says it. No derived value is ever written back.

One section a stage; what stages share is in `rlhfjax.config.sections`, which also says what counts and lengths mean,
and what concerns a run as a whole in `rlhfjax.config.upkeep`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhfjax.config.sections import (
    Batch,
    BelowOne,
    Count,
    Data,
    Fraction,
    Mesh,
    Model,
    NonNegative,
    Optimizer,
    Positive,
    RankedBatch,
    RolloutBatch,
    Sampling,
    Section,
    Sources,
    Tokenizer,
)
from rlhfjax.config.upkeep import Checkpoints, Logging, Profile, Reliability

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 100.0  # of PPO; at 0.01 logits that differ by 0.1 are e^10 apart


class PretrainingMix(Section):
    """Pretraining text mixed into a supervised stage; `fraction` is its share of the sequences of a batch."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    data: Sources


class Pretrain(Section):
    """Next-token prediction on packed documents."""

    data: Sources
    validation: list[Data] = []
    steps: Count | None = None
    epochs: Positive | None = None
    batch: Batch
    optimizer: Optimizer
    dropout: BelowOne = 0.0
    validate_every: Count = 100

    @model_validator(mode="after")
    def _length(self):
        return check_steps(self)


class TokenLoss(Section):
    """Loss on completions (`train_on: all` = every assistant turn), their labels smoothed by `label_smoothing`.

    0.1 trained the Transformer (Vaswani et al. 2017, section 5.4). What is measured on validation data is not smoothed.
    """

    train_on: Literal["last", "all"] = "last"
    label_smoothing: BelowOne = 0.0


class Sft(Section):
    """Supervised fine-tuning on demonstrations."""

    data: Sources
    validation: list[Data] = []
    steps: Count | None = None
    epochs: Positive | None = None
    batch: Batch
    optimizer: Optimizer
    dropout: BelowOne = 0.0
    loss: TokenLoss = TokenLoss()
    pretraining: PretrainingMix | None = None
    validate_every: Count = 100
    select_by: Literal["last", "validation_loss", "reward_score"] = "last"
    reward_model: str | None = None

    @model_validator(mode="after")
    def _length(self):
        if (self.select_by == "reward_score") != bool(self.reward_model):
            raise ValueError("select_by: reward_score and reward_model (a checkpoint) go together")
        if self.select_by != "last" and not self.validation:
            raise ValueError(f"select_by: {self.select_by} needs validation data")
        return check_steps(self)


class RankingLoss(Section):
    """Loss over all pairs of a prompt, each weighing 1/C(K,2) (Ouyang et al. 2022, eq. 1 for `logistic`)."""

    kind: Literal["logistic", "hinge", "exp", "squared", "plackett_luce"] = "logistic"
    margin: NonNegative = 0.0


class Normalize(Section):
    """After training: the mean score of `on` becomes 0 and, with `scale`, its standard deviation 1.

    `demonstrations` reads the responses of `data`; `samples` reads responses of the SFT policy to its prompts, drawn
    as PPO will (`stages.ppo.sampling`), or without PPO at temperature 1, up to `batch.length` with their prompt.
    """

    on: Literal["demonstrations", "samples", "none"] = "demonstrations"
    scale: bool = False
    data: list[Data] = []
    count: Count = 256

    @model_validator(mode="after")
    def _has_data(self):
        if (self.on == "none") == bool(self.data):
            raise ValueError("normalize.data (demonstrations) goes together with normalize.on other than none")
        return self


class Reward(Section):
    """The reward model: K-way human rankings, scored at the last token of each response."""

    data: Sources
    validation: list[Data] = []
    steps: Count | None = None
    epochs: Positive | None = None
    batch: RankedBatch
    optimizer: Optimizer
    dropout: BelowOne = 0.0
    start_from: Literal["sft", "pretrain"] = "sft"
    loss: RankingLoss = RankingLoss()
    normalize: Normalize
    validate_every: Count = 100

    @model_validator(mode="after")
    def _length(self):
        return check_steps(self)


class PreferenceLoss(Section):
    """Loss of a pair: -log σ(beta h) (Rafailov et al. 2023, eq. 7), hinge or ipo.

    `label_smoothing` is the share of the labels taken to be wrong.
    """

    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class Dpo(Section):
    """Direct preference optimisation of the SFT policy on K-way rankings, each prompt's pairs weighing 1/C(K,2)."""

    data: Sources
    validation: list[Data] = []
    steps: Count | None = None
    epochs: Positive | None = None
    batch: RankedBatch
    optimizer: Optimizer
    loss: PreferenceLoss = PreferenceLoss()
    validate_every: Count = 100

    @model_validator(mode="after")
    def _length(self):
        return check_steps(self)


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


class Ptx(Section):
    """Pretraining mix of PPO-ptx: `coef` x the loss of `ratio` pretraining sequences an episode, in the same gradient.

    The loss is the mean over tokens, so `coef` is not InstructGPT's 27.8 (their normalisation is not published).
    """

    coef: NonNegative
    data: Sources
    ratio: Positive = 1.0
    length: Count


class Ppo(Section):
    """PPO with a per-token KL penalty, a separate value model and the pretraining mix (Ouyang et al. 2022, eq. 2)."""

    data: Sources
    steps: Count
    clip: Positive = 0.2
    entropy_coef: NonNegative = 0.0
    batch: RolloutBatch
    sampling: Sampling
    missing_eos: MissingEos = MissingEos()
    kl: Kl = Kl()
    returns: Returns = Returns()
    value: Value = Value()
    optimizer: Optimizer
    ptx: Ptx | None = None

    @model_validator(mode="after")
    def _samples(self):
        s = self.sampling
        if not LEAST_TEMPERATURE <= s.temperature <= MOST_TEMPERATURE:
            what = "greedy or next to it" if s.temperature < 1 else "next to uniform"
            raise ValueError(
                f"sampling.temperature {s.temperature:g} is {what}: PPO needs samples of the policy that differ, give "
                f"{LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g} (1 is the policy itself)"
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


class Ratings(Section):
    """Human ratings of texts: `judge` fits the judge, `baseline` the TF-IDF baseline, `test` measures both."""

    judge: Data
    baseline: Data
    test: Data
    prefix: str = ""


class ExactMatch(Section):
    """Share of the demonstrations in `data` that the policy repeats to the letter, found by a search with `beams`.

    Scores are divided by ((5 + length) / 6)^length_penalty (Wu et al. 2016, eq. 14).
    """

    data: Sources
    beams: Count = 4
    length_penalty: NonNegative = 0.6


class Evaluate(Section):
    """The report: held-out losses by stage, reward-model accuracy, win rates PPO against SFT, samples, exact match."""

    data: Sources
    samples: Count = 512
    batch: RolloutBatch
    sampling: Sampling
    losses: list[Data] = []
    comparisons: list[Data] = []
    ratings: Ratings | None = None
    exact_match: ExactMatch | None = None


class Stages(Section):
    """The recipe in its order; a stage that is left out is not run."""

    pretrain: Pretrain | None = None
    sft: Sft | None = None
    reward: Reward | None = None
    dpo: Dpo | None = None
    ppo: Ppo | None = None
    evaluate: Evaluate | None = None


class Run(Section):
    """One whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    mesh: Mesh = Mesh()
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    stages: Stages
    checkpoints: Checkpoints = Checkpoints()
    reliability: Reliability = Reliability()
    logging: Logging = Logging()
    profile: Profile | None = None
    data_dir: str | None = None


def check_steps(stage):
    """An offline stage runs for `steps` or for `epochs`."""
    if (stage.steps is None) == (stage.epochs is None):
        raise ValueError("give exactly one of steps and epochs")
    return stage
