"""Prepared rows as the arrays of a batch, as `rlhfjax.data.batches` makes them of rows in memory."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rlhfjax.data.batches import packed_row, prompt_item, ranked_item
from rlhfjax.data.token_rows import Ranked
from rlhfjax.data.tokens.form import read_comparison, read_prompt, read_record, read_segments
from rlhfjax.data.tokens.opening import TokenShards


class PackedShards:
    """Random access to rows of `length` tokens."""

    def __init__(self, shards: TokenShards, length: int, pad_id: int):
        self.shards, self.length, self.pad_id = shards, length, pad_id

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, lengths, targets = read_segments(self.shards[index], self.shards.ids)
        return packed_row(tokens, lengths, True if targets is None else targets, self.length, self.pad_id)


class RankedShards:
    """Random access to comparisons padded to `candidates` responses of `length` tokens."""

    def __init__(self, shards: TokenShards, candidates: int, length: int, pad_id: int):
        self.shards, self.candidates, self.length, self.pad_id = shards, candidates, length, pad_id
        self.longest: int = shards.facts["counts"]["shared"]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        held = read_comparison(self.shards[index], self.shards.ids)
        rows = [np.concatenate([held.prompt, response]) for response in held.responses]
        return ranked_item(rows, held.ranks, len(held.prompt), self.candidates, self.length, self.pad_id)


class PromptShards:
    """Random access to prompts, left-padded to `length`."""

    def __init__(self, shards: TokenShards, length: int, pad_id: int):
        self.shards, self.length, self.pad_id = shards, length, pad_id
        self.keep = range(len(shards))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return prompt_item(read_prompt(self.shards[index], self.shards.ids), self.length, self.pad_id)


class PromptRecords:
    """The records of prepared prompts."""

    def __init__(self, shards: TokenShards):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Those of several rows."""
        return [read_record(self.shards[row], self.shards.ids) for row in rows]


def demonstrations(shards: TokenShards, rows: Iterable[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and response ids of the demonstrations in these rows; the last answer of each is the response."""
    for row in rows:
        tokens, lengths, targets = read_segments(shards[row], shards.ids)
        assert targets is not None
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            span = slice(int(end - length), int(end))
            begins = int(np.flatnonzero(~targets[span])[-1]) + 1
            ids = tokens[span].tolist()
            yield ids[:begins], ids[begins:]


def comparisons(shards: TokenShards) -> Iterator[Ranked]:
    """Prompt ids, the ids of each response, and ranks as they were given, of every comparison."""
    for row in range(len(shards)):
        held = read_comparison(shards[row], shards.ids)
        responses = [tuple(response.tolist()) for response in held.responses]
        yield tuple(held.prompt.tolist()), responses, held.given.tolist()


def texts_of(shards: TokenShards, row: int) -> list[list[int]]:
    """The sequences of ids in a row: documents, demonstrations, the prompt, or a prompt and its responses."""
    data = shards[row]
    if shards.kind == "prompt":
        return [read_prompt(data, shards.ids).tolist()]
    if shards.kind == "comparison":
        held = read_comparison(data, shards.ids)
        return [each.tolist() for each in (held.prompt, *held.responses)]
    tokens, lengths, _ = read_segments(data, shards.ids)
    return [each.tolist() for each in np.split(tokens, np.cumsum(lengths)[:-1])]
