"""Records to token rows. A response is tokenised as what goes on after its prompt; no text is tokenised twice.

A conversation that cannot be written as its chat template writes it stops the run, or is left out and counted. Its row
is empty then, so that row numbers stay those of the source; no batch gets an empty row.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhfjax.errors import DataError
from rlhfjax.text.chat import (
    Known,
    Untrained,
    beginning,
    encode_all_turns,
    encode_demonstration,
    encode_prompt,
    encode_responses,
    encode_texts,
)
from rlhfjax.text.loading import AnyTokenizer

Ranked = tuple[tuple[int, ...], list[tuple[int, ...]], list[int]]
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


def _records(source, begin: Callable[[list[dict]], None]) -> Iterable[dict]:
    for start in range(0, len(source), CHUNK):
        records = source.__getitems__(range(start, min(start + CHUNK, len(source))))
        begin(records)
        yield from records


def document_rows(source, tokenizer: AnyTokenizer, length: int) -> TokenRows:
    """BOS + text + EOS of every document, cut into windows of at most `length` tokens; every token is a target."""
    chunks = (range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK))
    each = (windows([record["text"] for record in source.__getitems__(chunk)], tokenizer, length) for chunk in chunks)
    tokens = Ragged.of(itertools.chain.from_iterable(each))
    return TokenRows(tokens, Ragged(np.ones(len(tokens.values), bool), tokens.offsets))


def windows(texts: Sequence[str], tokenizer: AnyTokenizer, length: int) -> Iterator[np.ndarray]:
    """BOS + text + EOS of each text, cut into windows of at most `length` tokens."""
    for ids in tokenizer.encode_batch(texts):
        row = np.asarray([*beginning(tokenizer), *ids, tokenizer.eos_id], np.int32)
        # A window overlaps its predecessor by one token, so that every token but the first is predicted once.
        yield from (row[i : i + length] for i in range(0, max(len(row) - 1, 1), length - 1))


@dataclass(frozen=True)
class Rules:
    """Whose rows these are, what is done with those that cannot be written (`error` or `drop`), and where that is told.

    `train_on` says which answers of a conversation are trained: the last one, or all.
    """

    what: str
    refused: str = "error"
    report: Callable[[str], None] = lambda text: None
    train_on: str = "last"


def _written(
    source, rules: Rules, write: Callable[[dict], Any], empty: Any, begin: Callable[[list[dict]], None] = lambda _: None
) -> Iterator[Any]:
    """What `write` makes of each record, `empty` of one that is left out; `begin` gets them first, some at a time.

    Raises DataError on the first record that cannot be written, with the count of them all, where that is an error, and
    when none can.
    """
    refused, untrained, first = 0, 0, ""
    for row, record in enumerate(_records(source, begin)):
        try:
            made = write(record)
        except Untrained:
            untrained, made = untrained + 1, empty
        except DataError as error:
            first = first or f"{rules.what} row {row}: {error}"
            refused, made = refused + 1, empty
        yield made
    if refused and (rules.refused == "error" or refused == len(source)):
        raise DataError(
            f"{first} ({refused} of {len(source)} rows cannot be written; to leave them out set refused: drop in the "
            "batch)"
        )
    if refused:
        rules.report(f"{rules.what}: {refused} of {len(source)} rows that cannot be written left out; {first}")
    if untrained == len(source):
        raise DataError(f"{rules.what}: expected answers to train on, got weight 0 for all in {untrained} rows")
    if untrained:
        rules.report(f"{rules.what}: {untrained} of {len(source)} conversations with weight 0 alone left out")


def demonstration_rows(source, tokenizer: AnyTokenizer, rules: Rules) -> TokenRows:
    """Prompt and completion of every demonstration; targets are the completion (or all answers) and its EOS."""
    made = list(_written(source, rules, lambda record: demonstration(record, tokenizer, rules.train_on), ([], [])))
    return TokenRows(Ragged.of(ids for ids, _ in made), Ragged.of((mask for _, mask in made), bool))


def demonstration(record: dict, tokenizer: AnyTokenizer, train_on: str) -> tuple[list[int], list[bool]]:
    """Ids of a demonstration and whether each is a target: the last answer, or all. Raises DataError and Untrained."""
    if train_on == "all" and "messages" in record:
        return encode_all_turns(tokenizer, record)
    prompt, response = encode_demonstration(tokenizer, record)
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def prompt_rows(source, tokenizer: AnyTokenizer, rules: Rules) -> Ragged:
    """Every prompt up to where the response begins."""
    return Ragged.of(_written(source, rules, lambda record: encode_prompt(tokenizer, record), []))


def comparisons(source, tokenizer: AnyTokenizer, rules: Rules, empty: bool = False) -> Iterator[Ranked]:
    """Prompt ids, the ids of each response, and the ranks, of every comparison that can be written.

    With `empty` one that cannot has neither, in its place.
    """
    known: Known = {}  # many labelers rank the same texts: each is tokenised once

    def begin(records: list[dict]) -> None:
        known.clear()
        known.update(encode_texts(tokenizer, records))

    def write(record: dict) -> Ranked:
        prompt, responses = encode_responses(tokenizer, record, record["responses"], known)
        return tuple(prompt), [tuple(response) for response in responses], record["ranks"]

    made = _written(source, rules, write, ((), [(), ()], [1, 1]), begin)
    yield from (each for each in made if empty or each[0])


def ranked_rows(source, tokenizer: AnyTokenizer, rules: Rules) -> RankedRows:
    """Every candidate of every comparison as prompt + response + EOS.

    Responses with equal ids are one: where a comparison ranks them differently each gets the mean of their ranks, so
    that no pair of equals is a preference.
    """
    rows, groups, ranks, lengths, equal = [], [0], [], [], 0
    for prompt, responses, given in comparisons(source, tokenizer, rules, empty=True):
        one = ranks_of_equals(responses, given)
        equal += one != given
        rows.extend([*prompt, *response] for response in responses)
        ranks.extend(one)
        groups.append(len(rows))
        lengths.append(len(prompt))
    if equal:
        rules.report(f"{rules.what}: {equal} of {len(source)} comparisons rank equal responses apart; taken as ties")
    return RankedRows(Ragged.of(rows), np.asarray(groups), np.asarray(ranks, np.int32), np.asarray(lengths, np.int32))


def ranks_of_equals(responses: Sequence[Sequence[int]], ranks: Sequence[int]) -> list[int]:
    """The ranks, or where equal responses have several: ranks by the mean of those of each response, 1 the best."""
    given: dict[tuple[int, ...], list[int]] = {}
    for response, rank in zip(responses, ranks, strict=True):
        given.setdefault(tuple(response), []).append(rank)
    if all(len(set(same)) == 1 for same in given.values()):
        return list(ranks)
    means = {response: sum(same) / len(same) for response, same in given.items()}
    order = sorted(set(means.values()))
    return [order.index(means[tuple(response)]) + 1 for response in responses]


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
