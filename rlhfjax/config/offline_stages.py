"""The stages that train on data as they are: pretraining, supervised fine-tuning, reward model, DPO."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhfjax.config.sections import (
    Batch,
    BelowOne,
    Count,
    Data,
    NonNegative,
    Optimizer,
    Positive,
    RankedBatch,
    Section,
    Sources,
)


class Offline(Section):
    """What they have in common: data, how long, how many at a time, and how often held-out data are measured.

    An offline stage runs for `steps` or for `epochs`.
    """

    data: Sources
    validation: list[Data] = []
    steps: Count | None = None
    epochs: Positive | None = None
    batch: Batch | RankedBatch
    optimizer: Optimizer
    validate_every: Count = 100

    @model_validator(mode="after")
    def _length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class PretrainingMix(Section):
    """Pretraining text mixed into a supervised stage; `fraction` is its share of the sequences of a batch."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    data: Sources


class Pretrain(Offline):
    """Next-token prediction on packed documents."""

    batch: Batch
    dropout: BelowOne = 0.0


class TokenLoss(Section):
    """Loss on completions (`train_on: all` = every assistant turn), their labels smoothed by `label_smoothing`.

    0.1 trained the Transformer (Vaswani et al. 2017, section 5.4). What is measured on validation data is not smoothed.
    """

    train_on: Literal["last", "all"] = "last"
    label_smoothing: BelowOne = 0.0


class Sft(Offline):
    """Supervised fine-tuning on demonstrations."""

    batch: Batch
    dropout: BelowOne = 0.0
    loss: TokenLoss = TokenLoss()
    pretraining: PretrainingMix | None = None
    select_by: Literal["last", "validation_loss", "reward_score"] = "last"
    reward_model: str | None = None

    @model_validator(mode="after")
    def _selection(self):
        if (self.select_by == "reward_score") != bool(self.reward_model):
            raise ValueError("select_by: reward_score and reward_model (a checkpoint) go together")
        if self.select_by != "last" and not self.validation:
            raise ValueError(f"select_by: {self.select_by} needs validation data")
        return self


class RankingLoss(Section):
    """Loss over all pairs of a prompt, each weighing 1/C(K,2) (Ouyang et al. 2022, eq. 1 for `logistic`)."""

    kind: Literal["logistic", "hinge", "exp", "squared", "plackett_luce"] = "logistic"
    margin: NonNegative = 0.0


class Normalize(Section):
    """After training: the mean score of `on` becomes 0 and, with `scale`, its standard deviation 1.

    `demonstrations` reads the responses of `data`; `samples` reads responses of the SFT policy to its prompts, drawn
    as the last online stage will, or without one at temperature 1, up to `batch.length` with their prompt.
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


class Reward(Offline):
    """The reward model: K-way human rankings, scored at the last token of each response."""

    batch: RankedBatch
    dropout: BelowOne = 0.0
    start_from: Literal["sft", "pretrain"] = "sft"
    loss: RankingLoss = RankingLoss()
    normalize: Normalize


class PreferenceLoss(Section):
    """Loss of a pair: -log σ(beta h) (Rafailov et al. 2023, eq. 7), hinge or ipo.

    `label_smoothing` is the share of the labels taken to be wrong.
    """

    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class Dpo(Offline):
    """Direct preference optimisation of the SFT policy on K-way rankings, each prompt's pairs weighing 1/C(K,2)."""

    batch: RankedBatch
    loss: PreferenceLoss = PreferenceLoss()


class OfflineStages(Section):
    """They in the order of the recipe."""

    pretrain: Pretrain | None = None
    sft: Sft | None = None
    reward: Reward | None = None
    dpo: Dpo | None = None
