"""Conversations as people write them: the names of the roles, tools and calls, and what two answers share."""

import json
from collections.abc import Sequence
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.layout import Object

Message = dict[str, Any]
_NAMES = {
    "system": "system",
    "developer": "developer",
    "user": "user human prompter instruction",
    "assistant": "assistant gpt model bot chatgpt chatbot bing bard function_call",
    "tool": "tool observation function function_response ipython environment",
}
_SPELLINGS = (("role", "content"), ("from", "value"), ("author", "text"))
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}


def turns(fields: Fields, name: str, value: Any, alone: str = "") -> list[Message]:
    """Messages from a list of {role, content}, {from, value} or {author, text}, or from one of them.

    A plain text becomes one message of the role `alone`, where there is one. Raises DataError for anything else.
    """
    if isinstance(value, str) and alone:
        return [{"role": alone, "content": value}]
    if isinstance(value, dict):
        return [_turn(fields, name, value)]
    if value is None:
        fields.take(name, list, "a list of messages")
    if not isinstance(value, list):
        raise fields.error(name, "a list of messages", type_name(value))
    return [_turn(fields, f"{name}[{index}]", item) for index, item in enumerate(value)]


def _turn(fields: Fields, name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise fields.error(name, "an object with role and content", type_name(item))
    more = {key: value for key, value in item.items() if value is not None}
    said, text = next((names for names in _SPELLINGS if names[0] in more), _SPELLINGS[0])
    role, content = more.pop(said, None), more.pop(text, None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        got = f"the fields {', '.join(sorted(map(str, item)))}" if role is None else repr(role)[:40]
        raise fields.error(f"{name}.{said}", f"one of {', '.join(ROLES)}", got)
    call = more.pop("function_call", None)  # what `tool_calls` were called before
    if role == "function_call":
        call, content = _call(fields, f"{name}.{text}", content), ""
    if call:
        calls = call if isinstance(call, list) else [call]
        more["tool_calls"] = [{"type": "function", "function": each} for each in calls]
    return {"role": ROLES[role.lower()], "content": content, **more}


def _call(fields: Fields, name: str, text: Any) -> Any:
    try:
        call = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        call = None
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(each, dict) and "name" in each for each in calls):
        raise fields.error(name, "the JSON of a call, with name and arguments", type_name(text))
    return calls


def with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """The messages after the row's `system` (or `system_prompt`), unless they have one of their own."""
    if messages and messages[0]["role"] in ("system", "developer"):
        return messages
    for name in ("system", "system_prompt"):
        if name in fields:
            text = fields.take(name, str, "a string")
            return [{"role": "system", "content": text}, *messages] if text.strip() else messages
    return messages


def tools(fields: Fields) -> Object:
    """The row's tools as templates read them, whether listed or written as JSON, named bare or as type function."""
    if "tools" not in fields:
        return {}
    given = fields.pop("tools")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else []
        except (ValueError, RecursionError):
            raise fields.error("tools", "a list of tools, or its JSON", "other text") from None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise fields.error("tools", "a list of objects", type_name(given))
    return {"tools": [_tool(tool) for tool in given]} if given else {}


def _tool(tool: Object) -> Object:
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def to_last_answer(fields: Fields, name: str, messages: Sequence[Message]) -> list[Message]:
    """The messages up to the last answer. Raises DataError where there is none."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise fields.error(name, "a conversation with an answer in it", f"{len(messages)} messages without one")
    return list(messages[: answers[-1] + 1])


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common at the start, the last of the shorter one never among them."""
    length = 0
    while length < min(len(one), len(other)) - 1 and one[length] == other[length]:
        length += 1
    return length


def answer_text(fields: Fields, name: str, message: Message) -> str:
    """The text of an answer that is compared with others. Raises DataError for a call of a tool."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if message["role"] != "assistant" or message.get("tool_calls") or not isinstance(content, str):
        got = "a call of a tool" if message.get("tool_calls") else f"{type_name(content)} from the {message['role']}"
        raise fields.error(name, "an answer of the assistant in text", got)
    return content
