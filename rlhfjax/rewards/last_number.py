"""The last number of a text, as a fraction: nothing is rounded before it is compared."""

import re
from fractions import Fraction

# A minus sign after a word or a bracket is an operation (5-3, x-3, f(x)-3). An exponent has at most three digits, or
# writing the number out would fill the memory.
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]])[-+\u2212])? [$\u20ac\u00a3]?
    (?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)
    (?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?
    (?:\s?/\s?(?P<below>[0-9]+)(?![.,/]?[0-9]))?
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Fraction | None:
    """The last number: 1,234.5 (= 1234.5), -3, $7, .5, 2e3 or 3/4; None where there is none, or it divides by 0."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    try:
        number = Fraction(found["digits"].replace(",", "") + (found["exponent"] or "")) / int(found["below"] or 1)
    except (ValueError, ZeroDivisionError):  # of thousands of digits, which Python does not read
        return None
    return -number if found["sign"] in ("-", "\u2212") else number


def number_of(value: object) -> Fraction | None:
    """A number of a record, or the last one of its text; None of anything else, a boolean among it."""
    if isinstance(value, str):
        return last_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return Fraction(str(value))  # 0.1 is a tenth, and not the nearest binary number
    except ValueError:  # NaN and infinity
        return None
