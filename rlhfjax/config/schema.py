"""The run configuration: frozen, strict, and as the file says it. No derived value is ever written back.

Counts are global: `size`, `minibatch` and `micro` are sequences (prompts for the reward model) over all devices.
Lengths are tokens. Learning rates are per optimizer step. A `None` default means "what the field next to it implies".
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part: unknown keys are errors, values are not coerced, nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class Mesh(Section):
    """Device mesh; the product must equal the number of devices, one axis may be -1 (all that are left)."""

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @model_validator(mode="after")
    def _one_free_axis(self):
        sizes = (self.data, self.fsdp, self.sequence, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh axes are positive, at most one of them -1; got {sizes}")
        return self


class Architecture(Section):
    """What differs from the family's own choice; None keeps that choice."""

    norm: Literal["layer", "rms"] | None = None
    positions: Literal["learned", "rope"] | None = None
    activation: Literal["gelu", "swiglu"] | None = None
    biases: bool | None = None
    tied: bool | None = None
    head_dim: Count | None = None
    norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    init_std: Positive | None = None


class Model(Section):
    """The decoder's shape, or `checkpoint`: a checkpoint directory to start from (its shape and tokenizer are used)."""

    checkpoint: str | None = None
    family: Literal["gpt2", "llama"] = "llama"
    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    kv_heads: Count | None = None
    mlp_width: Count | None = None
    context: Count = 512
    remat: Literal["none", "full", "dots"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    architecture: Architecture = Architecture()

    @model_validator(mode="after")
    def _shape_or_checkpoint(self):
        if self.checkpoint and self.model_fields_set - {"checkpoint", "dtype", "remat"}:
            given = sorted(self.model_fields_set - {"checkpoint", "dtype", "remat"})
            raise ValueError(f"a model from a checkpoint has its shape already; remove {', '.join(given)}")
        if self.architecture.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} (or give head_dim)")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self


class Data(Section):
    """One data set: a prepared name (`movies/chat`) or a .jsonl file, its split, and its share of the tokens."""

    source: str
    split: str = "train"
    weight: Positive = 1.0


Sources = Annotated[list[Data], Field(min_length=1)]


class Tokenizer(Section):
    """A SentencePiece tokenizer to train on `data`, or `path`: a directory that holds one."""

    path: str | None = None
    vocab_size: Count = 2048
    kind: Literal["bpe", "unigram"] = "bpe"
    data: list[Data] = []
    documents: Count = 100_000

    @model_validator(mode="after")
    def _path_or_data(self):
        if self.path and self.data:
            raise ValueError("give either path (an existing tokenizer) or data (to train one), not both")
        return self


class Optimizer(Section):
    """AdamW with a schedule. `final` and `warmup_from` are fractions of `lr`; `clip_norm` null means no clipping."""

    lr: Positive
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_from: Fraction = 0.0
    final: Fraction = 0.1
    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = 1.0
    ema_decay: BelowOne | None = None


class Batch(Section):
    """Sequences of a step. `micro` splits them for memory (gradient accumulation); results do not depend on it."""

    size: Count
    micro: Count | None = None
    length: Count
    pack: bool = True
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _divides(self):
        check_divides("batch.size", self.size, "batch.micro", self.micro or self.size)
        return self


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


class Sft(Section):
    """Supervised fine-tuning on demonstrations: the loss is on completions (`train_on: all` = every assistant turn)."""

    data: Sources
    validation: list[Data] = []
    steps: Count | None = None
    epochs: Positive | None = None
    batch: Batch
    optimizer: Optimizer
    dropout: BelowOne = 0.0
    train_on: Literal["last", "all"] = "last"
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


class RankedBatch(Section):
    """Prompts of a step, each with up to `candidates` ranked responses; `length` holds prompt and response."""

    size: Count
    micro: Count | None = None
    length: Count
    candidates: Annotated[int, Field(ge=2)] = 9
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _divides(self):
        check_divides("batch.size", self.size, "batch.micro", self.micro or self.size)
        return self


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


class RolloutBatch(Section):
    """Rollouts of an iteration and how the update walks over them."""

    size: Count
    minibatch: Count | None = None
    micro: Count | None = None
    epochs: Count = 4
    prompt_length: Count
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _divides(self):
        minibatch = self.minibatch or self.size
        check_divides("batch.size", self.size, "batch.minibatch", minibatch)
        check_divides("batch.minibatch", minibatch, "batch.micro", self.micro or minibatch)
        return self


class Sampling(Section):
    """How responses are drawn. In RL leave top_k and top_p off: log-probabilities are of the unfiltered policy.

    `stop` ends a response at that single token (default: EOS) from position `stop_after` on.
    `old_log_probs: rollout` keeps the sampler's own; `recompute` takes them from one forward pass (exact ratio 1).
    """

    max_new_tokens: Count
    temperature: NonNegative = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: str | None = None
    stop_after: Annotated[int, Field(ge=0)] = 0
    old_log_probs: Literal["recompute", "rollout"] = "recompute"


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
    """The value model, a copy of the reward model (or of the policy, with a zero head) with its own learning rate."""

    start_from: Literal["reward", "policy"] = "reward"
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


class Evaluate(Section):
    """The report: held-out losses by stage, reward-model accuracy, win rates PPO against SFT, samples."""

    data: Sources
    samples: Count = 512
    batch: RolloutBatch
    sampling: Sampling
    losses: list[Data] = []
    comparisons: list[Data] = []
    ratings: Ratings | None = None


class Stages(Section):
    """The recipe in its order; a stage that is left out is not run."""

    pretrain: Pretrain | None = None
    sft: Sft | None = None
    reward: Reward | None = None
    ppo: Ppo | None = None
    evaluate: Evaluate | None = None


class Checkpoints(Section):
    """Saved every `every` steps and at the end of a stage; the newest `keep` stay."""

    every: Count = 100
    keep: Count = 2


class Logging(Section):
    """Sample tables every `samples_every` PPO steps with `samples` rows; TensorBoard files beside metrics.jsonl."""

    samples_every: Count = 10
    samples: Count = 8
    tensorboard: bool = True


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
    logging: Logging = Logging()
    data_dir: str | None = None


def check_divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    """Raise ValueError with the arithmetic when `part` does not divide `whole`."""
    if whole % part:
        raise ValueError(f"{part_name} {part} must divide {whole_name} {whole} (remainder {whole % part})")


def check_steps(stage):
    """An offline stage runs for `steps` or for `epochs`."""
    if (stage.steps is None) == (stage.epochs is None):
        raise ValueError("give exactly one of steps and epochs")
    return stage
