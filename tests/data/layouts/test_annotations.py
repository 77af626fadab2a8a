"""Exports of labelling tools: who preferred what, worked out by hand from the documented forms."""

import pytest

from rlhfjax.data.layouts import named, recognise
from rlhfjax.errors import DataError
from tests.data.layouts.cases import ASKED, BAD, GOOD, USER, bare, read, said

FIELDS = {"instruction": ASKED, "response-1": BAD, "response-2": GOOD}


def record(responses, **fields) -> dict:
    return {"id": "r1", "fields": {**FIELDS, **fields}, "responses": responses, "status": "completed"}


def ranked(value, user="u1", **more) -> dict:
    return {"value": value, "user_id": user, **more}


def comparison(responses, ranks, **more) -> dict:
    return {"messages": [USER], "responses": responses, "ranks": ranks, **more}


ARGILLA = [
    (
        record({"preference": [ranked(["response-2", "response-1"])]}),
        [comparison([GOOD, BAD], [1, 2], labeler_id="u1")],
    ),
    (
        record(
            {"preference": [ranked([{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 1}], None)]}
        ),
        [comparison([BAD, GOOD], [1, 1])],
    ),
    (record({"best": [ranked("response-2", 7)]}), [comparison([BAD, GOOD], [2, 1], labeler_id="7")]),
    (
        record({"rating-1": [ranked(2), ranked(4, "u2")], "rating-2": [ranked(5), ranked(4, "u2")]}),
        [
            comparison([BAD, GOOD], [2, 1], labeler_id="u1"),
            comparison([BAD, GOOD], [1, 1], labeler_id="u2"),
        ],
    ),
    (
        record(
            [
                {
                    "values": {"preference": {"value": ["response-2", "response-1"]}},
                    "user_id": "u1",
                    "status": "submitted",
                }
            ]
        ),
        [comparison([GOOD, BAD], [1, 2], labeler_id="u1")],
    ),
    (record({"preference": [ranked(["response-2", "response-1"], status="draft")]}), []),
    (record({"comment": [ranked("Both are fine.")]}), []),
    (record({}), []),
]


@pytest.mark.parametrize(("row", "records"), ARGILLA)
def test_argilla(row, records):
    assert recognise([row], None).name == "argilla"
    assert bare(read([row], "comparison")) == records


def test_what_a_record_shows_beside_is_kept_and_said():
    row = record({"best": [ranked("response-2")]}, context="It is summer.")
    layout = recognise([row], "comparison")
    assert read([row], "comparison")[0]["extra"] == {"id": "r1", "status": "completed", "context": "It is summer."}
    assert layout.unread("comparison", row) == {"context"}
    assert layout.omits("comparison") == "records that nobody has ranked"
    with pytest.raises(DataError, match="file:1: fields: expected what was asked, in one of prompt"):
        read([{"fields": {"a": "b"}, "responses": {}}], "comparison")


def task(*results, data=None, cancelled=False, by=3) -> dict:
    data = data or {"prompt": ASKED, "answer1": BAD, "answer2": GOOD}
    return {
        "id": 1,
        "data": data,
        "annotations": [{"completed_by": by, "was_cancelled": cancelled, "result": list(results)}],
    }


def selected(side: str, names="answer1,answer2") -> dict:
    return {"type": "pairwise", "to_name": names, "value": {"selected": side}}


CHAT = [{"role": "user", "content": ASKED}]
WRITTEN = {"type": "chatmessage", "value": {"chatmessage": {"role": "assistant", "content": GOOD, "createdAt": 1}}}


@pytest.mark.parametrize(
    ("row", "records"),
    [
        (task(selected("right")), [comparison([BAD, GOOD], [2, 1], labeler_id="3")]),
        (task(selected("left"), by={"id": 9, "email": "a@b"}), [comparison([BAD, GOOD], [1, 2], labeler_id="9")]),
        (task(selected("left", "text1,text2"), by=None), [comparison([BAD, GOOD], [1, 2])]),
        (task(selected("left"), cancelled=True), []),
    ],
)
def test_label_studio_pairs(row, records):
    assert recognise([row], None).name == "label_studio"
    assert bare(read([row], "comparison")) == records


@pytest.mark.parametrize(
    "row",
    [
        task(WRITTEN, data={"chat": CHAT}),
        task(data={"chat": [*CHAT, {"role": "assistant", "content": GOOD}]}),
        task(data={"dialogue": [{"author": "human", "text": ASKED}, {"author": "bot", "text": GOOD}]}),
    ],
)
def test_label_studio_chats(row):
    assert recognise([row], None).name == "label_studio_chat"
    records = read([row], "demonstration")
    assert [record["messages"] for record in records] == [[USER, said(GOOD)]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (task(selected("both")), "annotations: expected a selected side, left or right, got 'both'"),
        (
            task(selected("left", "a,b"), data={"prompt": ASKED, "answer1": BAD}),
            "data: expected two texts, named a and b",
        ),
        ({"data": {"prompt": ASKED}, "annotations": [3]}, "annotations[0]: expected an object with a list of results"),
        ({"data": {"prompt": ASKED}}, "annotations: expected this field"),
        ({"annotations": []}, "data: expected this field"),
    ],
)
def test_tasks_that_do_not_fit(row, message):
    with pytest.raises(DataError) as error:
        named("label_studio").rows("comparison", row, "file:2")
    assert message in str(error.value)
