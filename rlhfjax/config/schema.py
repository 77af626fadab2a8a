"""The run configuration: frozen, strict, and as the file says it. No derived value is ever written back.

One section a stage; what stages share is in `rlhfjax.config.sections`, which also says what counts and lengths mean.
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

    `demonstrations` reads the responses of `data`; `samples` reads responses of the SFT policy to its prompts.
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
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature 0 is greedy: PPO needs samples, give a temperature above 0")
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


class Checkpoints(Section):
    """Saved every `every` steps and at the end of a stage.

    What stays: the newest `keep`, every step that `keep_every` divides, and the one where the metric `keep_best` was
    highest (`-NAME`: lowest). A damaged one is refused: `fall_back` goes on from the newest that is whole, `stop` ends
    the run with exit code 4.
    """

    every: Count = 100
    keep: Count = 2
    keep_every: Count | None = None
    keep_best: str | None = None
    on_damage: Literal["fall_back", "stop"] = "fall_back"


class Guards(Section):
    """What a run may not do for long. None: not watched.

    An update with a loss, gradient, score or KL that is no finite number is skipped; `non_finite` steps (PPO
    iterations) in a row without any other are a divergence. So are KL above `kl_ceiling` (nats a response), entropy
    below `entropy_floor` (nats a token), a share of responses without an end above `length_at_cap`, and a total loss
    more than `loss_spike` standard deviations above the mean of its last `spike_window` values. A rollback goes to the
    last checkpoint that was good and leaves out the batches in between, at most `rollbacks` times.
    """

    non_finite: Count = 3
    kl_ceiling: Positive | None = None
    entropy_floor: NonNegative | None = None
    length_at_cap: Fraction | None = None
    loss_spike: Positive | None = None
    spike_window: Annotated[int, Field(ge=8)] = 128
    on_divergence: Literal["stop", "rollback", "continue"] = "stop"
    rollbacks: Count = 3


class Deadlines(Section):
    """Seconds after which work that shows no end is taken for a hang: stacks are written and the process exits with 42.

    After `join` seconds processes no longer wait for one that is missing at the start.
    A program that is not compiled yet gets `compile`; a training step, rollout or batch of an evaluation `step`.
    """

    compile: Positive = 7200.0
    step: Positive = 1800.0
    save: Positive = 1800.0
    join: Positive = 300.0


class Reliability(Section):
    """When to stop. `heartbeat` is the seconds of silence after which processes take one of them for dead.

    `determinism: strict` asks GPUs for programs that give the same bits again, and refuses flags that say otherwise.
    """

    determinism: Literal["fast", "strict"] = "fast"
    heartbeat: Annotated[int, Field(ge=3)] = 30
    guards: Guards = Guards()
    deadlines: Deadlines = Deadlines()


class Logging(Section):
    """Sample tables every `samples_every` PPO steps with `samples` rows; TensorBoard files beside metrics.jsonl."""

    samples_every: Count = 10
    samples: Count = 8
    tensorboard: bool = True


class Profile(Section):
    """A trace of each training stage: `steps` steps or PPO iterations, from the `start`-th of this process on."""

    start: Count = 3
    steps: Count = 2


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
