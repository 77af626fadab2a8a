"""Sums of two numbers from 10 to 99, most answered at once and some worked out: data for a policy and a rule.

No pair of numbers is in two splits, in neither order, so that what is measured on held-out sums is no memory.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax.data.sets.benchmark import Benchmark, Tables, configs_of
from rlhfjax.fetch import PinnedFile

KINDS = {"text": "document", "demonstrations": "demonstration", "prompts": "prompt"}
SIZES = {"train": 3_095, "validation": 500, "test": 500}
NUMBERS = range(10, 100)
SUMS_PER_DOCUMENT = 4
WORKED_OUT = 0.25  # the share of the demonstrations whose answer comes after its steps; in text all do

Pair = tuple[int, int]


class Arithmetic(Benchmark):
    """TFDS builder `arithmetic`: `text` full of sums, `demonstrations`, and `prompts` whose `answer` a reward reads."""

    name = "arithmetic"
    VERSION: ClassVar = tfds.core.Version("1.1.0")
    KINDS: ClassVar = KINDS
    BUILDER_CONFIGS: ClassVar = configs_of(KINDS)

    @classmethod
    def sources(cls) -> tuple[PinnedFile, ...]:
        """Nothing: the numbers are drawn."""
        return ()

    @classmethod
    def compute(cls, *paths: Path) -> Tables:
        """Every config's splits."""
        drawn, splits = iter(pairs()), {}
        for split, size in SIZES.items():
            splits[split] = [next(drawn) for _ in range(size)]
        return {
            "text": {split: partial(_text, rows) for split, rows in splits.items()},
            "demonstrations": {split: partial(_demonstrations, rows) for split, rows in splits.items()},
            "prompts": {split: partial(_prompts, rows) for split, rows in splits.items()},
        }


def pairs(seed: int = 0) -> list[Pair]:
    """All pairs of the numbers, shuffled, each in one of its orders."""
    draw, found = random.Random(seed), list(combinations_with_replacement(NUMBERS, 2))
    draw.shuffle(found)
    return [(low, high) if draw.random() < 0.5 else (high, low) for low, high in found]


def worked_out(pair: Pair) -> str:
    """The answer after its steps in parentheses, column by column from the right: `(7+5=12,4+8+1=13)132`."""
    steps, carry = [], 0
    for column in (1, 10):
        digits = [number // column % 10 for number in pair] + [1] * carry
        steps.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    return f"({','.join(steps)}){sum(pair)}"


def _asked(pair: Pair) -> str:
    return f"{pair[0]}+{pair[1]}="


def _answered(rows: list[Pair]) -> list[str]:
    """The answer to each as somebody gave it, at once or worked out; the same in every kind of a split."""
    draw = random.Random(len(rows))
    return [worked_out(pair) if draw.random() < WORKED_OUT else str(sum(pair)) for pair in rows]


def _text(rows: list[Pair]) -> Iterator[dict[str, Any]]:
    sums = [f"{_asked(pair)}{worked_out(pair)}" for pair in rows]
    return (
        {"text": " ".join(sums[start : start + SUMS_PER_DOCUMENT])} for start in range(0, len(sums), SUMS_PER_DOCUMENT)
    )


def _demonstrations(rows: list[Pair]) -> Iterator[dict[str, Any]]:
    return ({"prompt": _asked(pair), "completion": answer} for pair, answer in zip(rows, _answered(rows), strict=True))


def _prompts(rows: list[Pair]) -> Iterator[dict[str, Any]]:
    return ({"prompt": _asked(pair), "extra": {"answer": str(sum(pair))}} for pair in rows)
