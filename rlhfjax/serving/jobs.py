"""One response on its way from a model to whoever waits for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import jax

from rlhfjax.errors import DataError
from rlhfjax.generation import Response, SamplingParams
from rlhfjax.serving.tokens import Token, token_of
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.text.streaming import TextStream


@dataclass(frozen=True)
class Delta:
    """What came since the last one: text that is certain, and the tokens whose text begins in what is certain.

    `drawn` counts all tokens of the response so far. The last delta has a `finish_reason`: "stop", "length",
    "cancelled" or "error".
    """

    text: str
    tokens: Sequence[Token]
    drawn: int
    finish_reason: str | None = None


class Job:
    """A response to a prompt of ids, written by the thread that steps its engine and cancelled by any.

    `deliver` is called with each delta, in order, by that thread's host. The response is a function of ids, settings,
    seed and `uid`. With `reports` each token comes with its log-probability.
    """

    def __init__(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        tokenizer: AnyTokenizer | None,
        deliver: Callable[[Delta], None],
        *,
        stop: Sequence[str] = (),
        seed: int = 0,
        uid: int = 0,
        reports: bool = False,
    ):
        self.deliver = deliver
        self.began, self.first = monotonic(), None  # when it was asked for, and when its first token came
        self.response = Response(ids, sampling, jax.random.key(seed), uid, ends=self._add)
        self._tokenizer, self._reports = tokenizer, reports
        self._text = TextStream(tokenizer, ids[-1], stop) if tokenizer else None
        self.unknown: int | None = None  # an id that the tokenizer has no text for, which ended this
        self._pieces: list[str] = []
        self._seen = self._given = self._length = 0  # tokens looked at; characters given; characters of those tokens
        self._held: list[tuple[int, Token]] = []  # tokens whose text is held back, and where it begins

    @property
    def ended(self) -> bool:
        return self.response.finish_reason is not None

    def advance(self) -> Delta | None:
        """What is new since the last call; None where nothing is."""
        reason, drawn = self.response.finish_reason, len(self.response.tokens)
        if drawn == self._seen and not reason:
            return None
        if drawn and self.first is None:
            self.first = monotonic()
        if self.unknown is not None:
            return Delta("", (), drawn, "error")
        if self._text and reason:
            self._pieces.append(self._text.end())
        text = "".join(self._pieces)
        self._pieces.clear()
        self._given += len(text)
        self._look(drawn)
        cut = bool(self._text and self._text.stopped)
        ready = [token for place, token in self._held if place < self._given or (reason and not cut)]
        self._held = self._held[len(ready) :]
        return Delta(text, ready, drawn, reason) if text or ready or reason else None

    def _add(self, token: int) -> bool:
        if self._text is None:
            return False
        try:
            self._pieces.append(self._text.add(token))
        except DataError:  # an id that only the model has; the responses beside this one go on
            self.unknown = token
            return True
        return self._text.stopped

    def _look(self, drawn: int) -> None:
        """Describe the tokens that came, where somebody wants to know."""
        r = self.response
        for place in range(self._seen, drawn) if self._reports else ():
            before = r.tokens[place - 1] if place else r.prompt[-1]
            top = r.top_log_probs[place] if r.top_log_probs else {}
            token = token_of(self._tokenizer, r.tokens[place], before, r.log_probs[place], top)
            self._held.append((self._length, token))
            self._length += token.length
        self._seen = drawn
