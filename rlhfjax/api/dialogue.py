"""A conversation with a model, turn by turn: what was said, what still fits, and how sure the model was."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from math import exp
from typing import Any, NamedTuple, Unpack

from rlhfjax.api.model import Model
from rlhfjax.api.prompts import speaks
from rlhfjax.api.responses import Completion
from rlhfjax.api.session import Session
from rlhfjax.api.settings import Settings
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.moderation import Moderator
from rlhfjax.text.chat import Message, truncate_history
from rlhfjax.text.loading import AnyTokenizer

HISTORY = 4000  # tokens of a conversation that the model reads, its answer included
ANSWER = 512
SHOWN = 5  # of the likeliest tokens at each place


class Place(NamedTuple):
    """One token of an answer, its probability, and those that were likeliest there with theirs."""

    token: str
    probability: float
    likeliest: tuple[tuple[str, float], ...]


class Dialogue:
    """Messages between somebody and a model.

    The model reads the newest whole exchanges of `history` tokens, system messages first, and room for its answer is
    kept; `dropped` says how many older messages it did not read. What `moderator` stops is answered without the model,
    or cut off, and is not kept. Equal seeds and turns give equal answers.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        history: int = HISTORY,
        moderator: Moderator | None = None,
        seed: int = 0,
        **settings: Unpack[Settings],
    ):
        """`settings` are those of `Model.generate`. Raises ConfigError where an answer has no room."""
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.dropped = 0
        self._model, self._moderator, self._seed, self._drawn = model, moderator, seed, count()
        self._tokenizer: AnyTokenizer = speaks(model.tokenizer, "a conversation")
        self._room = min(model.config.context, history)
        wanted = {"max_new_tokens": min(ANSWER, self._room // 2), "top_log_probs": min(SHOWN, model.config.vocab_size)}
        self._settings: dict[str, Any] = wanted | settings
        self._completion: Completion | None = None
        if not 0 < self._settings["max_new_tokens"] < self._room:
            raise ConfigError(
                f"expected answers shorter than the {self._room} tokens of a conversation, got max_new_tokens "
                f"{self._settings['max_new_tokens']}"
            )

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer to a message, as they are written.

        Raises ConfigError where the message alone is too long, DataError where it cannot be written; then it is not
        kept. An answer that its reader leaves is kept as far as it was read.
        """
        verdict = self._moderator and self._moderator.input(text)
        if verdict and verdict.stops:
            return (filler for filler in [verdict.filler] if filler)
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer()
        except BaseException:
            self.messages.pop()
            raise

    def retry(self) -> Iterator[str]:
        """Another answer in the place of the last. Raises DataError where there is none."""
        self._require_answer("answer again")
        self.messages.pop()
        return self._answer()

    def undo(self) -> None:
        """Takes the last message and its answer back. Raises DataError where there is none."""
        self._require_answer("take back")
        del self.messages[-2:]
        self._completion = None

    def system(self, text: str) -> None:
        """Another system message at the beginning, or none."""
        own = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *own]

    def load(self, messages: Sequence[Message]) -> None:
        """Go on with other messages. Raises DataError for what is no conversation that ends with an answer."""
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        texts = [isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in messages]
        if not roles or not all(texts) or set(roles) - {"system", "user", "assistant"} or roles[-1] != "assistant":
            raise DataError(
                "expected messages of system, user and assistant, each with its content, that end with an answer, got "
                f"{len(messages)} of roles {roles}"
            )
        self.messages, self._completion = [dict(message) for message in messages], None

    def why(self) -> list[Place]:
        """Each token of the last answer. Raises DataError where none was written since."""
        made = self._completion
        if made is None:
            raise DataError("expected an answer to look into, got none; ask something first")
        rows = zip(made.tokens, made.log_probs, made.top_log_probs, strict=True)
        return [Place(self._name(token), exp(value), self._named(top)) for token, value, top in rows]

    def _named(self, top: Mapping[int, float]) -> tuple[tuple[str, float], ...]:
        return tuple((self._name(token), exp(value)) for token, value in top.items())

    def _name(self, token: int) -> str:
        return self._tokenizer.pieces([token])[0]

    @cached_property
    def _session(self) -> Session:
        return self._model.session(1, self._room, self._settings["top_log_probs"])

    def _answer(self) -> Iterator[str]:
        reserve = self._settings["max_new_tokens"]
        read, self.dropped = truncate_history(self.messages, self._tokenizer, self._room, reserve)
        stream = self._session.submit(read, seed=self._seed, uid=next(self._drawn), **self._settings)
        return self._pieces(stream)

    def _pieces(self, stream: Any) -> Iterator[str]:
        guard = self._moderator and self._moderator.guard()
        given: list[str] = []
        try:
            for piece in stream:
                if sent := guard.feed(piece) if guard else piece:
                    given.append(sent)
                    yield sent
                if guard and guard.stopped:
                    return
            if guard and (rest := guard.end()):
                given.append(rest)
                yield rest
        finally:
            stream.close()
            if guard and guard.stopped:
                del self.messages[-1:]
                self._completion = None
            else:
                self.messages.append({"role": "assistant", "content": "".join(given)})
                self._completion = stream.completion

    def _require_answer(self, what: str) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise DataError(f"expected an answer to {what}, got a conversation without one")
