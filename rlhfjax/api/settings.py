"""Settings of drawing: the keywords that a model may be asked with, and what of them makes sense."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from rlhfjax.api.prompts import check_ids
from rlhfjax.errors import ConfigError
from rlhfjax.generation import SamplingParams
from rlhfjax.text.loading import AnyTokenizer

_NEVER = -1  # an id that no model emits
_SEEDS = 2**32  # beyond these jax keeps the lower 32 bits alone: other numbers would draw the same
_HOTTEST = 1e6  # beyond this a draw is uniform


class Further(TypedDict, total=False):
    """The rarer keywords of `Model.generate`."""

    min_p: float  # only tokens so many times as likely as the likeliest; 0: all
    stop_ids: Sequence[int]  # tokens that end a response beside the tokenizer's own
    stop: Sequence[str]  # texts that end a response before them
    top_log_probs: int  # how many of the likeliest tokens to tell at each place
    speculate: int  # draft tokens per call


class Settings(TypedDict, total=False):
    """The keywords of `Model.generate` that say how to draw; what is left out is as there."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_ids: Sequence[int]
    top_log_probs: int


def check_names(function: str, given: Mapping[str, Any], known: type) -> None:
    """Raises TypeError, as Python does, on a keyword that `known`, a TypedDict, has not."""
    if unknown := [name for name in given if name not in known.__annotations__]:
        near = difflib.get_close_matches(unknown[0], known.__annotations__, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}{hint}")


def sampling_params(
    tokenizer: AnyTokenizer | None,
    vocab_size: int,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
    top_log_probs: int = 0,
) -> SamplingParams:
    """The sampler's settings. Raises ConfigError on those that make no sense."""
    if max_new_tokens < 1 or not 0 <= temperature <= _HOTTEST or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"expected max_new_tokens >= 1, temperature >= 0 (and <= {_HOTTEST:g}), top_k >= 0 and 0 < top_p <= 1, got "
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )
    if not 0 <= min_p <= 1 or not 0 <= top_log_probs <= vocab_size:
        raise ConfigError(
            f"expected 0 <= min_p <= 1 and top_log_probs of 0 to {vocab_size}, got min_p={min_p}, "
            f"top_log_probs={top_log_probs}"
        )
    if stop_ids:
        check_ids("stop_ids", np.asarray(stop_ids), vocab_size)
    stop, *others = end_ids(tokenizer)
    return SamplingParams(
        max_new_tokens,
        stop,
        pad_id(tokenizer),
        float(temperature),
        min(top_k, vocab_size),
        float(top_p),
        min_p=float(min_p),
        stop_ids=(*others, *(int(i) for i in stop_ids)),
        top_log_probs=top_log_probs,
    )


def end_ids(tokenizer: AnyTokenizer | None) -> tuple[int, ...]:
    """The tokens that end a response."""
    return (_NEVER,) if tokenizer is None else tokenizer.end_ids


def pad_id(tokenizer: AnyTokenizer | None) -> int:
    """What fills a row of a batch."""
    return 0 if tokenizer is None else tokenizer.pad_id


def check_seed(seed: int) -> None:
    """Raises ConfigError on a seed that would draw what another draws."""
    if not 0 <= seed < _SEEDS:
        raise ConfigError(f"expected 0 <= seed < 2**32, got seed={seed}")


def check_stop(stop: Sequence[str], tokenizer: AnyTokenizer | None) -> None:
    """Raises ConfigError unless these are texts that the text of a response may contain."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop: expected a list of texts, none of them empty, got {stop!r}")
    if stop and tokenizer is None:
        raise ConfigError("stop: expected a model with a tokenizer, got one that answers with ids; give stop_ids")
