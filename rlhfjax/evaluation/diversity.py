"""Diversity of responses, which falls when a policy collapses onto a stock phrase while its score still rises."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from rlhfjax.errors import DataError


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of all responses, in [0, 1]; 0 when no response has n tokens.

    `|set of n-grams| / number of n-grams`. It falls as the number of responses grows, so compare equal numbers. Items
    are tokens or words, not characters of a string. Raises DataError for n < 1 or a response that is a string.
    Source: Li et al. 2016, section 5 (there over the number of tokens).
    """
    grams = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_without_each(
    responses: Sequence[Sequence[Hashable]], n: int, groups: Sequence[Hashable] | None = None
) -> list[float]:
    """`distinct_n` without each group of responses (without each response, where there are no groups) in turn."""
    names = range(len(responses)) if groups is None else groups
    by_group: dict[Hashable, Counter[tuple[Hashable, ...]]] = {}
    for name, response in zip(names, responses, strict=True):
        by_group.setdefault(name, Counter()).update(_ngrams(response, n))
    total = sum(by_group.values(), Counter())
    found = []
    for own in by_group.values():
        left = total.total() - own.total()
        gone = sum(count == total[gram] for gram, count in own.items())
        found.append((len(total) - gone) / left if left else 0.0)
    return found


def repetition_counts(responses: Sequence[Sequence[Hashable]], n: int = 3) -> tuple[list[int], list[int]]:
    """Of each response the n-grams that already occurred earlier in it, and all its n-grams."""
    grams = [list(_ngrams(response, n)) for response in responses]
    return [len(found) - len(set(found)) for found in grams], [len(found) for found in grams]


def repetition_rate(responses: Sequence[Sequence[Hashable]], n: int = 3) -> float:
    """The share of n-grams that already occurred earlier in their own response, in [0, 1].

    `1 − Σ_r |set of n-grams of r| / Σ_r number of n-grams of r`: near 0 for text of people, near 1 for a loop.
    Raises DataError as `distinct_n` does. Source: Welleck et al. 2020, seq-rep-n (there a mean over responses).
    """
    repeated, total = repetition_counts(responses, n)
    return sum(repeated) / sum(total) if sum(total) else 0.0


def mean_length(responses: Sequence[Sequence[Hashable]]) -> float:
    """The mean number of items (tokens, words) of a response. Raises DataError without responses."""
    if not responses:
        raise DataError("expected at least one response to measure, got none")
    return float(np.mean([len(response) for response in responses]))


def _ngrams(response: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise DataError(f"expected n-grams of at least 1 item, got n = {n}")
    if isinstance(response, str):
        raise DataError("expected a response as a list of tokens or words, got a string; use text.split() for words")
    return (tuple(response[i : i + n]) for i in range(len(response) - n + 1))
