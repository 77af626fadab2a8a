"""The shipped rules, against values worked out by hand."""

from fractions import Fraction

import pytest

from rlhfjax.config import rewards
from rlhfjax.rewards import Example
from rlhfjax.rewards.rules import (
    Unscored,
    exact_match,
    field_of,
    forbidden,
    length_target,
    numeric_match,
    repetition,
    rule_of,
    soft_overlong,
    whole_words,
)


def test_length_is_off_its_target_by_a_share_of_it():
    assert [length_target(tokens, 8) for tokens in (8, 6, 12, 0, 24)] == [0.0, -0.25, -0.5, -1.0, -2.0]


def test_soft_overlong_punishment_falls_over_the_buffer():
    """L_max 16384 and L_cache 4096, as in the paper: free up to 12288, half of it at 14336, all of it at 16384."""
    tokens = (1, 12_288, 13_312, 14_336, 16_384, 16_385, 50_000)
    assert [soft_overlong(n, 16_384, 4_096) for n in tokens] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("tokens", "ngram", "value"),
    [
        ([1, 2, 3, 4], 2, 0.0),
        ([1, 2, 1, 2, 1], 2, -0.5),  # 12 21 12 21: two of four
        ([7, 7, 7, 7, 7], 3, -2 / 3),  # one of three
        ([7, 7, 7, 7], 1, -0.75),
        ([1, 2], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_came_before(tokens, ngram, value):
    assert repetition(tokens, ngram) == pytest.approx(value)


@pytest.mark.parametrize(
    ("response", "answers", "how", "value"),
    [
        (" The  Answer\n", ["the answer"], {}, 1.0),
        ("The answer", ["the answer"], {"strict": True}, 0.0),
        ("STRASSE", ["Straße"], {}, 1.0),
        ("B", ["A", "b"], {}, 1.0),
        ("the answer.", ["the answer"], {}, 0.0),
        ("no, ANSWER: no, ANSWER: Paris", ["paris"], {"after": "ANSWER:"}, 1.0),
        ("Paris", ["paris"], {"after": "ANSWER:"}, 0.0),
        ("#### 72", ["48 / 2 = 24\n#### 72"], {"after": "####"}, 1.0),
        ("", [""], {}, 1.0),
    ],
)
def test_exact_match(response, answers, how, value):
    assert exact_match(response, answers, **how) == value


@pytest.mark.parametrize(
    ("response", "answer", "how", "value"),
    [
        ("3 + 4 = 7", "7", {}, 1.0),
        ("7 is 3 + 4", "7", {}, 0.0),
        ("1,000", "1000.0", {}, 1.0),
        ("0.10", "1/10", {}, 1.0),
        ("0.33", "1/3", {}, 0.0),
        ("0.33", "1/3", {"tolerance": Fraction("0.01")}, 1.0),
        ("0.3", "0", {"tolerance": Fraction("0.3")}, 1.0),
        ("-7", "7", {}, 0.0),
        ("seven", "7", {}, 0.0),
        ("#### 7 (checked 2 times)", "7", {"after": "####"}, 0.0),
        ("5 #### 7", "7", {"after": "####"}, 1.0),
        ("7", "7", {"after": "####"}, 0.0),
    ],
)
def test_numeric_match(response, answer, how, value):
    assert numeric_match(response, [Fraction(answer)], **how) == value


def test_forbidden_words_are_whole_words_in_any_case():
    words = whole_words(["damn", "as an AI", "c++"])
    said = ["Damn!", "Damned", "So, AS AN AI, I", "as an AIs", "C++", "c+++", "", "goddamn"]
    assert [forbidden(text, words) for text in said] == [-1.0, 0.0, -1.0, 0.0, -1.0, -1.0, 0.0, 0.0]


def test_fields_lie_at_names_and_at_paths():
    record = {"answer": 1, "reward_model": {"ground_truth": "72", "style": "rule"}, "a.b": 2, "a": {"b": 3}}
    assert [field_of(record, name) for name in ("answer", "reward_model.ground_truth", "a.b")] == [1, "72", 2]
    with pytest.raises(Unscored, match=r"field gold in the record of its prompt, got a, a\.b, answer, reward_model"):
        field_of(record, "gold")
    with pytest.raises(Unscored, match=r"field answer\.x in the record of its prompt, got int"):
        field_of(record, "answer.x")


def test_rules_read_ids_texts_and_records():
    example = Example("3 + 4 =", " 7", (5, 6), (1, 1, 1, 0), record={"answer": ["8", 7], "none": []})
    terms = {
        "length": rewards.Length(limit=4, buffer=2),
        "repetition": rewards.Repetition(ngram=1),
        "exact_match": rewards.ExactMatch(field="answer"),
        "numeric_match": rewards.NumericMatch(field="answer", tolerance=0.0),
        "forbidden": rewards.Forbidden(words=["7"]),
    }
    assert {kind: rule_of(kind, settings)(example) for kind, settings in terms.items()} == {
        "length": -1.0,
        "repetition": -0.5,
        "exact_match": 1.0,
        "numeric_match": 1.0,
        "forbidden": -1.0,
    }
    assert rule_of("length", rewards.Length(target=8))(example) == -0.5
    for kind, settings in (
        ("numeric_match", rewards.NumericMatch(field="none")),
        ("exact_match", rewards.ExactMatch(field="none")),
    ):
        with pytest.raises(Unscored, match="in the field none, got none"):
            rule_of(kind, settings)(example)
