"""Records to token rows, and token rows to the arrays of a batch: packed, or padded left and right.

Prompts and responses are tokenised apart and their ids joined; text is never tokenised twice.
"""

from collections.abc import Callable, Iterable, Sequence
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
        lengths, parts = [0], []
        for row in rows:
            lengths.append(len(row))
            parts.append(np.asarray(row, dtype))
        return cls(np.concatenate(parts) if parts else np.zeros(0, dtype), np.cumsum(lengths))

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
    rows = []
    for start in range(0, len(source), CHUNK):
        texts = [record["text"] for record in source.__getitems__(range(start, min(start + CHUNK, len(source))))]
        for ids in tokenizer.encode_batch(texts):
            row = [*beginning(tokenizer), *ids, tokenizer.eos_id]
            # A window overlaps its predecessor by one token, so that every token but the first is predicted once.
            rows.extend(row[i : i + length] for i in range(0, max(len(row) - 1, 1), length - 1))
    tokens = Ragged.of(rows)
    return TokenRows(tokens, Ragged(np.ones(len(tokens.values), bool), tokens.offsets))


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
    what: str, lengths: np.ndarray, limit: int, overlong: str, report: Callable[[str], None] = lambda text: None
) -> np.ndarray:
    """Indices of the rows that fit in `limit` tokens; nothing is ever cut.

    Raises DataError on the first row that does not fit when `overlong` is "error", and when no row fits.
    """
    fits = lengths <= limit
    if not fits.all() and overlong == "error":
        row = int(np.argmin(fits))
        raise DataError(
            f"{what} row {row}: expected at most {limit} tokens, got {int(lengths[row])} ({int((~fits).sum())} rows of "
            f"{len(fits)} are too long); raise the length, or set overlong: drop in the batch to leave them out"
        )
    if not fits.any():
        raise DataError(f"{what}: expected rows of at most {limit} tokens, got none among {len(fits)} rows")
    if not fits.all():
        report(f"{what}: {int((~fits).sum())} of {len(fits)} rows longer than {limit} tokens left out")
    return np.flatnonzero(fits)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: every row goes to the fullest bin that still has room for it."""
    space_to_bins: dict[int, list[int]] = {}
    bins: list[list[int]] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[row])
        space = next((s for s in range(need, capacity) if space_to_bins.get(s)), capacity)
        if space == capacity:
            bins.append([])
            index = len(bins) - 1
        else:
            index = space_to_bins[space].pop()
        bins[index].append(row)
        space_to_bins.setdefault(space - need, []).append(index)
    return bins


class PackedRows:
    """Random access to rows of exactly `length` tokens, each holding one or several documents as segments 1, 2, …"""

    def __init__(self, rows: TokenRows, length: int, *, packed: bool, pad_id: int):
        self.rows, self.length, self.pad_id = rows, length, pad_id
        lengths = rows.tokens.lengths
        self.bins = pack(lengths, length) if packed else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        out = {
            "tokens": np.full(self.length, self.pad_id, np.int32),
            "segments": np.zeros(self.length, np.int32),
            "positions": np.zeros(self.length, np.int32),
            "loss_mask": np.zeros(self.length, bool),
        }
        start = 0
        for segment, row in enumerate(self.bins[i], 1):
            tokens = self.rows.tokens[row]
            span = slice(start, start + len(tokens))
            out["tokens"][span] = tokens
            out["segments"][span] = segment
            out["positions"][span] = np.arange(len(tokens))
            out["loss_mask"][span] = self.rows.targets[row]
            start += len(tokens)
        return out


class RankedItems:
    """Random access to comparisons padded to `candidates` responses of `length` tokens."""

    def __init__(self, rows: RankedRows, candidates: int, length: int, pad_id: int):
        self.rows, self.candidates, self.length, self.pad_id = rows, candidates, length, pad_id
        self.longest = rows.longest

    def __len__(self) -> int:
        return len(self.rows.groups) - 1

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        out = {
            "tokens": np.full((self.candidates, self.length), self.pad_id, np.int32),
            "token_mask": np.zeros((self.candidates, self.length), bool),
            "ranks": np.zeros(self.candidates, np.int32),
            "mask": np.zeros(self.candidates, bool),
            "prompt_lengths": np.asarray(self.rows.prompt_lengths[i], np.int32),
        }
        # An absent candidate keeps one unmasked token, so that every row has a last token to read a score at.
        out["token_mask"][:, 0] = True
        first, last = self.rows.groups[i], self.rows.groups[i + 1]
        for slot, row in enumerate(range(first, last)):
            tokens = self.rows.tokens[row]
            out["tokens"][slot, : len(tokens)] = tokens
            out["token_mask"][slot, : len(tokens)] = True
            out["ranks"][slot] = self.rows.ranks[row]
            out["mask"][slot] = True
        return out


class PromptItems:
    """Random access to prompts, left-padded to `length`."""

    def __init__(self, rows: Ragged, keep: np.ndarray, length: int, pad_id: int):
        self.rows, self.keep, self.length, self.pad_id = rows, keep, length, pad_id

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, i) -> dict[str, np.ndarray]:
        tokens = np.full(self.length, self.pad_id, np.int32)
        mask = np.zeros(self.length, bool)
        row = self.rows[self.keep[i]]
        tokens[self.length - len(row) :] = row
        mask[self.length - len(row) :] = True
        return {"tokens": tokens, "mask": mask, "uid": np.asarray(self.keep[i], np.int32)}


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as [B, longest] tokens and mask, padding on the left."""
    length = max(len(row) for row in rows)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return tokens, mask


def right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as [B, longest] tokens and mask, padding on the right."""
    tokens, mask = left_padded([list(reversed(row)) for row in rows], pad_id)
    return tokens[:, ::-1].copy(), mask[:, ::-1].copy()
