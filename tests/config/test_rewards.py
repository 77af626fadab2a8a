"""The list of rewards in a configuration: what is taken, under which names, and what is said of mistakes."""

import re

import pytest
from pydantic import ValidationError

from rlhfjax.config.explain import problems
from rlhfjax.config.rewards import Rewards, on_device, on_host
from rlhfjax.config.sections import Section

ALL = [
    {"model": "reward"},
    {"function": "rules/my.py:exact", "weight": 0.5, "per_call": 4, "workers": 2},
    {"command": ["./grade.sh", "-v"], "timeout": 30.0, "on_error": "value", "value": -1.0},
    {"length": {"limit": 64, "buffer": 16}},
    {"length": {"target": 32}, "name": "short", "weight": 0.0},
    {"repetition": {"ngram": 4}, "on_error": "skip"},
    {"format": {"pattern": "<answer>.*</answer>", "match": "search"}},
    {"exact_match": {"field": "answer"}},
    {"numeric_match": {"field": "reward_model.ground_truth", "after": "####", "tolerance": 0.01}},
    {"forbidden": {"words": ["damn"]}},
]


class Stage(Section):
    """A stage with rewards."""

    rewards: Rewards


def read(*terms):
    return Stage.model_validate({"rewards": list(terms)}).rewards


def said(*terms):
    with pytest.raises(ValidationError) as caught:
        read(*terms)
    return [text for _, text in problems(caught.value, Stage.model_json_schema())]


def test_every_kind_is_read_and_has_a_name():
    terms = read(*ALL)
    assert [term.title for term in terms] == [
        *("model", "exact", "grade", "length", "short", "repetition", "format", "exact_match", "numeric_match"),
        "forbidden",
    ]
    assert [term.kind for term in terms] == [next(iter(entry)) for entry in ALL]
    assert (on_device(terms), on_host(terms)) == (terms[:1], terms[1:])


def test_what_is_resolved_reads_as_the_same():
    terms = read(*ALL)
    written = Stage(rewards=terms).model_dump(mode="json")
    assert Stage.model_validate(written).rewards == terms


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([{"model": "reward", "weigth": 1.0}], "rewards.0.weigth: unknown key; did you mean rewards.0.weight?"),
        ([{"lenght": {"target": 3}}], "got lenght; did you mean length?"),
        ([{"weight": 1.0}], "expected a section with one of model, function, command, length, .*, got weight"),
        ([{}], "got no key"),
        ([3], "rewards.0: expected a section with one of .*, got a value without keys"),
        ([{"model": "reward", "length": {"target": 3}}], "got model and length"),
        ([{"function": "my.py"}], "rewards.0.function: expected text that matches .*, got \"my.py\""),
        ([{"command": []}], "rewards.0.command: expected a list of at least 1"),
        ([{"model": "reward", "on_error": "skip"}], "rewards.0.on_error: unknown key"),
        ([{"repetition": {}, "on_error": "value"}], "on_error: value and value .* go together"),
        ([{"repetition": {}, "value": 0.0}], "on_error: value and value .* go together"),
        ([{"function": "a.py:f", "workers": 2}], "workers: 2 would share one call; give per_call"),
        ([{"length": {}}], "rewards.0.length: give either target, or limit and buffer"),
        ([{"length": {"target": 2, "limit": 3, "buffer": 1}}], "give either target, or limit and buffer"),
        ([{"length": {"limit": 3}}], "give either target, or limit and buffer"),
        ([{"length": {"limit": 3, "buffer": 4}}], "buffer 4 must be at most limit 3"),
        ([{"format": {"pattern": "("}}], "rewards.0.format.pattern: '\\(' is not a regular expression"),
        ([{"forbidden": {"words": [""]}}], "rewards.0.forbidden.words.0: expected"),
        ([{"repetition": {}}, {"repetition": {}}], "2 rewards have the name repetition"),
        ([], "rewards: expected a list of at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_the_words_of_its_kind(terms, words):
    [line] = said(*terms)
    assert re.search(words, line), line
