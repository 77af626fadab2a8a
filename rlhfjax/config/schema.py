"""The run configuration: frozen, strict, and as the file says it. No derived value is ever written back.

One section per stage, in `rlhfjax.config.offline_stages` and `rlhfjax.config.online_stages`; what stages share is in
`rlhfjax.config.sections`, which also says what counts and lengths mean, the model in `rlhfjax.config.model`, and what
concerns a run as a whole in `rlhfjax.config.upkeep`.
"""

from typing import Annotated

from pydantic import Field

from rlhfjax.config.model import Lora, Model
from rlhfjax.config.offline_stages import (
    Dpo,
    Offline,
    OfflineStages,
    PreferenceLoss,
    Pretrain,
    PretrainingMix,
    RankingLoss,
    Reward,
    Sft,
)
from rlhfjax.config.online_stages import Online, OnlineStages, Ppo, Ptx, Value
from rlhfjax.config.sections import (
    Axes,
    Batch,
    Count,
    Data,
    Mesh,
    NonNegative,
    Optimizer,
    RankedBatch,
    RolloutBatch,
    Sampling,
    Section,
    Sources,
    Tokenizer,
)
from rlhfjax.config.upkeep import Checkpoints, Logging, Profile, Reliability

__all__ = [
    "Axes",
    "Batch",
    "Checkpoints",
    "Data",
    "Dpo",
    "Evaluate",
    "ExactMatch",
    "Logging",
    "Lora",
    "Mesh",
    "Model",
    "Offline",
    "Online",
    "Optimizer",
    "Ppo",
    "PreferenceLoss",
    "Pretrain",
    "PretrainingMix",
    "Profile",
    "Ptx",
    "RankedBatch",
    "RankingLoss",
    "Ratings",
    "Reliability",
    "Reward",
    "RolloutBatch",
    "Run",
    "Sampling",
    "Section",
    "Sft",
    "Stages",
    "Tokenizer",
    "Value",
]


class Ratings(Section):
    """Human ratings of texts: `judge` fits the judge, `baseline` the TF-IDF baseline, `test` measures both."""

    judge: Data
    baseline: Data
    test: Data
    prefix: str = ""


class ExactMatch(Section):
    """Share of the demonstrations in `data` that the policy repeats to the letter, found by a search with `beams`.

    Scores are divided by ((5 + length) / 6)^length_penalty (Wu et al. 2016, eq. 14). With `after` only what follows the
    last such text counts, in demonstrations and responses that have it: the answer behind the steps that lead to it.
    """

    data: Sources
    beams: Count = 4
    length_penalty: NonNegative = 0.6
    after: Annotated[str, Field(min_length=1)] | None = None


class Evaluate(Section):
    """The report: held-out losses by stage, accuracy of the reward model, win rates, samples, exact match.

    What is sampled and judged is the last policy, against the one that it started from.
    """

    data: Sources
    samples: Count = 512
    batch: RolloutBatch
    sampling: Sampling
    losses: list[Data] = []
    comparisons: list[Data] = []
    ratings: Ratings | None = None
    exact_match: ExactMatch | None = None


class Stages(OnlineStages, OfflineStages):
    """The recipe in its order, offline stages before those that sample; a stage that is left out is not run."""

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
