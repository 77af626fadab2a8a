"""Prompts as ids, and ids of what a model may be asked to score."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.chat import Message, as_record, encode_prompt, encode_response, encode_responses
from rlhfjax.text.loading import AnyTokenizer

# A text, ids, a conversation, or a record with `prompt` or `messages` and perhaps `tools`, `chat_template_kwargs`.
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]


def prompt_ids(tokenizer: AnyTokenizer | None, vocab_size: int, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of each prompt. Raises ConfigError on one prompt in the place of a list, and as `ids_of`."""
    if isinstance(prompts, str | Mapping):
        raise ConfigError("prompts: expected a list of prompts, got one alone; put it into a list")
    return [ids_of(tokenizer, vocab_size, f"prompts[{place}]", prompt) for place, prompt in enumerate(prompts)]


def ids_of(tokenizer: AnyTokenizer | None, vocab_size: int, name: str, prompt: Any) -> list[int]:
    """The ids of a prompt. Raises DataError on a conversation that cannot be written, ConfigError on other ids."""
    try:
        row = list(prompt) if _is_ids(prompt) else encode_prompt(speaks(tokenizer, "prompts"), as_record(prompt))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    check_ids(name, np.asarray(row), vocab_size)
    return row


def pair_ids(
    tokenizer: AnyTokenizer | None, vocab_size: int, name: str, prompt: Any, response: str | Sequence[int]
) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of a response to it, as training on a comparison sees them."""
    if not isinstance(response, str):
        check_ids(f"responses[{name}]", np.asarray(response), vocab_size)
        return ids_of(tokenizer, vocab_size, f"prompts[{name}]", prompt), list(response)
    t = speaks(tokenizer, "responses")
    if _is_ids(prompt):
        return ids_of(t, vocab_size, f"prompts[{name}]", prompt), encode_response(t, response)
    try:
        asked, [answer] = encode_responses(t, as_record(prompt), [response])
    except DataError as error:
        raise DataError(f"prompts[{name}]: {error}") from error
    return asked, answer


def speaks(tokenizer: AnyTokenizer | None, what: str) -> AnyTokenizer:
    """The tokenizer. Raises ConfigError where there is none."""
    if tokenizer is None:
        raise ConfigError(f"{what}: expected lists of ids, got text for a model that has no tokenizer")
    return tokenizer


def check_ids(name: str, ids: np.ndarray, vocab_size: int, axes: int = 1) -> None:
    """Raises ConfigError unless these are ids of the vocabulary on so many axes."""
    last = vocab_size - 1
    if ids.ndim != axes or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > last:
        got = f"ids {ids.min()} to {ids.max()}" if ids.size and ids.dtype.kind in "iu" else f"type {ids.dtype}"
        raise ConfigError(
            f"{name}: expected at least one id of 0 to {last} on {axes} ax{'e' if axes > 1 else 'i'}s, got shape "
            f"{ids.shape}, {got}"
        )


def _is_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is ids: an array, or a sequence of other things than messages."""
    return not isinstance(prompt, str | Mapping) and not (len(prompt) and isinstance(prompt[0], Mapping))
