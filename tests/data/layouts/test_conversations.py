"""Whole conversations in the spellings that people use, as canonical records written by hand."""

import json

import pytest

from rlhfjax.data.layouts import named, recognise
from rlhfjax.errors import DataError
from tests.data.layouts.cases import ASKED, BAD, BRIEF, GOOD, USER, bare, read, said

TOOL = {"name": "warmth", "description": "How warm it is.", "parameters": {}}
ASKS = {"from": "human", "value": ASKED}
CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"where": "here"}}}


@pytest.mark.parametrize(
    ("human", "gpt"),
    [("human", "gpt"), ("user", "assistant"), ("User", "model"), ("prompter", "bot"), ("human", "chatgpt")],
)
@pytest.mark.parametrize("key", ["conversations", "conversation"])
def test_sharegpt_with_all_names_of_the_roles(key, human, gpt):
    row = {"id": 7, key: [{"from": human, "value": ASKED}, {"from": gpt, "value": GOOD}]}
    assert read([row], "demonstration") == [{"messages": [USER, said(GOOD)], "extra": {"id": 7}}]


def test_a_system_prompt_beside_the_conversation_opens_it_unless_it_has_one():
    turns = [ASKS, {"from": "gpt", "value": GOOD}]
    beside = {"system": "Be brief.", "conversations": turns}
    assert read([beside], "demonstration") == [{"messages": [BRIEF, USER, said(GOOD)]}]
    both = {"system": "Be long.", "conversations": [{"from": "system", "value": "Be brief."}, *turns]}
    layout = recognise([both], "demonstration")
    assert bare(read([both], "demonstration")) == [{"messages": [BRIEF, USER, said(GOOD)]}]
    assert layout.unread("demonstration", both) == {"system"}
    assert layout.unread("demonstration", beside) == set()
    messages = {"system": "Be brief.", "messages": [USER, said(GOOD)]}
    assert read([messages], "demonstration") == [{"messages": [BRIEF, USER, said(GOOD)]}]


def test_what_follows_the_last_answer_is_left_out_of_a_demonstration_and_asked_as_a_prompt():
    row = {"conversations": [ASKS, {"from": "gpt", "value": GOOD}, {"from": "human", "value": "Why?"}]}
    again = {"role": "user", "content": "Why?"}
    assert read([row], "demonstration") == [{"messages": [USER, said(GOOD)]}]
    assert "to the last answer" in recognise([row], "demonstration").explain("demonstration")
    assert read([row], "prompt") == [{"messages": [USER, said(GOOD), again]}]
    assert read([{"conversations": [ASKS, {"from": "gpt", "value": GOOD}]}], "prompt") == [{"messages": [USER]}]
    with pytest.raises(DataError, match="file:1: conversations: expected a conversation with an answer"):
        read([{"conversations": [ASKS]}], "demonstration")


def test_calls_and_observations_with_their_tools():
    row = {
        "conversations": [
            ASKS,
            {"from": "function_call", "value": json.dumps({"name": "warmth", "arguments": {"where": "here"}})},
            {"from": "observation", "value": "21"},
            {"from": "gpt", "value": GOOD},
        ],
        "tools": json.dumps([TOOL]),
    }
    assert read([row], "demonstration") == [
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "21"},
                said(GOOD),
            ],
            "tools": [{"type": "function", "function": TOOL}],
        }
    ]


def test_the_calls_that_openai_wrote_before_there_were_tool_calls():
    row = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "warmth", "arguments": '{"where": "here"}'},
            },
            {"role": "function", "name": "warmth", "content": "21"},
            said(GOOD),
        ]
    }
    assert recognise([row], None).name == "openai_chat"
    assert read([row], "demonstration")[0]["messages"] == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "21", "name": "warmth"},
        said(GOOD),
    ]


@pytest.mark.parametrize("chosen", [{"from": "gpt", "value": GOOD}, [{"from": "gpt", "value": GOOD}], GOOD])
def test_conversations_with_two_last_answers(chosen):
    row = {"conversations": [ASKS], "chosen": chosen, "rejected": {"from": "gpt", "value": BAD}}
    assert recognise([row], None).name == "sharegpt_preference"
    assert read([row], "comparison") == [{"messages": [USER], "responses": [GOOD, BAD], "ranks": [1, 2]}]
    assert read([row], "demonstration") == [{"messages": [USER, said(GOOD)]}]
    assert read([row], "prompt") == [{"messages": [USER]}]


@pytest.mark.parametrize(("key", "label"), [("messages", "label"), ("conversations", "kto_tag")])
def test_conversations_with_a_label(key, label):
    rows = [{key: [USER, said(text)], label: good} for text, good in ((GOOD, True), (BAD, False))]
    assert read(rows, "unpaired") == [
        {"messages": [USER], "completion": GOOD, "label": True},
        {"messages": [USER], "completion": BAD, "label": False},
    ]
    assert read(rows, "demonstration") == [{"messages": [USER, said(GOOD)]}]
    assert read(rows, "prompt") == [{"messages": [USER]}] * 2


def test_openai_preference():
    row = {
        "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [said(GOOD)],
        "non_preferred_output": [said(BAD)],
    }
    tools = [{"type": "function", "function": TOOL}]
    assert recognise([row], None).name == "openai_preference"
    assert read([row], "comparison") == [
        {
            "messages": [USER],
            "tools": tools,
            "responses": [GOOD, BAD],
            "ranks": [1, 2],
            "extra": {"parallel_tool_calls": True},
        }
    ]


def test_a_prompt_beside_the_conversation_is_kept_beside():
    row = {"prompt": ASKED, "prompt_id": "p", "messages": [USER, said(GOOD)]}
    assert read([row], "demonstration") == [
        {"messages": [USER, said(GOOD)], "prompt_id": "p", "extra": {"original_prompt": ASKED}}
    ]


def test_pictures_in_messages_are_said():
    row = {"messages": [{**USER, "images": ["sky.png"]}, said(GOOD)], "images": ["sky.png"]}
    layout = recognise([row], "demonstration")
    assert layout.unread("demonstration", row) == {"images", "messages.images"}


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([{"from": "narrator", "value": "x"}], "conversations[0].from: expected one of system,"),
        ([ASKS, {"value": "x"}], "conversations[1].role: expected one of system,"),
        ([ASKS, "x"], "conversations[1]: expected an object with role and content, got a string"),
        ([ASKS, {"from": "function_call", "value": "warmth()"}], "conversations[1].value: expected the JSON of a call"),
        ("x", "conversations: expected a list of messages, got a string"),
    ],
)
def test_a_conversation_that_does_not_fit_says_where(conversations, message):
    with pytest.raises(DataError) as error:
        named("sharegpt").rows("demonstration", {"conversations": conversations}, "file:3")
    assert str(error.value).startswith(f"file:3: {message}")


def test_tools_that_are_no_tools():
    for tools in ("not JSON", "3", [3]):
        with pytest.raises(DataError, match="file:1: tools: expected a list of"):
            read([{"conversations": [ASKS, {"from": "gpt", "value": GOOD}], "tools": tools}], "demonstration")
