"""A conversation as its chat template writes it: text in which special tokens have names that no text has."""

import datetime
import difflib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.templates import ChatTemplate

Message = Mapping[str, Any]
_RESERVED = ("messages", "tools", "add_generation_prompt", "date", "self")
_UNWRITTEN = ("weight",)  # fields of a message that say how it is trained
_ASIDE = re.compile(r"</?think>|/(?:no_)?think\b")  # what templates look for in contents; no other token


@dataclass(frozen=True)
class ChatSettings:
    """What a chat template is told besides the conversation: variables of its own, and the date that it writes.

    `kwargs` is chat_template_kwargs of transformers, such as {"enable_thinking": False}; those of a record go before.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> "ChatSettings":
        """The settings that `to_json` described; empty ones of what is older than they are."""
        date = described.get("date")
        return cls(described.get("chat_template_kwargs") or {}, date and datetime.date.fromisoformat(date))

    def to_json(self) -> dict[str, Any]:
        """As a manifest and a checkpoint have them."""
        return {"chat_template_kwargs": dict(self.kwargs), "date": self.date and self.date.isoformat()}

    def __str__(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)


@dataclass(frozen=True)
class ChatWriter:
    """Conversations by a model's template. `named` are its special tokens by role, `seal` the names they are given.

    Special tokens come from the template alone: what spells one in a message stays text. Only the marks of a thought
    are themselves in an answer, since they are the model's to write.
    """

    template: ChatTemplate | None
    named: Mapping[str, str]
    seal: Mapping[str, str]
    settings: ChatSettings = ChatSettings()

    def write(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. Raises ConfigError without a template, and DataError when it refuses these messages
        or makes a special token out of what they say together with what it writes beside it.
        """
        spelled: dict[str, str] = {}

        def hide(text: str, role: str = "") -> str:
            pattern = self._special_text if role != "assistant" else self._special_but_thoughts
            return pattern.sub(lambda found: spelled.setdefault(found[0], secrets.token_hex(16)), text)

        # In messages, special tokens are spelled in another way until the template has written its own.
        hidden = [_copy(message, hide) for message in messages]
        about = _each_text({"tools": tools, "kwargs": {**self.settings.kwargs, **(kwargs or {})}}, hide)
        written = self._render(hidden, add_generation_prompt, **about)
        neutral = [self._neutral(message) for message in hidden], _each_text(about, self._without_marks)
        if neutral != (hidden, about):
            expected = self._special_text.findall(self._render(neutral[0], add_generation_prompt, **neutral[1]))
            if self._special_text.findall(written) != expected:
                raise DataError("expected contents that spell no special token with the chat template; drop the record")
        sealed = self._special_text.sub(lambda found: self.seal[found[0]], written)
        for token, name in spelled.items():
            sealed = sealed.replace(name, token)
        return sealed

    def with_settings(self, settings: ChatSettings) -> "ChatWriter":
        """The same one with these settings. Raises ConfigError on variables that the template does not read."""
        known = self.template.variables if self.template else frozenset()
        if unknown := sorted(settings.kwargs.keys() - known):
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {near[0]}" if near else "remove it"
            raise ConfigError(
                f"chat_template_kwargs: expected what the model's chat template reads, got {unknown[0]}; {hint}"
            )
        return replace(self, settings=settings)

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after an answer that is the last message; nothing where it writes no plain answer.

        It is the same whatever the settings are.
        """
        mark = secrets.token_hex(16)
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        plain = ChatWriter(self.template, self.named, self.seal, ChatSettings(date=datetime.date(2000, 1, 1)))
        try:
            return plain.write(probe, False).rpartition(mark)[2]
        except (ConfigError, DataError):
            return ""

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any, kwargs: Mapping[str, Any]
    ) -> str:
        if self.template is None:
            raise ConfigError(
                "expected a tokenizer with a chat template for messages, got one without; give prompt and completion, "
                "or put chat_template.jinja beside its tokenizer.json"
            )
        if reserved := sorted(kwargs.keys() & {*_RESERVED}):
            raise ConfigError(f"chat_template_kwargs: expected variables of the template's own, got {reserved}")
        variables = {**self.named, **kwargs}
        return self.template.render(messages, add_generation_prompt, tools=tools, date=self.settings.date, **variables)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        """Any special token, the longest where several begin."""
        return _any_of(self.seal)

    @cached_property
    def _special_but_thoughts(self) -> re.Pattern[str]:
        return _any_of([token for token in self.seal if "think" not in token.lower()])

    def _neutral(self, message: Message) -> dict[str, Any]:
        """A message without what could be part of a special token that begins or ends outside of it."""
        words = {name: self._without_words(value) for name, value in message.items() if isinstance(value, str)}
        return _each_text(message, self._without_marks) | words | {"role": message["role"]}

    def _without_words(self, text: str) -> str:
        return self._fragments[1].sub(_unless_aside, text)

    def _without_marks(self, text: str) -> str:
        return self._fragments[0].sub(_unless_aside, text)

    @cached_property
    def _fragments(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Marks that special tokens are written with, and these and their words, or else what templates look for."""
        marks = sorted(
            {letter for token in self.seal for letter in token if not (letter.isalnum() or letter in " _\n")}
        )
        words = sorted({word for token in self.seal for word in re.findall(r"\w+", token)})
        some = f"{_ASIDE.pattern}|[{re.escape(''.join(marks))}]" if marks else _ASIDE.pattern
        return re.compile(some), re.compile(rf"{some}|\b(?:{'|'.join(map(re.escape, words))})\b" if words else some)


def _unless_aside(found: re.Match[str]) -> str:
    return found[0] if _ASIDE.fullmatch(found[0]) else "?"


def _any_of(tokens: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _copy(message: Message, change: Callable[[str, str], str]) -> dict[str, Any]:
    """A message as a template sees it, its texts changed: without absent fields, a thought under both of its names."""
    role = message["role"]
    kept = {name: value for name, value in message.items() if value is not None and name not in _UNWRITTEN}
    made = {name: _each_text(value, lambda text: change(text, role)) for name, value in kept.items() if name != "role"}
    thought = {"thinking": made["reasoning_content"]} if "reasoning_content" in made else {}
    return {"role": role} | thought | made


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each_text(item, change) for name, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, list | tuple) else value
