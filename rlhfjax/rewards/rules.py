"""Rewards that follow from the response and its record alone, each a pure function. The higher, the better."""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from rlhfjax.rewards.example import Example
from rlhfjax.rewards.last_number import last_number, number_of

Rule = Callable[[Example], float]


class Unscored(Exception):
    """An example that a rule finds no number for; its text says why."""


def length_target(tokens: int, target: int) -> float:
    """-|n - target| / target: 0 at the target, -1 for no token or twice as many; n and target in tokens."""
    return -abs(tokens - target) / target


def soft_overlong(tokens: int, limit: int, buffer: int) -> float:
    """The soft overlong punishment of a response of n tokens (Yu et al. 2025, DAPO, eq. 13).

    0 for n <= limit - buffer, then (limit - buffer - n) / buffer, and -1 for n > limit.
    """
    return float(-min(max(tokens - (limit - buffer), 0) / buffer, 1.0))


def repetition(tokens: Sequence[int], ngram: int) -> float:
    """-(1 - different n-grams / n-grams): 0 when none comes twice, towards -1 when all are one; 0 without any."""
    count = len(tokens) - ngram + 1
    if count < 1:
        return 0.0
    different = {tuple(tokens[start : start + ngram]) for start in range(count)}
    return -(1.0 - len(different) / count)


def plainly(text: str) -> str:
    """A text in lower case, each stretch of white space as one space, none at its ends."""
    return " ".join(text.casefold().split())


def exact_match(response: str, answers: Sequence[str], after: str | None = None, strict: bool = False) -> float:
    """1 when the response is one of the answers, else 0; `strict` compares letters and spaces as they are.

    Of a text with `after` in it only what follows the last one counts; a response without it is no answer.
    """
    said = _following(response, after)
    if said is None:
        return 0.0
    form = str if strict else plainly
    return float(form(said) in {form(_after(answer, after)) for answer in answers})


def numeric_match(
    response: str, answers: Sequence[Fraction], after: str | None = None, tolerance: Fraction = Fraction(0)
) -> float:
    """1 when the last number of the response is one of the answers within `tolerance`, else 0.

    With `after` it is the last number of what follows the last such text; a response without it has no answer.
    """
    said = _following(response, after)
    number = None if said is None else last_number(said)
    return float(number is not None and any(abs(number - answer) <= tolerance for answer in answers))


def forbidden(response: str, words: re.Pattern[str]) -> float:
    """-1 when one of the words is in the response, else 0."""
    return -1.0 if words.search(response) else 0.0


def whole_words(words: Sequence[str]) -> re.Pattern[str]:
    """Any of the words or phrases, in any case, where no letter, digit or _ goes on before or after it."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


def _following(text: str, mark: str | None) -> str | None:
    """What follows the last mark; the whole text where none is asked for, None where it is not there."""
    if mark is None:
        return text
    return text.rpartition(mark)[2] if mark in text else None


def _after(text: str, mark: str | None) -> str:
    return text.rpartition(mark)[2] if mark else text


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """A field of a record; `a.b` is field b of the object in a, unless there is a field of that whole name.

    Raises Unscored that names the fields there are.
    """
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(sorted(map(str, value))) if isinstance(value, Mapping) else type(value).__name__
            raise Unscored(f"expected the field {name} in the record of its prompt, got {there or 'none'}")
        value = value[part]
    return value


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _exact(example: Example, field: str, after: str | None, strict: bool) -> float:
    answers = _each(field_of(example.record, field))
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
        raise Unscored(f"expected text, a number or a list of them in the field {field}, got none")
    return exact_match(example.response, [str(answer) for answer in answers], after, strict)


def _numeric(example: Example, field: str, after: str | None, tolerance: Fraction) -> float:
    numbers = [number_of(answer) for answer in _each(field_of(example.record, field))]
    if not numbers or None in numbers:
        raise Unscored(f"expected a number, text with one, or a list of them in the field {field}, got none")
    return numeric_match(example.response, [number for number in numbers if number is not None], after, tolerance)


def rule_of(kind: str, settings: Any) -> Rule:
    """The rule of a kind, with the settings of its section in the configuration."""
    match kind:
        case "length" if settings.target is not None:
            return lambda example: length_target(len(example.response_ids), settings.target)
        case "length":
            return lambda example: soft_overlong(len(example.response_ids), settings.limit, settings.buffer)
        case "repetition":
            return lambda example: repetition(example.response_ids, settings.ngram)
        case "exact_match":
            return partial(_exact, field=settings.field, after=settings.after, strict=settings.strict)
        case "numeric_match":
            tolerance = Fraction(str(settings.tolerance))
            return partial(_numeric, field=settings.field, after=settings.after, tolerance=tolerance)
        case _:
            words = whole_words(settings.words)
            return lambda example: forbidden(example.response, words)
