"""Records of a part to rows of tokens as bytes, every one checked, and the count of what was met and left out."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np

from rlhfjax.data import token_rows
from rlhfjax.data.batches import pack
from rlhfjax.data.records import Record
from rlhfjax.data.token_rows import CHUNK, Ragged
from rlhfjax.data.tokens.form import Comparison, Segments, comparison_bytes, prompt_bytes, segments_bytes
from rlhfjax.data.tokens.plan import Rows
from rlhfjax.errors import DataError
from rlhfjax.text.chat import Untrained, encode_prompt, encode_responses, encode_texts
from rlhfjax.text.loading import AnyTokenizer

Placed = tuple[str, Record]  # file:line, and the record there
_MOST = {"how": "most"}


@dataclass
class Counts:
    """What a part held. `longest` is tokens of a row by itself, `shared` of a comparison whose prompt counts once."""

    records: int = 0
    messages: int = 0
    rows: int = 0
    tokens: int = 0
    overlong: int = 0
    refused: int = 0
    untrained: int = 0
    equal: int = 0
    undecided: int = 0
    longest: int = field(default=0, metadata=_MOST)
    shared: int = field(default=0, metadata=_MOST)
    candidates: int = field(default=0, metadata=_MOST)

    def __add__(self, other: "Counts") -> "Counts":
        one, two = asdict(self), asdict(other)
        most = {each.name for each in fields(self) if each.metadata}
        return Counts(**{name: max(one[name], two[name]) if name in most else one[name] + two[name] for name in one})


@dataclass(frozen=True)
class Maker:
    """Makes rows; `ids` is the type of an id, `counts` goes along."""

    rows: Rows
    tokenizer: AnyTokenizer
    ids: str
    counts: Counts

    def made(self, placed: Iterable[Placed]) -> Iterator[bytes]:
        """The rows of these records. Raises DataError, with the place, for one that may not be left out."""
        make: Mapping[str, Callable[[Iterator[list[Placed]]], Iterator[bytes]]] = {
            "document": self._documents,
            "demonstration": self._demonstrations,
            "comparison": self._comparisons,
            "prompt": self._prompts,
        }
        yield from make[self.rows.kind](self._chunks(iter(placed)))

    def _chunks(self, placed: Iterator[Placed]) -> Iterator[list[Placed]]:
        while chunk := list(itertools.islice(placed, CHUNK)):
            self.counts.records += len(chunk)
            self.counts.messages += sum("messages" in record for _, record in chunk)
            yield chunk

    def _documents(self, chunks: Iterator[list[Placed]]) -> Iterator[bytes]:
        texts = ([record["text"] for _, record in chunk] for chunk in chunks)
        each = (token_rows.windows(some, self.tokenizer, self.rows.length) for some in texts)
        yield from self._packed(Ragged.of(itertools.chain.from_iterable(each)), None)

    def _demonstrations(self, chunks: Iterator[list[Placed]]) -> Iterator[bytes]:
        write = partial(token_rows.demonstration, tokenizer=self.tokenizer, train_on=self.rows.train_on)
        made = []
        for where, record in itertools.chain.from_iterable(chunks):
            row = self._written(where, record, write)
            if row and self._fits(where, len(row[0])):
                made.append((np.asarray(row[0], np.int32), np.asarray(row[1], bool)))
        tokens, targets = (Ragged.of([row[i] for row in made], kind) for i, kind in enumerate((np.int32, bool)))
        yield from self._packed(tokens, targets)

    def _packed(self, tokens: Ragged, targets: Ragged | None) -> Iterator[bytes]:
        if not len(tokens):
            return
        bins = pack(tokens.lengths, self.rows.length) if self.rows.packed else [[row] for row in range(len(tokens))]
        order = np.fromiter(itertools.chain.from_iterable(bins), np.int64, len(tokens))
        tokens, targets = _in_order(tokens, order), targets and _in_order(targets, order)
        lengths = tokens.lengths
        self.counts.longest = max(self.counts.longest, int(lengths.max()))
        self.counts.tokens += len(tokens.values)
        first = 0
        for held in map(len, bins):
            span = slice(tokens.offsets[first], tokens.offsets[first + held])
            mask = None if targets is None else targets.values[span]
            self.counts.rows += 1
            yield segments_bytes(Segments(tokens.values[span], lengths[first : first + held], mask), self.ids)
            first += held

    def _comparisons(self, chunks: Iterator[list[Placed]]) -> Iterator[bytes]:
        for chunk in chunks:
            known = encode_texts(self.tokenizer, [record for _, record in chunk])

            def write(record: Record, known: Any = known) -> tuple[list[int], list[list[int]]]:
                return encode_responses(self.tokenizer, record, record["responses"], known)

            for where, record in chunk:
                if row := self._written(where, record, write):
                    prompt, responses = row
                    yield from self._comparison(where, prompt, responses, record["ranks"])

    def _comparison(
        self, where: str, prompt: list[int], responses: list[list[int]], given: list[int]
    ) -> Iterator[bytes]:
        """A comparison of those responses that are short enough, if two of them have different ranks."""
        ranks = token_rows.ranks_of_equals(responses, given)
        self.counts.equal += ranks != given
        kept = [i for i, response in enumerate(responses) if self._fits(where, len(prompt) + len(response))]
        if len({ranks[i] for i in kept}) < 2:
            self.counts.undecided += 1
            return
        lengths = [len(prompt) + len(responses[i]) for i in kept]
        shared = sum(lengths) - max(len(prompt) - 1, 0) * (len(kept) - 1)
        more = Counts(rows=1, tokens=shared, longest=max(lengths), shared=shared, candidates=len(kept))
        _add(self.counts, more)
        row = [np.asarray(responses[i], np.int32) for i in kept]
        held = Comparison(np.asarray(prompt, np.int32), row, np.asarray(ranks)[kept], np.asarray(given)[kept])
        yield comparison_bytes(held, self.ids)

    def _prompts(self, chunks: Iterator[list[Placed]]) -> Iterator[bytes]:
        write = partial(encode_prompt, self.tokenizer)
        for where, record in itertools.chain.from_iterable(chunks):
            row = self._written(where, record, write)
            if row and self._fits(where, len(row)):
                _add(self.counts, Counts(rows=1, tokens=len(row), longest=len(row)))
                yield prompt_bytes(row, record, self.ids)

    def _written(self, where: str, record: Record, write: Callable[[Record], Any]) -> Any:
        """What `write` makes of a record; None of one that is left out."""
        try:
            return write(record)
        except Untrained:
            self.counts.untrained += 1
        except DataError as error:
            if self.rows.refused == "error":
                raise DataError(f"{where}: {error}; --refused drop leaves such records out") from error
            self.counts.refused += 1
        return None

    def _fits(self, where: str, length: int) -> bool:
        limit, option = self.rows.length, "--pack" if self.rows.packed else "--length"
        if length <= limit:
            return True
        if self.rows.overlong == "error":
            raise DataError(
                f"{where}: expected at most {limit} tokens, got {length}; raise {option}, or --overlong drop leaves "
                "such rows out"
            )
        self.counts.overlong += 1
        return False


def _add(counts: Counts, more: Counts) -> None:
    for name, value in asdict(counts + more).items():
        setattr(counts, name, value)


def _in_order(rows: Ragged, order: np.ndarray) -> Ragged:
    """Rows one after the other in another order."""
    lengths = rows.lengths[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.arange(offsets[-1]) + np.repeat(rows.offsets[:-1][order] - offsets[:-1], lengths)
    return Ragged(rows.values[places], offsets)
