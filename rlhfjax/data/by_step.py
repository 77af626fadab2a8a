"""Batches by step: batch i is a function of the order and i, whoever makes it and wherever it starts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from rlhfjax import faults
from rlhfjax.data.numbering import Listed, numbers_of


@dataclass(frozen=True)
class Batches:
    """Infinite batches of `size` rows by step, of which `local` are made here (None: all).

    `dataset` gives rows by their place in the order; `rows` is how many one epoch has. Of comparisons none is longer
    than `longest` tokens in a packed row, its prompt counted once. `listed` are the sources whose rows have numbers,
    and `origins` has the place of each row in one of them.
    """

    dataset: Any
    make: Callable[..., Any]
    rows: int
    size: int
    local: Any = None
    longest: int = 0
    listed: Sequence[Listed] = ()
    origins: Any = None

    def numbers(self, first: int, count: int) -> np.ndarray:
        """The rows at so many places of the order from `first` on, counted through the sources that are `listed`."""
        return numbers_of(self.origins, self.listed, first, count)

    def __getitem__(self, step: int) -> Any:
        return self.make(**_Steps(self.dataset, self.size, self.local)[step])

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, rounded up."""
        return max(int(np.ceil(epochs * self.rows / self.size)), 1)

    def once(self) -> Iterator[tuple[Any, int]]:
        """Every row once: batches with the number of rows that count (the last batch is filled up with others)."""
        for step in range(self.steps(1)):
            yield self[step], min(self.size, self.rows - step * self.size)

    def iterate(self, start: int) -> Iterator[Any]:
        """Batches from `start` on, read ahead by threads."""
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        steps = grain.MapDataset.source(_Steps(self.dataset, self.size, self.local))
        for item in steps[start:].to_iter_dataset(read):
            yield self.make(**item)


@dataclass(frozen=True)
class PromptBatches(Batches):
    """Batches of prompts whose records can be had, from the `sources` that are `listed`."""

    sources: Sequence[Any] = ()

    def records(self, step: int) -> list[dict[str, Any]]:
        """The records of a batch's prompts, row by row as `self[step]` has them: all fields, as their files name them.

        What no model reads is among them, such as an answer. They are read anew from the prepared data.
        """
        places = _Steps(self.origins, self.size, self.local)[step]
        found: list[dict[str, Any]] = [{}] * len(places["row"])
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(places["source"] == number)
            for row, record in zip(rows, source.__getitems__(places["row"][rows].tolist()), strict=True):
                found[row] = record.get("extra", {}) | {name: record[name] for name in record if name != "extra"}
        return found


class _Steps:
    """What a batch is made of, by step: its rows stacked, or those of them that this process wants."""

    def __init__(self, dataset: Any, size: int, local: Any):
        self._dataset, self._size = dataset, size
        self._rows = range(size) if local is None else [int(row) for row in local]

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        faults.reach("data", index)
        rows = [self._dataset[index * self._size + row] for row in self._rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Placed:
    """Prompts with their place in the order as `uid`.

    A row number would come again: in the next epoch, which may begin inside a batch, and in another source.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        return self._dataset[place] | {"uid": np.asarray(place % 2**31, np.int32)}
