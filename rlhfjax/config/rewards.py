"""Rewards of an online stage: a list whose weighted sum is the score of a response, each of them a metric of its own.

Which kind an entry is follows from the key that names it. All of them mean: the higher, the better. Paths are relative
to the directory that the run is started in, as those of data are.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, WrapValidator, field_validator, model_validator

from rlhfjax.config.sections import Count, NonNegative, Positive, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, Field(min_length=1)]
RECIPE = "reward"  # the reward model that the recipe itself trains


class Term(Section):
    """One reward: its `weight` in the sum (0: it is only measured), its `name` as a metric (none: that of its kind)."""

    kind: ClassVar[str]

    weight: float = 1.0
    name: Name | None = None

    @property
    def title(self) -> str:
        """The name of the reward in metrics and messages."""
        return self.name or self._usual

    @property
    def _usual(self) -> str:
        return self.kind


class ModelReward(Term):
    """The score of a reward model: `reward`, the one of this recipe's reward stage, or a checkpoint."""

    kind = "model"

    model: Text


class HostTerm(Term):
    """A reward that is found on the host, beside the device, and that may fail for some responses or for all.

    `on_error` ends the run (stop), leaves out the update of the iteration (skip), or gives those responses `value`.
    """

    on_error: Literal["stop", "skip", "value"] = "stop"
    value: float | None = None

    @model_validator(mode="after")
    def _value_or_none(self):
        if (self.on_error == "value") != (self.value is not None):
            raise ValueError("on_error: value and value (the number in place of a reward that failed) go together")
        return self


class CalledTerm(HostTerm):
    """A reward that runs in processes of its own, `workers` of them.

    A call gets `per_call` responses (none: all of an iteration) and `timeout` seconds; after these it is killed.
    """

    timeout: Positive = 60.0
    per_call: Count | None = None
    workers: Count = 1

    @model_validator(mode="after")
    def _calls_for_workers(self):
        if self.workers > 1 and self.per_call is None:
            raise ValueError(f"workers: {self.workers} would share one call; give per_call, the responses of a call")
        return self


class FunctionReward(CalledTerm):
    """A Python function, `FILE.py:NAME`, that gets a list of `rlhfjax.rewards.Example` and gives a number for each."""

    kind = "function"

    function: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$")]

    @property
    def _usual(self) -> str:
        return self.function.rpartition(":")[2]


class CommandReward(CalledTerm):
    """A program, run once per call: it gets one JSON object per line, one per example, and writes a number for each."""

    kind = "command"

    command: Annotated[list[Text], Field(min_length=1)]

    @property
    def _usual(self) -> str:
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", PurePath(self.command[0]).stem).lstrip("._-")
        return stem or self.kind


class Length(Section):
    """Tokens of a response n, with the one that ends it: -|n - target| / target, or the soft overlong punishment.

    That is 0 up to limit - buffer, falls to -1 at limit, and stays there (Yu et al. 2025, DAPO, eq. 13).
    """

    target: Count | None = None
    limit: Count | None = None
    buffer: Count | None = None

    @model_validator(mode="after")
    def _one_form(self):
        soft = (self.limit is not None, self.buffer is not None)
        if (self.target is None) != all(soft) or any(soft) != all(soft):
            raise ValueError("give either target, or limit and buffer (0 up to limit - buffer, -1 from limit on)")
        if self.limit is not None and self.buffer is not None and self.buffer > self.limit:
            raise ValueError(f"buffer {self.buffer} must be at most limit {self.limit}")
        return self


class Repetition(Section):
    """-(1 - different n-grams / n-grams) of the tokens of a response; 0 where it has none of them."""

    ngram: Count = 3


class Format(Section):
    """1 where the regular expression matches the response as a whole (full) or somewhere in it (search), else 0."""

    pattern: Text
    match: Literal["full", "search"] = "full"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern


class ExactMatch(Section):
    """1 where the response is the text in `field` of its record, or one of the texts there, else 0.

    Both are compared in lower case, white space as one space and none at the ends (`strict`: as they are); of both only
    what follows the last `after`, where that is given.
    """

    field: Text
    after: Text | None = None
    strict: bool = False


class NumericMatch(Section):
    """1 where the last number of the response is that of `field`, `tolerance` more or less (absolute), else 0.

    With `after`, the last number that follows the last such text in the response.
    """

    field: Text
    after: Text | None = None
    tolerance: NonNegative = 0.0


class Forbidden(Section):
    """-1 where one of the words (or phrases) is in the response, as whole words in any case, else 0."""

    words: Annotated[list[Text], Field(min_length=1)]


class LengthReward(HostTerm):
    """How near the length of a response is to what it should be."""

    kind = "length"

    length: Length


class RepetitionReward(HostTerm):
    """A punishment for saying the same again."""

    kind = "repetition"

    repetition: Repetition


class FormatReward(CalledTerm):
    """Whether a response has a form; in a process of its own, since a regular expression may run for hours."""

    kind = "format"

    format: Format


class ExactMatchReward(HostTerm):
    """Whether a response is the answer in its record."""

    kind = "exact_match"

    exact_match: ExactMatch


class NumericMatchReward(HostTerm):
    """Whether a response ends with the number in its record."""

    kind = "numeric_match"

    numeric_match: NumericMatch


class ForbiddenReward(HostTerm):
    """A punishment for words."""

    kind = "forbidden"

    forbidden: Forbidden


class Moderation(Section):
    """-1 where the policy's file (or `default`) flags the response as an output, else 0.

    With `flagged: drop` such a response is left out of the update besides, as though it had not been drawn.
    """

    policy: Text
    flagged: Literal["penalise", "drop"] = "penalise"


class ModerationReward(CalledTerm):
    """A punishment for what moderation flags; in a process of its own, since a service may be asked."""

    kind = "moderation"

    moderation: Moderation


_Any = (
    ModelReward
    | FunctionReward
    | CommandReward
    | LengthReward
    | RepetitionReward
    | FormatReward
    | ExactMatchReward
    | NumericMatchReward
    | ForbiddenReward
    | ModerationReward
)
KINDS: dict[str, type[Term]] = {kind.kind: kind for kind in get_args(_Any)}


def _by_kind(given: Any, _: Any) -> Any:
    """The entry as what its key says, so that an error is about that kind and not about all of them."""
    if isinstance(given, Term):
        return given
    keys = [str(key) for key in given] if isinstance(given, dict) else []
    named = [key for key in keys if key in KINDS]
    if len(named) == 1:
        return KINDS[named[0]].model_validate(given)
    near = [] if named else [near for key in keys for near in difflib.get_close_matches(key, KINDS, 1)]
    hint = f"; did you mean {near[0]}?" if near else ""
    got = " and ".join(named or keys) or ("no key" if isinstance(given, dict) else "a value without keys")
    raise ValueError(f"expected a section with one of {', '.join(KINDS)}, got {got}{hint}")


def _names_differ(terms: list[Any]) -> list[Any]:
    titles = [term.title for term in terms]
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"{titles.count(title)} rewards have the name {title}; give each a name of its own")
    return terms


RewardTerm = Annotated[_Any, WrapValidator(_by_kind)]
Rewards = Annotated[list[RewardTerm], Field(min_length=1), AfterValidator(_names_differ)]


def on_device(terms: Sequence[Term]) -> list[ModelReward]:
    """The rewards that are models."""
    return [term for term in terms if isinstance(term, ModelReward)]


def on_host(terms: Sequence[Term]) -> list[HostTerm]:
    """The rewards that `rlhfjax.rewards` finds."""
    return [term for term in terms if isinstance(term, HostTerm)]
