"""Answers with scores or choices, as ranks worked out by hand."""

import pytest

from rlhfjax.data.layouts import named, recognise
from rlhfjax.data.layouts.scored import ranks_of
from rlhfjax.errors import DataError
from tests.data.layouts.cases import ASKED, BAD, GOOD, USER, bare, read, said

SAFE = {"prompt": ASKED, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0}
POST = {"id": "t1", "post": "A long day with my cat.", "title": "My cat", "subreddit": "cats"}
SUMMARIES = {"info": POST, "summaries": [{"text": " We slept."}, {"text": " A day."}], "choice": 1, "worker": "w1"}
PROMPT = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: A long day with my cat.\n\nTL;DR:"


def scored(*scores) -> dict:
    completions = [{"response": text, "overall_score": score} for text, score in zip("abcde", scores, strict=False)]
    return {"instruction": ASKED, "completions": completions}


def test_equal_scores_share_a_rank():
    assert ranks_of([3.0, 8.5, 3, 9]) == [3, 2, 3, 1]
    row = scored(7.0, 8.5, 7, 3.0)
    assert recognise([row], None).name == "ultrafeedback"
    assert read([row], "comparison") == [{"messages": [USER], "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 3]}]
    assert read([row], "demonstration") == [{"messages": [USER, said("b")]}]
    assert read([scored(5, 9, 9)], "demonstration") == [{"messages": [USER, said("b")]}]


def test_completions_without_a_score_are_left_out_and_with_one_left_the_row():
    assert bare(read([scored(5, None, 9, float("nan"))], "comparison")) == [
        {"messages": [USER], "responses": ["a", "c"], "ranks": [2, 1]}
    ]
    layout = recognise([scored(5, 6)], "comparison")
    assert layout.rows("comparison", scored(5, None), "f:1") == []
    assert layout.omits("comparison") == "rows with fewer than two scored completions"


def test_summaries_keep_their_labeler():
    assert recognise([SUMMARIES], None).name == "summarize_from_feedback"
    assert read([SUMMARIES], "comparison") == [
        {
            "prompt": PROMPT,
            "responses": [" We slept.", " A day."],
            "ranks": [2, 1],
            "labeler_id": "w1",
            "prompt_id": "t1",
        }
    ]
    assert bare(read([SUMMARIES], "demonstration")) == [{"prompt": PROMPT, "completion": " A day.", "prompt_id": "t1"}]


def test_the_better_response_and_by_another_layout_the_safer_one():
    assert recognise([SAFE], None).name == recognise([SAFE], "prompt").name == "safe_rlhf"
    assert bare(read([SAFE], "comparison")) == [{"messages": [USER], "responses": [BAD, GOOD], "ranks": [2, 1]}]
    assert bare(read([SAFE], "comparison", named("safe_rlhf_safer"))) == [
        {"messages": [USER], "responses": [BAD, GOOD], "ranks": [1, 2]}
    ]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("safe_rlhf", {**SAFE, "better_response_id": 2}, "better_response_id: expected a number from 0 to 1"),
        (
            "safe_rlhf",
            {**SAFE, "better_response_id": True},
            "better_response_id: expected a whole number, got a boolean",
        ),
        ("ultrafeedback", {"instruction": ASKED, "completions": [{"text": "a"}]}, "completions[0]: expected an object"),
        ("ultrafeedback", {"instruction": ASKED}, "completions: expected this field"),
        ("summarize_from_feedback", {**SUMMARIES, "summaries": [{"text": "a"}]}, "summaries: expected two objects"),
        ("summarize_from_feedback", {**SUMMARIES, "info": {"post": "a"}}, "info: title: expected this field"),
    ],
)
def test_rows_that_do_not_fit(name, row, message):
    with pytest.raises(DataError) as error:
        named(name).rows("comparison", row, "file:2")
    assert message in str(error.value)
