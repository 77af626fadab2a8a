"""Open-Assistant's trees: conversations, rankings and prompts of a tree drawn by hand, whole and as a flat list.

m1 ── m2 (rank 1) ── m4 ── m5 (no rank)
   ├─ m3 (rank 0) ── m6, which nobody answered
   └─ m7 (rank 2, deleted)
"""

import json
from pathlib import Path

import pytest

from rlhfjax.data.layouts import named, recognise
from rlhfjax.errors import DataError
from tests.data.layouts.cases import read, said

REAL = Path(__file__).parents[4] / "shared" / "data" / "open-assistant" / "en_100_tree.jsonl"


def node(number: int, role: str, *replies: dict, **more) -> dict:
    return {"message_id": f"m{number}", "text": f"Text {number}.", "role": role, "replies": list(replies), **more}


def asked(number: int) -> dict:
    return {"role": "user", "content": f"Text {number}."}


def answered(number: int) -> dict:
    return said(f"Text {number}.")


TREE = {
    "message_tree_id": "m1",
    "tree_state": "ready_for_export",
    "prompt": node(
        1,
        "prompter",
        node(2, "assistant", node(4, "prompter", node(5, "assistant", rank=None)), rank=1),
        node(3, "assistant", node(6, "prompter"), rank=0),
        node(7, "assistant", rank=2, deleted=True),
    ),
}
FIRST, SECOND = [asked(1), answered(3)], [asked(1), answered(2), asked(4), answered(5)]


def flat(tree: dict, parent: str | None, root: str) -> list[dict]:
    """The messages of a tree depth first, as the tables have them: a rank that is missing is NaN."""
    rank = tree.get("rank")
    own = {name: value for name, value in tree.items() if name != "replies"}
    own |= {"parent_id": parent, "message_tree_id": root, "rank": float("nan") if rank is None else float(rank)}
    return [own, *(row for reply in tree["replies"] for row in flat(reply, tree["message_id"], root))]


FLAT = flat(TREE["prompt"], None, "m1")


@pytest.mark.parametrize(("rows", "name"), [([TREE], "oasst"), (FLAT, "oasst_messages")])
def test_a_tree(rows, name):
    assert recognise(rows, None).name == recognise(rows, "prompt").name == name
    assert read(rows, "demonstration") == [{"messages": FIRST}, {"messages": SECOND}]
    assert read(rows, "demonstration", named(f"{name}_best")) == [{"messages": FIRST}]
    assert read(rows, "comparison") == [
        {"messages": [asked(1)], "responses": ["Text 3.", "Text 2."], "ranks": [1, 2], "prompt_id": "m1"}
    ]
    assert read(rows, "prompt") == [
        {"messages": [asked(1)], "prompt_id": "m1"},
        {"messages": [*FIRST, asked(6)], "prompt_id": "m6"},
        {"messages": [*SECOND[:3]], "prompt_id": "m4"},
    ]


def test_replies_without_a_rank_come_last():
    replies = [node(number, "assistant", rank=rank) for number, rank in ((2, None), (3, 1), (4, 0))]
    tree = {"message_tree_id": "m1", "prompt": node(1, "prompter", *replies)}
    assert read([tree], "demonstration", named("oasst_best")) == [{"messages": [asked(1), answered(4)]}]
    every = [record["messages"][-1] for record in read([tree], "demonstration", named("oasst"))]
    assert every == [answered(4), answered(3), answered(2)]


def test_two_trees_in_a_flat_list():
    second = flat(node(8, "prompter", node(9, "assistant")), None, "m8")
    assert read([*FLAT, *second], "demonstration", named("oasst_messages"))[2:] == [
        {"messages": [asked(8), answered(9)]}
    ]
    with pytest.raises(DataError, match="file:2: parent_id: expected the message_id of a message above"):
        read([FLAT[0], {**FLAT[1], "parent_id": "nobody"}], "demonstration", named("oasst_messages"))
    with pytest.raises(DataError, match="file:1: expected an object with the fields message_id"):
        read(["text"], "demonstration", named("oasst_messages"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "prompt: expected the first message of a tree, got a string"),
        (node(1, "narrator"), "prompt: expected messages with a role (prompter or assistant) and a text"),
        (node(1, "prompter", "text"), "prompt: expected messages in the replies, got a string"),
        ({**node(1, "prompter"), "replies": 3}, "prompt: expected replies in a list, got a whole number"),
        ({**node(1, "prompter"), "role": ["prompter"]}, "prompt: expected messages with a role"),
    ],
)
def test_trees_that_do_not_fit(prompt, message):
    for kind in ("demonstration", "comparison", "prompt"):
        with pytest.raises(DataError) as error:
            named("oasst").rows(kind, {"prompt": prompt}, "file:2")
        assert message in str(error.value)


def test_a_conversation_without_end_is_refused():
    deep = node(0, "assistant")
    for number in range(1, 300):
        deep = node(number, "prompter" if number % 2 else "assistant", deep)
    with pytest.raises(DataError, match="conversations of at most 100 messages"):
        named("oasst").rows("demonstration", {"prompt": deep}, "file:1")


@pytest.mark.skipif(not REAL.exists(), reason="needs the public file")
def test_the_counts_of_the_public_file():
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    comparisons = read(rows, "comparison", recognise(rows, "comparison"))
    assert len(comparisons) == 212
    assert max(len(record["ranks"]) for record in comparisons) == 9
    demonstrations = read(rows, "demonstration", named("oasst"))
    leaves = [text for row in rows for text in _last_answers(row["prompt"])]
    assert sorted(record["messages"][-1]["content"] for record in demonstrations) == sorted(leaves)


def _last_answers(node: dict) -> list[str]:
    """Answers below which there is no other answer."""
    below = [text for reply in node["replies"] for text in _last_answers(reply)]
    return below or ([node["text"]] if node["role"] == "assistant" else [])
