"""JSON that strict readers take, and numbers that come back from it."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from rlhfjax.plain_json import dumps, number, plain


def strict(text):
    """What a reader makes of it that knows the standard alone (RFC 8259, section 6)."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_lacks_are_the_words_of_protocol_buffers():
    value = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": True, "e": None, "f": "é"}}
    assert strict(dumps(value)) == {
        "a": "NaN",
        "b": ["Infinity", ["-Infinity", 1.5]],
        "c": {"d": True, "e": None, "f": "é"},
    }
    assert "é" in dumps(value)
    assert dumps({"f": "é"}, ensure_ascii=True) == '{"f": "\\u00e9"}'


@given(st.recursive(st.none() | st.floats() | st.integers() | st.text(), lambda x: st.lists(x) | st.tuples(x, x)))
def test_every_value_is_strict_json(value):
    strict(dumps(value))


@given(st.floats(allow_subnormal=True))
def test_a_number_comes_back(value):
    back = number(strict(dumps(value)))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_what_is_no_number_is_none():
    assert [number(value) for value in ("1.5", "nan", None, True, [1], 3, "Infinity")] == [None] * 5 + [3.0, math.inf]
    assert plain("NaN") == "NaN"
