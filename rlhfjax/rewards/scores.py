"""Scores of a batch: a number for each response and reward, their weighted sum, and the failures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scores:
    """Rewards of the responses of a batch, in their order.

    values: by the name of each reward its numbers, [B] float32; NaN where there is none
    total: the sum of weight x value over the rewards, [B] float32; NaN in all of them where the update is to be skipped
    failures: what failed, a line for each reward that failed
    failed: rewards of single responses that failed
    """

    values: Mapping[str, np.ndarray]
    total: np.ndarray
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    skip: bool = False

    def metrics(self) -> dict[str, float]:
        """Of each reward the mean and the (population) standard deviation over the responses that have it."""
        named = {"objective/reward_failures": float(self.failed)}
        for name, values in self.values.items():
            there = values[np.isfinite(values)].astype(np.float64)
            named[f"objective/reward/{name}"] = float(there.mean()) if len(there) else float("nan")
            named[f"objective/reward_std/{name}"] = float(there.std()) if len(there) else float("nan")
        return named


def numbers_of(answers: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[np.ndarray, str]:
    """The numbers [B] that the calls of one reward gave, NaN where it gave none, and what was wrong first, if anything.

    Each call has so many examples and an answer: `values`, one for each, or `error`.
    """
    numbers: list[Any] = []
    for count, answer in answers:
        given = answer.get("values", [])
        error = answer.get("error", "")
        if not error and len(given) != count:
            error = f"expected {count} numbers, one for each example, got {len(given)}{answer.get('said', '')}"
        numbers += [error or value for value in ([None] * count if error else given)]
    values = np.asarray([np.nan if isinstance(number, str) else number for number in numbers], np.float64)
    with np.errstate(over="ignore"):  # what float32 has no number for is none
        single = values.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(single))
    if not len(wrong):
        return single, ""
    first = numbers[wrong[0]]
    problem = first if isinstance(first, str) else f"expected a finite number, got {first:g}"
    some = f"{len(wrong)} of {len(single)} responses, the first is number {wrong[0] + 1}"
    counted = f" ({some if len(wrong) < len(single) else f'all {len(single)} responses'})"
    return np.where(np.isfinite(single), single, np.float32(np.nan)), problem + counted
