"""Open-Assistant's conversation trees: whole, or as a flat list of messages (Köpf et al. 2023)."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.layout import Layout, Object, Way
from rlhfjax.data.layouts.turns import ROLES, Message
from rlhfjax.errors import DataError

_MAX_DEPTH = 100


def _root(fields: Fields) -> Any:
    root = fields.take("prompt", dict, "the first message of a tree")
    fields.left.clear()  # a tree's own fields say nothing about one of its conversations
    return root


def _with(fields: Fields, before: list[Message], node: Any) -> list[Message]:
    """A conversation and the message that goes on with it. Raises DataError for what is no message of a tree."""
    if not isinstance(node, dict):
        raise fields.error("prompt", "messages in the replies", type_name(node))
    role, text, replies = node.get("role"), node.get("text"), node.get("replies")
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        got = f"{type_name(text)} from {role!r}"[:60]
        raise fields.error("prompt", "messages with a role (prompter or assistant) and a text", got)
    if not isinstance(replies, (list, type(None))):
        raise fields.error("prompt", "replies in a list", type_name(replies))
    if len(before) == _MAX_DEPTH:
        raise fields.error("prompt", f"conversations of at most {_MAX_DEPTH} messages", "a longer one")
    return [*before, {"role": ROLES[role], "content": text}]


def _replies(node: Object) -> list[Object]:
    """The replies to a message but for deleted ones, the best ranked first and those without a rank last."""
    replies = [reply for reply in node.get("replies") or [] if not (isinstance(reply, dict) and reply.get("deleted"))]
    return sorted(replies, key=lambda reply: (_rank(reply) is None, _rank(reply) or 0))


def _rank(node: Any) -> int | None:
    rank = node.get("rank") if isinstance(node, dict) else None
    if isinstance(rank, float) and rank.is_integer():
        return int(rank)  # as tables have it, with NaN where there is none
    return rank if type(rank) is int else None


def _threads(best_only: bool, fields: Fields, before: list[Message], node: Any) -> list[list[Message]]:
    """The conversations through a message that end with an answer and that no other continues."""
    here = _with(fields, before, node)
    asks = here[-1]["role"] == "user"
    replies = _replies(node)[:1] if best_only and asks else _replies(node)
    longer = [thread for reply in replies for thread in _threads(best_only, fields, here, reply)]
    return longer or ([] if asks else [here])


def _questions(fields: Fields, before: list[Message], node: Any) -> Iterator[tuple[Object, list[Message]]]:
    """Every message of a prompter, and the conversation that ends with it."""
    here = _with(fields, before, node)
    if here[-1]["role"] == "user":
        yield node, here
    for reply in _replies(node):
        yield from _questions(fields, here, reply)


def _demonstrations(best_only: bool, fields: Fields) -> list[Object]:
    return [{"messages": thread} for thread in _threads(best_only, fields, [], _root(fields))]


def _prompts(fields: Fields) -> list[Object]:
    return [{"messages": asked, **_id(node)} for node, asked in _questions(fields, [], _root(fields))]


def _comparisons(fields: Fields) -> list[Object]:
    rows = []
    for node, asked in _questions(fields, [], _root(fields)):
        ranked = [(reply, rank) for reply in _replies(node) if (rank := _rank(reply)) is not None]
        if len(ranked) > 1:
            responses = [_with(fields, [], reply)[0]["content"] for reply, _ in ranked]
            ranks = [rank + 1 for _, rank in ranked]  # theirs begin at 0
            rows.append({"messages": asked, "responses": responses, "ranks": ranks, **_id(node)})
    return rows


def _id(node: Object) -> Object:
    return {"prompt_id": node["message_id"]} if node.get("message_id") else {}


def _tree_of(row: tuple[str, Any]) -> Any:
    return row[1].get("message_tree_id") if isinstance(row[1], dict) else None


def _trees(objects: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Trees from messages that stand tree by tree, a parent before its replies: a row is where its tree begins."""
    for _, rows in groupby(objects, key=_tree_of):
        nodes: dict[str, Object] = {}
        trees: list[tuple[str, Any]] = []
        for where, row in rows:
            if not isinstance(row, dict):
                trees.append((where, row))  # no message, which reading it will say
                continue
            node = nodes[str(row.get("message_id"))] = {**row, "replies": []}
            if row.get("parent_id") is None:
                trees.append((where, {"prompt": node}))
            else:
                _parent(nodes, where, row)["replies"].append(node)
        yield from trees


def _parent(nodes: dict[str, Object], where: str, row: Object) -> Object:
    parent = nodes.get(str(row["parent_id"]))
    if parent is None:
        raise DataError(
            f"{where}: parent_id: expected the message_id of a message above in the same tree, got another; "
            "keep a tree's messages together, each after the one it answers"
        )
    return parent


def _ways(best_only: bool) -> dict[str, Way]:
    threads = "the best ranked answers of every question" if best_only else "every conversation to its last answer"
    none = "trees in which nothing of the kind is"
    return {
        "comparison": Way(
            "a message with ranked replies → messages, replies → responses, rank + 1 → ranks", _comparisons, none
        ),
        "demonstration": Way(f"{threads} → messages", partial(_demonstrations, best_only), none),
        "prompt": Way("every message of a prompter with what was said before → messages", _prompts, none),
    }


def _is_tree(obj: Object) -> bool:
    return isinstance(obj.get("prompt"), dict) and "replies" in obj["prompt"]


def _is_message(obj: Object) -> bool:
    return {"message_id", "parent_id", "message_tree_id", "role", "text"} <= set(obj)


_TREE, _FLAT = "message_tree_id, prompt, replies", "message_id, parent_id, message_tree_id, role, text"
LAYOUTS = (
    Layout("oasst", _TREE, _is_tree, _ways(False)),
    Layout("oasst_best", _TREE, lambda obj: False, _ways(True)),
    Layout("oasst_messages", _FLAT, _is_message, _ways(False), _trees),
    Layout("oasst_messages_best", _FLAT, lambda obj: False, _ways(True), _trees),
)
