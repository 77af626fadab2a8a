"""Rows of tokens as the bytes of a record: numbers of 32 bits that say what follows, then ids, then masks or text.

All numbers are little-endian; ids are of 16 bits where the vocabulary allows it.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.plain_json import dumps

_NUMBER = np.dtype("<u4")


class Segments(NamedTuple):
    """The sequences of a packed row one after the other: ids [T], the length of each, and targets [T] (None: all)."""

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray | None


class Comparison(NamedTuple):
    """A prompt's ids, those of each response, `ranks` with equal responses tied, and the ranks as they were `given`."""

    prompt: np.ndarray
    responses: list[np.ndarray]
    ranks: np.ndarray
    given: np.ndarray


def id_type(vocab_size: int) -> str:
    """The type in which ids of a vocabulary are kept."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def segments_bytes(row: Segments, ids: str) -> bytes:
    """A packed row as bytes."""
    head = np.asarray([len(row.lengths), *row.lengths], _NUMBER).tobytes()
    mask = b"" if row.targets is None else np.packbits(row.targets).tobytes()
    return head + row.tokens.astype(ids).tobytes() + mask


def read_segments(data: bytes, ids: str) -> Segments:
    """What `segments_bytes` wrote."""
    (count,), at = _numbers(data, 0, 1)
    lengths, at = _numbers(data, at, int(count))
    tokens = np.frombuffer(data, ids, int(lengths.sum()), at)
    at += tokens.nbytes
    if at == len(data):
        return Segments(tokens, lengths, None)
    return Segments(tokens, lengths, np.unpackbits(np.frombuffer(data, np.uint8, offset=at), count=len(tokens)) > 0)


def comparison_bytes(row: Comparison, ids: str) -> bytes:
    """A comparison as bytes."""
    lengths = [len(response) for response in row.responses]
    head = np.asarray([len(lengths), len(row.prompt), *lengths, *row.ranks, *row.given], _NUMBER).tobytes()
    return head + np.concatenate([row.prompt, *row.responses]).astype(ids).tobytes()


def read_comparison(data: bytes, ids: str) -> Comparison:
    """What `comparison_bytes` wrote."""
    (count, prompt), at = _numbers(data, 0, 2)
    numbers, at = _numbers(data, at, 3 * int(count))
    lengths, ranks, given = np.split(numbers.astype(np.int32), 3)
    parts = np.split(np.frombuffer(data, ids, offset=at), np.cumsum([int(prompt), *lengths]))
    return Comparison(parts[0], parts[1:-1], ranks, given)


def prompt_bytes(tokens: Sequence[int], record: dict[str, Any], ids: str) -> bytes:
    """A prompt and its whole record, which rewards may read, as bytes."""
    text = dumps(record, separators=(",", ":")).encode()
    return np.asarray([len(tokens)], _NUMBER).tobytes() + np.asarray(tokens, ids).tobytes() + text


def read_prompt(data: bytes, ids: str) -> np.ndarray:
    """The ids of what `prompt_bytes` wrote."""
    (count,), at = _numbers(data, 0, 1)
    return np.frombuffer(data, ids, int(count), at)


def read_record(data: bytes, ids: str) -> dict[str, Any]:
    """The record of what `prompt_bytes` wrote."""
    return json.loads(data[_NUMBER.itemsize + read_prompt(data, ids).nbytes :])


def _numbers(data: bytes, at: int, count: int) -> tuple[np.ndarray, int]:
    found = np.frombuffer(data, _NUMBER, count, at)
    return found, at + found.nbytes
