"""Token rows to the arrays of a batch: packed, or padded left and right."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from rlhfjax.data.token_rows import Ragged, RankedRows, TokenRows


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: every row goes to the fullest bin that still has room for it.

    Of equally full bins the last one that became so is taken. A row costs a search among the different spaces left.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # in which there are bins, in order
    for row in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[row])
        place = bisect_left(spaces, need)
        if place == len(spaces):
            index, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[place]
            index = with_space[space].pop()
            if not with_space[space]:
                del spaces[place]
        bins[index].append(row)
        left = space - need
        if 0 <= left < capacity:  # a row longer than a bin gets one of its own, into which nothing else fits
            if not with_space.setdefault(left, []):
                insort(spaces, left)
            with_space[left].append(index)
    return bins


class PackedRows:
    """Random access to rows of exactly `length` tokens, each holding one or several documents as segments 1, 2, …"""

    def __init__(self, rows: TokenRows, length: int, *, packed: bool, pad_id: int):
        self.rows, self.length, self.pad_id = rows, length, pad_id
        lengths = rows.tokens.lengths
        self.bins = pack(lengths, length) if packed else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        each = [self.rows.tokens[row] for row in self.bins[index]]
        targets = np.concatenate([self.rows.targets[row] for row in self.bins[index]])
        lengths = np.asarray([len(tokens) for tokens in each])
        return packed_row(np.concatenate(each), lengths, targets, self.length, self.pad_id)


def packed_row(
    tokens: np.ndarray, lengths: np.ndarray, targets: np.ndarray | bool, length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Segments 1, 2, … of `lengths`, whose tokens follow one another, as a row of `length` tokens."""
    out = {
        "tokens": np.full(length, pad_id, np.int32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "loss_mask": np.zeros(length, bool),
    }
    held = slice(0, len(tokens))
    out["tokens"][held] = tokens
    out["segments"][held] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    out["positions"][held] = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out["loss_mask"][held] = targets
    return out


class RankedItems:
    """Random access to comparisons padded to `candidates` responses of `length` tokens."""

    def __init__(self, rows: RankedRows, candidates: int, length: int, pad_id: int):
        self.rows, self.candidates, self.length, self.pad_id = rows, candidates, length, pad_id
        self.longest = rows.longest

    def __len__(self) -> int:
        return len(self.rows.groups) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first, last = self.rows.groups[index], self.rows.groups[index + 1]
        rows = [self.rows.tokens[row] for row in range(first, last)]
        how = self.candidates, self.length, self.pad_id
        return ranked_item(rows, self.rows.ranks[first:last], self.rows.prompt_lengths[index], *how)


def ranked_item(
    rows: Sequence[np.ndarray], ranks: np.ndarray, prompt_length: int, candidates: int, length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One comparison, each row its prompt and a response, padded to `candidates` of `length` tokens."""
    out = {
        "tokens": np.full((candidates, length), pad_id, np.int32),
        "token_mask": np.zeros((candidates, length), bool),
        "ranks": np.zeros(candidates, np.int32),
        "mask": np.zeros(candidates, bool),
        "prompt_lengths": np.asarray(prompt_length, np.int32),
    }
    # An absent candidate keeps one unmasked token, so that every row has a last token to read a score at.
    out["token_mask"][:, 0] = True
    # Each candidate's row repeats the prompt, though `packed_ranking` reads it once: models that cannot share
    # a prompt take these rows as they are, and rows of one shape need no second program for either.
    for slot, tokens in enumerate(rows):
        out["tokens"][slot, : len(tokens)] = tokens
        out["token_mask"][slot, : len(tokens)] = True
        out["ranks"][slot] = ranks[slot]
        out["mask"][slot] = True
    return out


class PromptItems:
    """Random access to prompts, left-padded to `length`."""

    def __init__(self, rows: Ragged, keep: np.ndarray, length: int, pad_id: int):
        self.rows, self.keep, self.length, self.pad_id = rows, keep, length, pad_id

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return prompt_item(self.rows[self.keep[index]], self.length, self.pad_id)


def prompt_item(row: np.ndarray, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """One prompt, left-padded to `length`."""
    tokens = np.full(length, pad_id, np.int32)
    mask = np.zeros(length, bool)
    tokens[length - len(row) :] = row
    mask[length - len(row) :] = True
    return {"tokens": tokens, "mask": mask}


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
