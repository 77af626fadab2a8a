"""Numbers of prompts: the row that each place of a stage's order has in its source, on any mesh."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Listed(NamedTuple):
    """One source of a stage: its name, how many rows it has, and which of them are read, in their order."""

    name: str
    count: int
    kept: np.ndarray | range


class Origins:
    """Beside the prompts of one source: its number, and the row that each of them has in it."""

    def __init__(self, number: int, keep: np.ndarray | range):
        self._number, self._keep = number, keep

    def __len__(self) -> int:
        return len(self._keep)

    def __getitem__(self, i: Any) -> dict[str, np.ndarray]:
        return {"source": np.asarray(self._number), "row": np.asarray(self._keep[i])}


def numbers_of(origins: Any, listed: Sequence[Listed], first: int, count: int) -> np.ndarray:
    """The rows at so many places from `first` on, counted from 0 through all the sources, one after the other."""
    before = np.cumsum([0, *(source.count for source in listed)])
    found = (origins[place] for place in range(first, first + count))
    return np.asarray([before[int(at["source"])] + int(at["row"]) for at in found], np.int64)
