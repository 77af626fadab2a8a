"""Texts that come as they are written, several at a time, from one model."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import jax

from rlhfjax.api.prompts import Prompt, ids_of
from rlhfjax.api.responses import Completion
from rlhfjax.api.settings import Settings, check_names, check_seed, check_stop, sampling_params
from rlhfjax.generation import Engine, Response, SamplingParams
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.text.streaming import TextStream


class Stream(Iterator[str]):
    """The text of one response in pieces, which end with it; joined they are its whole text.

    Asking for the next piece lets the session write until there is one. A model without a tokenizer gives no pieces,
    but a `completion` with ids.
    """

    def __init__(self, engine: Engine, response: Response, text: TextStream | None):
        self._engine, self._response, self._text = engine, response, text
        self._pieces: list[str] = []
        self._taken = 0
        response.ends = self._add

    def __next__(self) -> str:
        while not (piece := self.take()):
            if self._response.finish_reason:
                raise StopIteration
            self._engine.step()
        return piece

    def take(self) -> str:
        """The text that came since it was taken last, without writing more."""
        new = "".join(self._finished()[self._taken :])
        self._taken = len(self._pieces)
        return new

    def close(self) -> None:
        """Cancel the response, if it has not ended: the next step of its session gives its slot away."""
        self._engine.cancel(self._response)

    @property
    def completion(self) -> Completion:
        """The response so far; `finish_reason` is None until it ends."""
        r = self._response
        text = "".join(self._finished())
        return Completion(text, list(r.tokens), list(r.log_probs), r.finish_reason, tuple(r.top_log_probs))

    def _add(self, token: int) -> bool:
        if self._text is None:
            return False
        self._pieces.append(self._text.add(token))
        return self._text.stopped

    def _finished(self) -> list[str]:
        """The pieces so far, with what was held back once the response has ended."""
        if self._text and self._response.finish_reason:
            self._pieces.append(self._text.end())
            self._text = None
        return self._pieces


class Session:
    """Responses that one thread lets a model write, `step` by `step`; others may submit prompts and close streams.

    What is written of a prompt depends on it, its settings, `seed` and `uid` alone, not on who else is there.
    """

    def __init__(self, engine: Engine, tokenizer: AnyTokenizer | None, vocab_size: int):
        self._engine, self._tokenizer, self._vocab_size = engine, tokenizer, vocab_size

    @property
    def busy(self) -> bool:
        """Whether a response waits or is being written."""
        return self._engine.busy

    def step(self) -> None:
        """Admit prompts that wait to free slots, and write the next token of every response."""
        self._engine.step()

    def submit(
        self, prompt: Prompt, stop: Sequence[str] = (), seed: int = 0, uid: int = 0, **settings: Unpack[Settings]
    ) -> Stream:
        """The text to come in answer to a prompt; `uid` tells responses of one seed apart.

        Arguments are those of `Model.generate`. Raises ConfigError on what makes no sense, or is more than the session
        has room for, DataError on a conversation that cannot be written.
        """
        check_names("submit", settings, Settings)
        check_seed(seed)
        check_stop(stop, self._tokenizer)
        sampling = sampling_params(self._tokenizer, self._vocab_size, **settings)
        ids = ids_of(self._tokenizer, self._vocab_size, "prompt", prompt)
        return self.start(ids, sampling, stop, seed, uid)

    def start(self, ids: Sequence[int], sampling: SamplingParams, stop: Sequence[str], seed: int, uid: int) -> Stream:
        """`submit` of what was checked."""
        response = Response(ids, sampling, jax.random.key(seed), uid)
        text = TextStream(self._tokenizer, ids[-1], stop) if self._tokenizer else None
        stream = Stream(self._engine, response, text)
        self._engine.submit(response)
        return stream
