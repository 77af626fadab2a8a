"""TRL's layouts: prompts apart or inside, as texts or as messages, and what is taken out of chosen and rejected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfjax.data.layouts import named, recognise
from rlhfjax.errors import DataError
from tests.data.layouts.cases import ASKED, BAD, BRIEF, GOOD, USER, bare, read, said

PAIR = {"responses": [GOOD, BAD], "ranks": [1, 2]}
MORE = [USER, said("Which noon?"), {"role": "user", "content": "Today's."}]
INSIDE = {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]}

COMPARISONS = [
    ("trl_preference", {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]}, [USER]),
    ("trl_preference", {"prompt": [BRIEF, USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]}, [BRIEF, USER]),
    ("trl_preference", {"prompt": ASKED, "chosen": [said(GOOD)], "rejected": [said(BAD)]}, [USER]),
    ("trl_preference", {"prompt": ASKED, **INSIDE}, [USER]),
    ("trl_preference", {"prompt": f"{ASKED}\n", **INSIDE}, [USER]),
    ("trl_preference", {"prompt": [USER], **INSIDE}, [USER]),
    ("trl_preference", {"prompt": ASKED, "messages": [USER, said(GOOD)], **INSIDE}, [USER]),
    ("trl_preference", {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "system": "Be brief."}, [BRIEF, USER]),
    ("trl_preference", {"prompt": ASKED, "system": "Be brief.", **INSIDE}, [BRIEF, USER]),
    ("trl_implicit_preference", INSIDE, [USER]),
    ("trl_implicit_preference", {"chosen": [*MORE, said(GOOD)], "rejected": [*MORE, said(BAD)]}, MORE),
]


@pytest.mark.parametrize(("name", "row", "messages"), COMPARISONS)
def test_pairs_of_messages(name, row, messages):
    assert recognise([row], "comparison").name == recognise([row], None).name == name
    assert read([row], "comparison") == [{"messages": messages, **PAIR}]
    assert read([row], "demonstration") == [{"messages": [*messages, said(GOOD)]}]
    assert read([row], "prompt") == [{"messages": messages}]


def test_conversations_that_part_before_the_last_answer_give_nothing_and_it_is_said():
    early = {"chosen": [*MORE, said(GOOD)], "rejected": [USER, said("None."), MORE[2], said(BAD)]}
    longer = {"chosen": [*MORE, said(GOOD)], "rejected": [USER, said(BAD)]}
    layout = recognise([INSIDE, early], "comparison")
    assert layout.rows("comparison", early, "file:2") == layout.rows("comparison", longer, "file:3") == []
    assert layout.omits("comparison") == "rows whose two conversations differ before their last answer"


def test_texts_that_begin_with_the_prompt_lose_it_and_ours_are_left_alone():
    rows = [{"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."}]
    assert recognise(rows, "comparison").name == "prompt_inside"
    assert "without the prompt" in recognise(rows, "comparison").explain("comparison")
    assert read(rows, "comparison") == [{"prompt": "The sky is", "responses": [" blue.", " green."], "ranks": [1, 2]}]
    apart = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert recognise([apart], "comparison").name == "rlhfjax"
    assert read([apart], "comparison") == read(rows, "comparison")
    assert read([*rows, *rows, apart], "comparison") == read(rows, "comparison") * 3


def test_the_words_that_two_texts_share_at_the_start_are_the_prompt():
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is grey.", "rejected": "The sky is green."},
        {"chosen": "Blue.", "rejected": "Green."},
    ]
    layout = recognise(rows, "comparison")
    assert layout.name == "implicit_preference"
    assert bare(read(rows, "comparison")) == [
        {"prompt": "The sky is", "responses": [" blue.", " green."], "ranks": [1, 2]},
        {"prompt": "The sky is", "responses": [" grey.", " green."], "ranks": [1, 2]},
    ]
    assert layout.omits("comparison") == "rows whose chosen and rejected share no word at the start"


WORDS = st.lists(st.sampled_from(["a", "ab", "b"]), min_size=1, max_size=4).map(" ".join)


@given(start=WORDS, good=WORDS, bad=WORDS)
def test_nothing_of_two_texts_is_lost_where_their_beginning_is_taken_apart(start, good, bad):
    row = {"chosen": f"{start} {good}", "rejected": f"{start} {bad}"}
    layout = recognise([row], "comparison")
    for given_row in layout.rows("comparison", row, "f:1"):
        assert given_row["prompt"] + given_row["chosen"] == row["chosen"]
        assert given_row["prompt"] + given_row["rejected"] == row["rejected"]
        assert given_row["chosen"][0] == given_row["rejected"][0] == " "


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": [USER], "completion": [said(GOOD)]}, [USER, said(GOOD)]),
        ({"prompt": ASKED, "completion": [said(GOOD)]}, [USER, said(GOOD)]),
        ({"prompt": ASKED, "completion": GOOD, "system": "Be brief."}, [BRIEF, USER, said(GOOD)]),
    ],
)
def test_prompt_and_completion(row, messages):
    assert recognise([row], None).name == "trl_prompt_completion"
    assert read([row], "demonstration") == [{"messages": messages}]
    assert read([row], "prompt") == [{"messages": messages[:-1]}]


def test_unpaired_answers():
    rows = [
        {"prompt": [USER], "completion": [said(text)], "label": good} for text, good in ((GOOD, True), (BAD, False))
    ]
    assert recognise(rows, None).name == "trl_unpaired"
    assert read(rows, "unpaired") == [
        {"messages": [USER], "completion": GOOD, "label": True},
        {"messages": [USER], "completion": BAD, "label": False},
    ]
    assert read(rows, "demonstration") == [{"messages": [USER, said(GOOD)]}]


@pytest.mark.parametrize(("true", "false"), [(True, False), ("True", "False"), ("true", "false ")])
def test_a_label_may_be_a_word_as_in_tables(true, false):
    rows = [{"prompt": "p", "completion": "good", "label": true}, {"prompt": "p", "completion": "bad", "label": false}]
    assert [record["label"] for record in read(rows, "unpaired")] == [True, False]
    assert read(rows, "demonstration") == [{"prompt": "p", "completion": "good"}]
    with pytest.raises(DataError, match="file:2: label: expected a good answer to learn from"):
        read(rows, "demonstration", named("rlhfjax"))


def test_prompts_and_the_answers_that_rewards_read_later():
    assert read([{"prompt": [BRIEF, USER]}], "prompt") == [{"messages": [BRIEF, USER]}]
    assert read([{"prompt": ASKED, "system": "Be brief."}], "prompt") == [{"messages": [BRIEF, USER]}]
    row = {"data_source": "sums", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "42"}}
    assert recognise([row], None).name == "verl"
    assert read([row], "prompt") == [
        {
            "messages": [USER],
            "extra": {"data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "42"}},
        }
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER], "chosen": [said(GOOD)]}, "rejected: expected this field in a row of the layout trl_prefer"),
        ({"prompt": 3, "chosen": [said(GOOD)], "rejected": [said(BAD)]}, "prompt: expected a list of messages, got a"),
        ({"chosen": [said(GOOD)], "rejected": [said(BAD)]}, "prompt: expected a prompt, apart or in chosen"),
        (
            {"prompt": ASKED, "chosen": [{**said(""), "tool_calls": [{}]}], "rejected": [said(BAD)]},
            "chosen: expected an answer of the assistant in text, got a call of a tool",
        ),
        ({"prompt": ASKED, "chosen": [USER], "rejected": [said(BAD)]}, "got a string from the user"),
    ],
)
def test_a_pair_that_does_not_fit_says_which_field(row, message):
    layout = recognise([COMPARISONS[0][1]], "comparison")
    with pytest.raises(DataError) as error:
        layout.rows("comparison", row, "file:2")
    assert message in str(error.value)
