"""Sums of two numbers from 0 to 99, written out in digits: data for a policy that a rule can grade.

No pair of numbers is in two splits, in neither order, so that what is measured on held-out sums is no memory.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rlhfjax.data.sets.benchmark import Benchmark, Tables, configs_of
from rlhfjax.fetch import PinnedFile

KINDS = {"text": "document", "demonstrations": "demonstration", "prompts": "prompt"}
SIZES = {"train": 4_050, "validation": 500, "test": 500}  # together all there are
LARGEST = 99
SUMS_PER_DOCUMENT = 8

Pair = tuple[int, int]


class Arithmetic(Benchmark):
    """TFDS builder `arithmetic`: `text` full of sums, `demonstrations`, and `prompts` whose `answer` a reward reads."""

    name = "arithmetic"
    KINDS: ClassVar = KINDS
    BUILDER_CONFIGS: ClassVar = configs_of(KINDS)

    @classmethod
    def sources(cls) -> tuple[PinnedFile, ...]:
        """Nothing: the numbers are drawn."""
        return ()

    @classmethod
    def compute(cls, *paths: Path) -> Tables:
        """Every config's splits."""
        drawn, splits = iter(pairs(LARGEST)), {}
        for split, size in SIZES.items():
            splits[split] = [next(drawn) for _ in range(size)]
        return {
            "text": {split: partial(_text, rows) for split, rows in splits.items()},
            "demonstrations": {split: partial(_demonstrations, rows) for split, rows in splits.items()},
            "prompts": {split: partial(_prompts, rows) for split, rows in splits.items()},
        }


def pairs(largest: int, seed: int = 0) -> list[Pair]:
    """All pairs of numbers from 0 to `largest`, shuffled, each in one of its two orders."""
    draw = random.Random(seed)
    found = [(low, high) for high in range(largest + 1) for low in range(high + 1)]
    draw.shuffle(found)
    return [(low, high) if draw.random() < 0.5 else (high, low) for low, high in found]


def _asked(pair: Pair) -> str:
    return f"{pair[0]}+{pair[1]}="


def _text(rows: list[Pair]) -> Iterator[dict[str, Any]]:
    sums = [f"{_asked(pair)}{sum(pair)}" for pair in rows]
    return (
        {"text": ", ".join(sums[start : start + SUMS_PER_DOCUMENT])} for start in range(0, len(sums), SUMS_PER_DOCUMENT)
    )


def _demonstrations(rows: list[Pair]) -> Iterator[dict[str, Any]]:
    return ({"prompt": _asked(pair), "completion": str(sum(pair))} for pair in rows)


def _prompts(rows: list[Pair]) -> Iterator[dict[str, Any]]:
    return ({"prompt": _asked(pair), "extra": {"answer": str(sum(pair))}} for pair in rows)
