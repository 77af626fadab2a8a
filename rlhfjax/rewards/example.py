"""One response as a reward sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """A prompt with a response to it.

    prompt, response: the texts, without the tokens that end or pad them
    prompt_ids, response_ids: their tokens, without padding; the one that ended the response is the last of its ids
    finished: whether the response ended by itself, and not at the longest length
    record: all fields of the prompt's record, with those that no model reads, such as an answer
    """

    prompt: str
    response: str
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] = ()
    finished: bool = True
    record: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As plain values: what a command reads as one line."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "prompt_ids": [int(token) for token in self.prompt_ids],
            "response_ids": [int(token) for token in self.response_ids],
            "finished": bool(self.finished),
            "record": dict(self.record),
        }

    @classmethod
    def of_json(cls, given: Mapping[str, Any]) -> "Example":
        """The example that `as_json` has written."""
        ids = {name: tuple(given[name]) for name in ("prompt_ids", "response_ids")}
        return cls(**{**given, **ids})
