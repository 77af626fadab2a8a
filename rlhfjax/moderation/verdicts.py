"""What moderation says of a text: a back end's judgement of it, and the verdict that a policy makes of judgements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

Category = Literal[
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
]
CATEGORIES: tuple[str, ...] = get_args(Category)  # those of OpenAI's moderation endpoint
Action = Literal["allow", "flag", "replace", "block"]
ACTIONS: tuple[str, ...] = get_args(Action)  # each stronger than those before it
Side = Literal["input", "output"]


class Span(NamedTuple):
    """Characters start to end (exclusive) of a text, and the category that they are of, with its score."""

    start: int
    end: int
    category: str
    score: float


@dataclass(frozen=True)
class Judgement:
    """What a back end finds in a text: of each category that it knows a score from 0 to 1, and where it was seen.

    Without `spans` a score is of the text as a whole.
    """

    scores: Mapping[str, float]
    spans: tuple[Span, ...] = ()


class Look(NamedTuple):
    """A judgement of a text that may go on, and how many of its first characters are settled.

    Whatever follows, no settled character becomes part of a span that this back end flags.
    """

    judgement: Judgement
    settled: int


class BackendError(Exception):
    """A back end that gave no judgement; its text says why, in one line."""


class Backend(Protocol):
    """Finds scores for texts. It may be asked from several threads at once."""

    name: str
    every: int  # new characters that are worth another `look` at an answer under way

    def judge(self, texts: Sequence[str]) -> list[Judgement]:
        """A judgement of each text, in their order. Raises BackendError."""
        ...

    def look(self, text: str, ended: bool) -> Look:
        """The same of a text that goes on unless it has `ended`.

        It begins where an answer does, or where an earlier look at the answer was settled. Raises BackendError.
        """
        ...


@dataclass(frozen=True)
class Verdict:
    """What becomes of a text.

    action: the strongest of those that its flagged categories ask for; `category` is the one that asks for it
    scores: by category, of the back ends together; flagged: the categories at or above their thresholds
    filler: what is said in place of the text, or of the answer to it, where `action` is replace
    spans: where it was seen, where a back end says so
    failed: why a back end gave no judgement; with `on_error: closed` that stops a text
    """

    side: Side
    action: Action = "allow"
    category: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    flagged: tuple[str, ...] = ()
    filler: str | None = None
    spans: tuple[Span, ...] = ()
    failed: str | None = None

    @property
    def stops(self) -> bool:
        """Whether the text is withheld: an input from the model, an output from the reader."""
        return self.action in ("replace", "block")

    def as_openai(self) -> dict[str, Any]:
        """One of the `results` of OpenAI's `/v1/moderations`; a category that no back end knows has the score 0."""
        return {
            "flagged": bool(self.flagged) or self.stops,
            "categories": {name: name in self.flagged for name in CATEGORIES},
            "category_scores": {name: float(self.scores.get(name, 0.0)) for name in CATEGORIES},
            "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
        }
