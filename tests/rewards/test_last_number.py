"""The last number of a text: what people and models write, and the fraction that it means."""

from fractions import Fraction

import pytest

from rlhfjax.rewards.last_number import last_number, number_of

WRITTEN = {
    "He has 5 - 3 = 2 apples left.\n#### 2": 2,
    "1,234.50": Fraction("1234.5"),
    "12,345,678 people": 12_345_678,
    "1, 2, 3": 3,
    "1234,567": 567,
    "The answer is -3.": -3,
    "It is \u22127": -7,
    "So she lost -$5 in all": -5,
    "$ is before $18": 18,
    "5-3": 3,
    "x-3": 3,
    "f(x)-3": 3,
    "(-4)": -4,
    ".5 litres": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "3/4 of it": Fraction(3, 4),
    "-3 / 4": Fraction(-3, 4),
    "72.": 72,
    "50%": 50,
    "2e3": 2000,
    "1.5E-1": Fraction("0.15"),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_the_last_number_is_what_is_written(text):
    assert last_number(text) == WRITTEN[text]


@pytest.mark.parametrize("text", ["", "none", "one", "5/0", "-", "$", ".", "\u0663"])
def test_what_is_no_number_gives_none(text):
    assert last_number(text) is None


def test_numbers_that_would_fill_the_memory_are_not_written_out():
    assert last_number("9e99999999999") == 99_999_999_999  # no exponent: the digits after the letter
    assert last_number("7" * 100_000) is None


def test_numbers_of_records_are_exact():
    assert [number_of(value) for value in (72, 0.1, "#### 1,000", "3/4", -2.5e3)] == [
        72,
        Fraction(1, 10),
        1000,
        Fraction(3, 4),
        -2500,
    ]
    assert [number_of(value) for value in (True, None, [1], {}, float("nan"), float("inf"), "none")] == [None] * 7
