"""What a model says of texts that are there: log-probabilities of a prompt, its last hidden state, a score.

Texts are read alone, in chunks, so that requests of any length need the same few programs.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhfjax.api import Model
from rlhfjax.errors import ConfigError
from rlhfjax.models import EncoderDecoder
from rlhfjax.training.checkpoint import SCALAR

TOP = 20  # likeliest tokens that are known of each place

Said = tuple[list[float | None], list[dict[int, float]]]  # of each token its log-probability and the likeliest ids


class Reader:
    """The programs that read texts with one model, `chunk` tokens at a time. One thread uses it at a time."""

    def __init__(self, model: Model, context: int, chunk: int):
        self.model, self.context, self.chunk = model, context, min(chunk, context)
        self.scalar = model.role in SCALAR
        self.whole = isinstance(model.network, EncoderDecoder)  # reads prompts and responses by two halves
        self._cache: Any = None

    def over(self, model: Model) -> "Reader":
        """The same programs, compiled as far as they are, for another model of the same shape."""
        made = copy.copy(self)
        made.model, made._cache = model, None
        made.__dict__.pop("_weights", None)
        return made

    def warm_up(self) -> None:
        """Compile all programs."""
        if self.scalar:
            self.score([0], [0])
        elif not self.whole:
            self.log_probs([0, 0])
            self.embedding([0])

    def log_probs(self, ids: Sequence[int], top: int = 0) -> Said:
        """Log-probability of each token after those before it, nats; of the first nothing is known.

        Beside each the `top` likeliest ids in its place (at most 20).
        """
        said: list[float | None] = [None]
        others: list[dict[int, float]] = [{}]
        following = [*ids[1:], 0]
        for start, hidden in self._read(ids):
            row = np.zeros(self.chunk, np.int32)
            part = following[start : start + self.chunk]
            row[: len(part)] = part
            chosen, values, likeliest = jax.device_get(self._log_probs(self._weights, hidden, row))
            said.extend(chosen[: len(part)].tolist())
            pairs = zip(likeliest[: len(part), :top].tolist(), values[: len(part), :top].tolist(), strict=True)
            others.extend(dict(zip(*each, strict=True)) for each in pairs)
        return said[: len(ids)], others[: len(ids)]

    def embedding(self, ids: Sequence[int]) -> Float[np.ndarray, "D"]:
        """The final hidden state of the last token, float32."""
        return np.asarray(self._last(ids), np.float32)

    def score(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """The score of a response, read at its end."""
        if self.whole:
            return self._score_of_halves(prompt, response)
        head = self.model.params["head"]
        return float(self._score(head, self._last([*prompt, *response])))

    def _last(self, ids: Sequence[int]) -> np.ndarray:
        *_, (start, hidden) = self._read(ids)
        return np.asarray(hidden)[len(ids) - 1 - start]

    def _read(self, ids: Sequence[int]) -> Iterator[tuple[int, Array]]:
        """The first place and the hidden states of each chunk of a text."""
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            row = np.zeros((1, self.chunk), np.int32)
            row[0, : len(part)] = part
            cache = replace(self._opened, lengths=np.asarray([start], np.int32))
            hidden, self._cache = self._extend(self._weights, cache, row, np.asarray([len(part)], np.int32))
            yield start, hidden[0]

    @property
    def _opened(self) -> Any:
        """The row in which texts are read, one after the other."""
        if self._cache is None:
            self._cache = self.model.network.empty_cache(1, self.context, 0)  # pyright: ignore[reportAttributeAccessIssue]
        return self._cache

    @cached_property
    def _weights(self) -> Any:
        network: Any = self.model.network
        if not self.scalar:
            return self.model.programs.weights(2)
        return jax.jit(network.arrange, static_argnums=1)(self.model.params["decoder"], None)

    @cached_property
    def _extend(self) -> Callable[..., Any]:
        network: Any = self.model.network
        return self.model.compiled(network.extend, donate=1)

    @cached_property
    def _log_probs(self) -> Callable[..., Any]:
        network: Any = self.model.network

        def program(weights: Any, hidden: Array, following: Array) -> tuple[Array, Array, Array]:
            known = jax.nn.log_softmax(network.unembed(weights, hidden), axis=-1)
            values, ids = jax.lax.top_k(known, min(TOP, known.shape[-1]))
            return jnp.take_along_axis(known, following[:, None], axis=-1)[:, 0], values, ids

        return self.model.compiled(program)

    @cached_property
    def _score(self) -> Callable[..., Any]:
        network: Any = self.model.network
        return jax.jit(lambda head, hidden: network.scalar({"head": head}, hidden))

    def _score_of_halves(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """In a row of the whole context, so that one program scores all."""
        if len(prompt) + len(response) > self.context:
            raise ConfigError(f"expected at most {self.context} tokens, got {len(prompt) + len(response)}")
        ids = [*prompt, *response]
        row, mask = np.zeros((1, self.context), np.int32), np.zeros((1, self.context), bool)
        row[0, : len(ids)], mask[0, : len(ids)] = ids, True
        return float(self._scores(self.model.params, row, mask, np.asarray([len(prompt)], np.int32))[0])

    @cached_property
    def _scores(self) -> Callable[..., Any]:
        return self.model.compiled(self.model.network.scores)
