"""Strict YAML: scalars by YAML 1.2, lines, and everything that is refused."""

import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rlhfjax.config.reading import MAX_CHARACTERS, Dumper, YamlError, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # text to YAML 1.1 as PyYAML reads it
        ("5.0e-3", 0.005),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("2", 2),
        ("010", 10),  # octal to YAML 1.1
        ("1_000_000", 1_000_000),
        ("12:30", "12:30"),  # 750 to YAML 1.1
        ("on", "on"),  # True to YAML 1.1
        ("no", "no"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("2024-01-01", "2024-01-01"),  # a date to YAML 1.1
        ("~", None),
        ("null", None),
        ("", None),
        ("1e", "1e"),
        ("0.2x", "0.2x"),
        ("'1'", "1"),
        (".inf", ".inf"),
        ("!!str 5", "5"),
    ],
)
def test_scalars(text, value):
    read = read_yaml(text)[0]
    assert read == value
    assert type(read) is type(value)


def test_on_is_a_key_like_any_other():
    assert read_yaml("normalize: {on: samples}")[0] == {"normalize": {"on": "samples"}}


def test_lines_of_every_value():
    _, lines = read_yaml("a: 1\nb:\n  c: [4,\n    5]\n")
    assert lines == {(): 1, ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 3, ("b", "c", 1): 4}


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "key a is given twice, first on line 1", 3),
        ("x:\n  a: 1\n  a: 1\n", "key x.a is given twice, first on line 2", 3),
        ("a: &x [1]\nb: *x\n", "anchors and aliases", 1),
        ("a: 1\n<<: *b\n", "anchors and aliases", 2),
        ("1: a\n", "expected a name as key, got 1", 1),
        ("? [a]\n: b\n", "expected a name as key, got a list or mapping", 1),
        ("a: 1\nb: [1\n", "not valid YAML", 3),
        ("a: 1\n---\nb: 2\n", "not valid YAML", 2),
        ("a: !!python/name:os.system x\n", "expected a plain value, got the tag", 1),
        ("a: !!python/object:os.x {}\n", "expected a plain mapping or list, got the tag", 1),
        ("a: !!int hello\n", "expected a number, got 'hello'", 1),
        ("a: !!binary aGk=\n", "got the tag", 1),
        ("a: \x07\n", "not valid YAML", 1),
        ("a: 1\n\tb: 2", "not valid YAML", 2),
        ("[" * 100, "levels of nesting", 1),
    ],
)
def test_refused(text, message, line):
    with pytest.raises(YamlError, match=re.escape(message)) as caught:
        read_yaml(text)
    assert caught.value.line == line


def test_aliases_do_not_expand():
    # Ten anchors of ten aliases each would be 10^10 values.
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))
    with pytest.raises(YamlError, match="anchors and aliases"):
        read_yaml(bomb)


def test_size_is_bounded():
    with pytest.raises(YamlError, match="at most 1,000,000 characters"):
        read_yaml("#" * (MAX_CHARACTERS + 1))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(_VALUES)
@example({"\x85": "a\u2028b\u2029", "x": "\ufeff\x85"})
@example(["1e-3", "on", "0o7", "1_0", ".5", "", "~", 1e-7, -1e300])
def test_what_the_dumper_writes_reads_back(value):
    read = read_yaml(yaml.dump(value, Dumper=Dumper, allow_unicode=True, sort_keys=False))[0]
    assert read == value
    assert repr(read) == repr(value)  # also the types: 1 is not 1.0, "1" is not 1
