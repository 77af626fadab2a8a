"""Records to token rows. Prompts and responses are tokenised apart and their ids joined; no text is tokenised twice."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhfjax.errors import DataError
from rlhfjax.text.chat import beginning, encode_all_turns, encode_demonstration, encode_prompt
from rlhfjax.text.loading import AnyTokenizer

CHUNK = 1024  # records read and tokenised at a time


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray], dtype: Any = np.int32) -> "Ragged":
        """Rows one after the other; of a stream of them no more than a thousand are held apart at a time."""
        lengths, parts, rows = [0], [np.zeros(0, dtype)], iter(rows)
        while chunk := list(itertools.islice(rows, CHUNK)):
            lengths.extend(map(len, chunk))
            parts.append(np.concatenate([np.asarray(row, dtype) for row in chunk]))
        return cls(np.concatenate(parts), np.cumsum(lengths))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def select(self, keep: np.ndarray) -> "Ragged":
        return Ragged.of((self[i] for i in keep), self.values.dtype)


@dataclass(frozen=True)
class TokenRows:
    """Token rows with, for each token, whether it is a target of the loss."""

    tokens: Ragged
    targets: Ragged


@dataclass(frozen=True)
class RankedRows:
    """Comparison i holds the candidate rows groups[i] … groups[i + 1] of `tokens`, with their `ranks`.

    A row begins with the `prompt_lengths[i]` tokens of the comparison's prompt.
    """

    tokens: Ragged
    groups: np.ndarray
    ranks: np.ndarray
    prompt_lengths: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest comparison in a packed row: the prompt, and each response after the prompt's last."""
        shared = np.maximum(self.prompt_lengths - 1, 0) * (np.diff(self.groups) - 1)
        return int((np.add.reduceat(self.tokens.lengths, self.groups[:-1]) - shared).max())

    def select(self, keep: np.ndarray) -> "RankedRows":
        """Only the candidates `keep`, and only the comparisons that still have two of different rank."""
        comparison = np.searchsorted(self.groups, keep, side="right") - 1
        kept, groups, lengths = [], [0], []
        for rows in np.split(keep, np.flatnonzero(np.diff(comparison)) + 1):
            if len(set(self.ranks[rows].tolist())) > 1:
                kept.extend(rows.tolist())
                groups.append(len(kept))
                lengths.append(self.prompt_lengths[np.searchsorted(self.groups, rows[0], side="right") - 1])
        tokens, ranks = self.tokens.select(np.asarray(kept, int)), self.ranks[kept]
        return RankedRows(tokens, np.asarray(groups), ranks, np.asarray(lengths, np.int32))


def _records(source) -> Iterable[dict]:
    for start in range(0, len(source), CHUNK):
        yield from source.__getitems__(range(start, min(start + CHUNK, len(source))))


def document_rows(source, tokenizer: AnyTokenizer, length: int) -> TokenRows:
    """BOS + text + EOS of every document, cut into windows of at most `length` tokens; every token is a target."""
    tokens = Ragged.of(_windows(source, tokenizer, length))
    return TokenRows(tokens, Ragged(np.ones(len(tokens.values), bool), tokens.offsets))


def _windows(source, tokenizer: AnyTokenizer, length: int) -> Iterator[np.ndarray]:
    for start in range(0, len(source), CHUNK):
        texts = [record["text"] for record in source.__getitems__(range(start, min(start + CHUNK, len(source))))]
        for ids in tokenizer.encode_batch(texts):
            row = np.asarray([*beginning(tokenizer), *ids, tokenizer.eos_id], np.int32)
            # A window overlaps its predecessor by one token, so that every token but the first is predicted once.
            yield from (row[i : i + length] for i in range(0, max(len(row) - 1, 1), length - 1))


def demonstration_rows(source, tokenizer: AnyTokenizer, train_on: str) -> TokenRows:
    """Prompt and completion of every demonstration; targets are the completion (or all answers) and its EOS."""
    rows, targets = [], []
    for record in _records(source):
        if train_on == "all" and "messages" in record:
            ids, mask = encode_all_turns(tokenizer, record)
        else:
            prompt, response = encode_demonstration(tokenizer, record)
            ids, mask = prompt + response, [False] * len(prompt) + [True] * len(response)
        rows.append(ids)
        targets.append(mask)
    return TokenRows(Ragged.of(rows), Ragged.of(targets, bool))


def prompt_rows(source, tokenizer: AnyTokenizer) -> Ragged:
    """Every prompt up to where the response begins."""
    return Ragged.of(encode_prompt(tokenizer, record) for record in _records(source))


def ranked_rows(source, tokenizer: AnyTokenizer) -> RankedRows:
    """Every candidate of every comparison as prompt + response + EOS."""
    rows, groups, ranks, lengths = [], [0], [], []
    for start in range(0, len(source), CHUNK):
        records = source.__getitems__(range(start, min(start + CHUNK, len(source))))
        # Many labelers rank the same texts: each is tokenised once.
        texts = list(dict.fromkeys(text for record in records for text in record["responses"]))
        ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
        for record in records:
            prompt = encode_prompt(tokenizer, record)
            rows.extend([*prompt, *ids[text], tokenizer.eos_id] for text in record["responses"])
            ranks.extend(record["ranks"])
            groups.append(len(rows))
            lengths.append(len(prompt))
    return RankedRows(Ragged.of(rows), np.asarray(groups), np.asarray(ranks, np.int32), np.asarray(lengths, np.int32))


def within(
    what: str,
    lengths: np.ndarray,
    limit: int,
    overlong: str,
    report: Callable[[str], None] = lambda text: None,
    setting: str = "batch.length",
) -> np.ndarray:
    """Indices of the rows of `what` (SOURCE@SPLIT) that fit in `limit` tokens, which is `setting`; none is ever cut.

    Raises DataError on the first row that does not fit when `overlong` is "error", and when no row fits.
    """
    fits = lengths <= limit
    if not fits.all() and overlong == "error":
        row = int(np.argmin(fits))
        raise DataError(
            f"{what} row {row}: expected at most {limit} tokens, got {int(lengths[row])} ({int((~fits).sum())} rows of "
            f"{len(fits)} are too long); raise {setting}, or set overlong: drop in the batch to leave them out"
        )
    if not fits.any():
        raise DataError(
            f"{what}: expected rows of at most {limit} tokens, got none among {len(fits)} rows; raise {setting}"
        )
    if not fits.all():
        out = int((~fits).sum())
        report(
            f"{what}: {out} of {len(fits)} rows longer than {limit} tokens left out ({share(out, len(fits))}); "
            f"raise {setting} to keep them"
        )
    return np.flatnonzero(fits)


def share(part: int, whole: int) -> str:
    """A part of a whole in per cent, with two digits that say something."""
    return f"{100 * part / whole:.2g} %"
