"""The file `evaluate/evaluation.json`: every figure of an evaluation, typed, read back as it was written.

Rows are lists (judges, policies, measures), so a dataset without human ratings or with a third judge needs no new
field. Numbers that are not finite are written as strings ("NaN"), which keeps the file plain JSON.
"""

from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlhfjax.errors import DataError
from rlhfjax.evaluation.statistics import Interval

_CONFIG = ConfigDict(ser_json_inf_nan="strings")


@dataclass(frozen=True, config=_CONFIG)
class AccuracyRow:
    """Who ordered pairs of texts (a model, a baseline, people) and the share ordered right, by measure."""

    name: str
    values: dict[str, Interval | None]


@dataclass(frozen=True, config=_CONFIG)
class Calibration:
    """What a reward model says of pairs against what people say: by bin, its mean probability, their share, pairs.

    `error` is the expected calibration error, `slope` 1 where differences are log-odds.
    """

    error: float
    slope: float
    predicted: list[float]
    observed: list[float]
    pairs: list[int]


@dataclass(frozen=True, config=_CONFIG)
class WinRow:
    """One judge's view of a policy against a baseline on the same prompts; means in the judge's unit.

    `ties` is the share of the pairs that the judge scores alike.
    """

    judge: str
    policy: str
    baseline: str
    win: Interval
    policy_mean: float
    baseline_mean: float
    ties: float | None = None


@dataclass(frozen=True, config=_CONFIG)
class PolicyRow:
    """What a policy's responses to the evaluation prompts look like.

    `kl` is nats per response against the first of the policies, `entropy` nats per token, `length` tokens, `reward`
    the mean score of the reward model, the others shares in [0, 1]. `prompts` counts the different ones; `intervals`
    has the 95 % interval of each figure by its name.
    """

    name: str
    responses: int
    length: float
    distinct_1: float
    distinct_2: float
    eos_rate: float
    repetition: float | None = None
    kl: float | None = None
    entropy: float | None = None
    reward: float | None = None
    prompts: int | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True, config=_CONFIG)
class Response:
    """One response and what each judge gave it."""

    text: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, config=_CONFIG)
class Sample:
    """One prompt with a response of each policy, earliest policy first."""

    prompt: str
    responses: dict[str, Response]


@dataclass(frozen=True, config=_CONFIG)
class Evaluation:
    """All results of one run. `heldout_losses[stage][set]` is nats per token, `stage_seconds` wall seconds,
    `exact_match[stage][set]` the share of demonstrations that are repeated to the letter.

    `judge_accuracy` is what the judges themselves reach on held-out human pairs: how far they are to be trusted.
    """

    seed: int
    date: str
    hardware: str
    stage_seconds: dict[str, float] = field(default_factory=dict)
    heldout_losses: dict[str, dict[str, float]] = field(default_factory=dict)
    exact_match: dict[str, dict[str, float]] = field(default_factory=dict)
    reward_accuracy: list[AccuracyRow] = field(default_factory=list)
    calibration: Calibration | None = None
    judge_accuracy: list[AccuracyRow] = field(default_factory=list)
    win_rates: list[WinRow] = field(default_factory=list)
    policies: list[PolicyRow] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> str:
        """The whole evaluation as indented JSON; `from_json` gives an equal object back."""
        return _adapter().dump_json(self, indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = "evaluation.json") -> "Evaluation":
        """Reads what `to_json` wrote. Raises DataError that names the file and the field."""
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            raise DataError(f"{source}: {where}: {first['msg']}; run the evaluate stage again to rewrite it") from error


def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Evaluation)
