"""Record schemas: both accepted forms of each kind, and for every wrong one where, what was expected and got."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.records import KINDS, parse_record
from rlhfjax.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": ""}
PAIR = {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "warmth", "arguments": {"where": "here"}}}
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {}}}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "21", "tool_call_id": "c1"},
    {"role": "assistant", "content": "21 degrees.", "reasoning_content": "It says 21.", "weight": 1, "name": "bot"},
]
WRITTEN = [  # the same as OpenAI's interface writes it
    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image": None}]},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{**CALL, "function": {"name": "warmth", "arguments": '{"where": "here"}'}}],
    },
    {"role": "tool", "content": "21", "tool_call_id": "c1", "tool_calls": []},
    {**CALLED[3], "weight": 1.0},
]
RATING = {"output_id": "o", "labeler_id": "l", "likert": 7, "flags": {"hate": True}}

ACCEPTED = [
    ("document", {"text": "a\nb"}, {"text": "a\nb"}),
    ("demonstration", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
    ("demonstration", {"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [SYSTEM, USER, ASSISTANT]}),
    ("comparison", PAIR, PAIR),
    ("comparison", {**PAIR, "labeler_id": "7", "prompt_id": "3"}, {**PAIR, "labeler_id": "7", "prompt_id": "3"}),
    (
        "comparison",
        {"messages": [USER], "responses": ["a", "", "b"], "ranks": [1, 1, 2]},
        {"messages": [USER], "responses": ["a", "", "b"], "ranks": [1, 1, 2]},
    ),
    (
        "comparison",
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "responses": ["good", "bad"], "ranks": [1, 2]},
    ),
    ("prompt", {"prompt": " p "}, {"prompt": " p "}),
    (
        "prompt",
        {"messages": [USER, ASSISTANT, USER], "prompt_id": "1", "use_case": "chat"},
        {"messages": [USER, ASSISTANT, USER], "prompt_id": "1", "use_case": "chat"},
    ),
    ("rating", RATING, RATING),
    ("rating", {**RATING, "labeler_id": 3, "output_id": 12}, {**RATING, "labeler_id": "3", "output_id": "12"}),
    ("demonstration", {"messages": WRITTEN, "tools": [TOOL]}, {"messages": CALLED, "tools": [TOOL]}),
    ("demonstration", {"messages": CALLED, "tools": [TOOL]}, {"messages": CALLED, "tools": [TOOL]}),
    ("prompt", {"messages": CALLED[:3], "tools": [], "prompt_id": None}, {"messages": CALLED[:3]}),
    (
        "prompt",
        {"messages": [{"role": "developer", "content": "d"}, USER], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [{"role": "developer", "content": "d"}, USER], "chat_template_kwargs": {"enable_thinking": False}},
    ),
    (
        "unpaired",
        {"messages": [USER], "completion": "c", "label": False, "labeler_id": 4},
        {"messages": [USER], "completion": "c", "label": False, "labeler_id": "4"},
    ),
    ("unpaired", {"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "c", "label": True}),
    ("demonstration", {"prompt": "p", "completion": "c", "messages": None}, {"prompt": "p", "completion": "c"}),
    ("document", {"text": "a", "source": None, "extra": 1}, {"text": "a", "extra": {"source": None, "extra": 1}}),
]


@pytest.mark.parametrize(("kind", "given_object", "canonical"), ACCEPTED)
def test_accepted_forms(kind, given_object, canonical):
    assert parse_record(kind, given_object, "f:1") == canonical


REFUSED = [
    ("document", [], "expected an object"),
    ("document", {}, "text: expected this field"),
    ("document", {"txt": "a"}, "is 'txt' meant"),
    ("document", {"text": 3}, "text: expected a string, got a whole number"),
    ("document", {"text": " \n"}, "text: expected text, got nothing but white space"),
    ("document", {"text": ""}, "got an empty string"),
    ("document", {"text": "a\0"}, "text: expected text, got a NUL"),
    ("document", {"text": "a\ud83d"}, "half of a surrogate pair"),
    ("document", {"text": "a", "meta": {"k": ["\udc00"]}}, "meta.k[0]: expected Unicode text"),
    ("document", {"text": "a", "\ud800": 1}, "a field name: expected Unicode"),
    ("demonstration", {"prompt": "p"}, "completion: expected this field"),
    ("demonstration", {"completion": "p"}, "prompt: expected this field"),
    ("demonstration", {"prompt": "  ", "completion": "c"}, "prompt: expected text"),
    ("demonstration", {"messages": [USER, ASSISTANT], "prompt": "p"}, "either messages or prompt, got both"),
    ("demonstration", {"messages": [USER, ASSISTANT], "completion": "p"}, "either messages or completion, got both"),
    ("demonstration", {"messages": [USER]}, "from the assistant, got one from the user"),
    ("demonstration", {"messages": [ASSISTANT]}, "a message to answer before the answer"),
    ("demonstration", {"messages": [{**USER, "content": " "}, ASSISTANT]}, "text in the last user message"),
    ("prompt", {"messages": []}, "got an empty list"),
    ("prompt", {"messages": [USER, ASSISTANT]}, "from the user, got one from the assistant"),
    ("prompt", {"messages": "Hi"}, "messages: expected a list"),
    ("prompt", {"messages": ["Hi"]}, "messages[0]: expected an object with role and content, got a string"),
    ("prompt", {"messages": [{"role": "user"}]}, "messages[0].content: expected a string, got null"),
    ("prompt", {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: expected one of system, developer"),
    (
        "prompt",
        {"messages": [{"role": "user", "content": ["x"]}]},
        "messages[0].content[0]: expected a part of type text, got a string",
    ),
    ("prompt", {"prompt": "p", "prompt_id": 7.5}, "prompt_id: expected a string, got a number"),
    ("prompt", {"prompt": "p", "use_case": ""}, "use_case: expected text"),
    ("comparison", {"prompt": "p"}, "responses: expected this field"),
    ("comparison", {**PAIR, "ranks": [1]}, "one rank for each of 2 responses, got 1 ranks"),
    ("comparison", {**PAIR, "responses": ["a"], "ranks": [1]}, "at least 2 responses"),
    ("comparison", {**PAIR, "responses": ["a", 1]}, "responses[1]: expected a string"),
    ("comparison", {**PAIR, "responses": ["", " "]}, "at least one response with text"),
    ("comparison", {**PAIR, "ranks": [1, 2.0]}, "ranks[1]: expected a whole number, got a number"),
    ("comparison", {**PAIR, "ranks": [True, 2]}, "ranks[0]: expected a whole number, got a boolean"),
    ("comparison", {**PAIR, "ranks": [0, 1]}, "ranks[0]: expected a rank from 1"),
    ("comparison", {**PAIR, "ranks": [1, 2**40]}, "ranks[1]: expected a rank from 1"),
    ("comparison", {**PAIR, "chosen": "a"}, "either responses or chosen, got both"),
    ("comparison", {"prompt": "p", "chosen": "a"}, "rejected: expected this field"),
    ("comparison", {"prompt": "p", "chosen": "a", "rejected": None}, "rejected: expected a string, got null"),
    ("rating", {**RATING, "likert": 8}, "likert: expected a whole number from 1 to 7"),
    ("rating", {**RATING, "likert": True}, "got a boolean"),
    ("rating", {**RATING, "flags": []}, "flags: expected an object, got a list"),
    ("rating", {**RATING, "labeler_id": [3]}, "labeler_id: expected a string"),
    ("demonstration", {"prompt": "p", "completions": "c"}, "the fields completions, prompt (is 'completions' meant?)"),
    ("demonstration", {"prompt": "p", "completion": "c", "label": False}, "label: expected a good answer"),
    ("unpaired", {"prompt": "p", "completion": "c"}, "label: expected this field"),
    ("unpaired", {"prompt": "p", "completion": "c", "label": 1}, "label: expected true or false, got a whole number"),
    ("unpaired", {"messages": [USER, ASSISTANT], "completion": "c", "label": True}, "from the user, got one from the"),
    ("unpaired", {"prompt": "p", "completion": " ", "label": True}, "completion: expected text"),
    ("prompt", {"messages": [USER], "tools": "[]"}, "tools: expected a list of objects, got a string"),
    ("prompt", {"messages": [USER], "tools": ["t"]}, "tools[0]: expected an object, got a string"),
    ("prompt", {"messages": [USER], "chat_template_kwargs": []}, "chat_template_kwargs: expected an object"),
    ("demonstration", {"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "messages[1].weight: expected 0"),
    ("demonstration", {"messages": [USER, {**ASSISTANT, "name": 5}]}, "messages[1].name: expected a string"),
    ("demonstration", {"messages": [USER, {**ASSISTANT, "tool_calls": {"id": 1}}]}, "tool_calls: expected a list"),
    ("demonstration", {"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "tool_calls[0]: expected an object"),
    (
        "demonstration",
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "content: expected a string, got null",
    ),
    (
        "prompt",
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "content[0]: expected a part of type text, got 'image_url'",
    ),
]


@pytest.mark.parametrize(("kind", "given_object", "message"), REFUSED)
def test_refused_forms(kind, given_object, message):
    with pytest.raises(DataError) as error:
        parse_record(kind, given_object, "file.jsonl:12")
    assert str(error.value).startswith("file.jsonl:12: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'comparison'"):
        parse_record("comparisons", PAIR, "f:1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
FIELD = st.sampled_from(
    ["text", "prompt", "completion", "messages", "responses", "ranks", "chosen", "rejected", "likert", "flags", "x"]
)


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), obj=st.dictionaries(FIELD, JSON, max_size=6))
def test_any_object_is_a_record_or_a_data_error(kind, obj):
    """Nothing is lost: the canonical record and what is under `extra` give the object back."""
    try:
        record = parse_record(kind, obj, "f:1")
    except DataError:
        return
    extra = record.pop("extra", {})
    if "chosen" in obj and "chosen" not in extra:
        record["chosen"], record["rejected"] = record.pop("responses")
        assert record.pop("ranks") == [1, 2]
    assert {**record, **extra} == obj
