"""Answers as OpenAI's clients read them: objects, their log-probabilities, and pieces of a stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhfjax.serving.jobs import Delta
from rlhfjax.serving.tokens import Spelt, Token


@dataclass
class Written:
    """What came of one response so far."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    drawn: int = 0
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.drawn, self.finish_reason = delta.drawn, delta.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


def usage(read: int, drawn: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def chat_log_probs(tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for token in tokens:
        others = [_named(spelt, value) for spelt, value in token.top[:top]]
        content.append({**_named(token.spelt, token.log_prob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def _named(spelt: Spelt, log_prob: float | None) -> dict[str, Any]:
    return {"token": spelt.shown, "logprob": log_prob, "bytes": list(spelt.bytes)}


def log_probs(tokens: Sequence[Token], top: int, start: int = 0) -> dict[str, Any]:
    """`logprobs` of a completion; `start` is the character at which the first of the tokens begins.

    The token itself is among the likeliest, whether it is one of them or not.
    """
    offsets, place = [], start
    for token in tokens:
        offsets.append(place)
        place += token.length
    return {
        "tokens": [token.spelt.shown for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": [_likeliest(token, top) for token in tokens] if top else None,
        "text_offset": offsets,
    }


def _likeliest(token: Token, top: int) -> Mapping[str, float] | None:
    if token.log_prob is None:
        return None
    found: dict[str, float] = {}
    for spelt, value in (*token.top[:top], (token.spelt, token.log_prob)):
        found[spelt.shown] = max(value, found.get(spelt.shown, value))
    return found
