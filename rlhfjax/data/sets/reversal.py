"""Strings of letters and the same strings backwards: data for a model that reads a whole prompt before it writes.

Letters are separated by spaces, so that a SentencePiece tokenizer has one token for each. All strings are different,
so that none of the held-out ones is among those that are trained on.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rlhfjax.data.sets.benchmark import Benchmark, Tables, configs_of
from rlhfjax.fetch import PinnedFile

KINDS = {"pairs": "demonstration", "prompts": "prompt", "text": "document"}
SIZES = {"train": 20_000, "test": 1_000}
LENGTHS = (4, 8)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Reversal(Benchmark):
    """TFDS builder `reversal`: `pairs` to train and measure on, their `prompts`, and `text` for a tokenizer."""

    name = "reversal"
    KINDS: ClassVar = KINDS
    BUILDER_CONFIGS: ClassVar = configs_of(KINDS)

    @classmethod
    def sources(cls) -> tuple[PinnedFile, ...]:
        """Nothing: the strings are drawn."""
        return ()

    @classmethod
    def compute(cls, *paths: Path) -> Tables:
        """Every config's splits."""
        drawn = strings(sum(SIZES.values()), *LENGTHS)
        splits = {"train": drawn[: SIZES["train"]], "test": drawn[SIZES["train"] :]}
        return {
            "pairs": {split: partial(_pairs, rows) for split, rows in splits.items()},
            "prompts": {split: partial(_prompts, rows) for split, rows in splits.items()},
            "text": {split: partial(_text, rows) for split, rows in splits.items()},
        }


def strings(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """`count` different strings of lower-case letters, every length equally often."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        found["".join(draw.choices(LETTERS, k=draw.randint(shortest, longest)))] = None
    return list(found)


def _spaced(letters: str) -> str:
    return "".join(f" {letter}" for letter in letters)


def _pairs(rows: list[str]) -> Iterator[dict[str, Any]]:
    return ({"prompt": _spaced(row), "completion": _spaced(row[::-1])} for row in rows)


def _prompts(rows: list[str]) -> Iterator[dict[str, Any]]:
    return ({"prompt": _spaced(row)} for row in rows)


def _text(rows: list[str]) -> Iterator[dict[str, Any]]:
    return ({"text": _spaced(row)} for row in rows)
