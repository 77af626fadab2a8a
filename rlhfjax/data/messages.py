"""Conversations in records: what a message may hold, checked and written in one way.

A message is {role, content}, and optionally `name`, `tool_calls`, `tool_call_id`, `reasoning_content`, `weight` (0
leaves an answer out of the loss, 1 trains it). Further fields are kept as they are: a chat template may read them.
"""

import json
from typing import Any

from rlhfjax.data.fields import Fields, type_name

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("name", "tool_call_id", "reasoning_content")


def conversation(fields: Fields, last: str) -> dict[str, Any]:
    """Checked `messages` whose last one is of role `last`, with what the record says to its chat template beside them.

    What is to be answered may come from a tool as well as from the user, and is not empty; nor is the answer.
    """
    given = fields.take("messages", list, "a list of {role, content}")
    messages = [checked(fields, f"messages[{index}]", message) for index, message in enumerate(given)]
    if not messages or messages[-1]["role"] not in (("user", "tool") if last == "user" else (last,)):
        got = f"one from the {messages[-1]['role']}" if messages else "an empty list"
        raise fields.error("messages", f"the last message of a {fields.kind} from the {last}", got)
    if len(messages) < (2 if last == "assistant" else 1):
        raise fields.error("messages", "a message to answer before the answer", "the answer alone")
    for message in messages[-2:] if last == "assistant" else messages[-1:]:
        if not (message["content"].strip() or message.get("tool_calls") or message["role"] == "tool"):
            raise fields.error("messages", f"text in the last {message['role']} message", "an empty prompt or answer")
    return {"messages": messages, **settings(fields)}


def prompt(fields: Fields) -> dict[str, Any]:
    """`messages` ending with the user, or a `prompt` string; not both."""
    fields.not_both("messages", "prompt")
    if "messages" in fields:
        return conversation(fields, "user")
    return {"prompt": fields.text("prompt"), **settings(fields)}


def settings(fields: Fields) -> dict[str, Any]:
    """What a record may say to its chat template beside the messages: `tools` and `chat_template_kwargs`."""
    given = {"tools": fields.objects("tools")} if "tools" in fields else {}
    if "chat_template_kwargs" in fields:
        given["chat_template_kwargs"] = fields.take("chat_template_kwargs", dict, "an object")
    return {name: value for name, value in given.items() if value}


def checked(fields: Fields, name: str, message: Any) -> dict[str, Any]:
    """A message with its content as text, null and empty fields left out. Raises what `fields.error` makes.

    Content parts of type text are joined. Content may be null beside `tool_calls`, and becomes "". Arguments of a call
    that are the text of a JSON object (so OpenAI's interface writes them) become that object, which is what chat
    templates are documented to get.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        got = f"the fields {', '.join(sorted(map(str, message)))}" if isinstance(message, dict) else type_name(message)
        raise fields.error(name, "an object with role and content", got)
    if message["role"] not in ROLES:
        raise fields.error(f"{name}.role", f"one of {', '.join(ROLES)}", repr(message["role"])[:40])
    more = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    more.pop("role")
    content = _text(fields, f"{name}.content", more.pop("content", message.get("content")), "tool_calls" in more)
    for key in _TEXTS:
        if key in more and not isinstance(more[key], str):
            raise fields.error(f"{name}.{key}", "a string", type_name(more[key]))
    if "weight" in more:
        if more["weight"] not in (0, 1):
            raise fields.error(f"{name}.weight", "0 (left out of the loss) or 1 (trained)", "another value")
        more["weight"] = int(more["weight"])
    if "tool_calls" in more:
        more["tool_calls"] = _calls(fields, f"{name}.tool_calls", more["tool_calls"])
    return {"role": message["role"], "content": content, **more}


def _text(fields: Fields, name: str, content: Any, may_be_null: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        raise fields.error(name, "a string", type_name(content))
    texts = []
    for index, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            got = repr(part.get("type"))[:40] if isinstance(part, dict) else type_name(part)
            raise fields.error(f"{name}[{index}]", "a part of type text", got, "models here read text alone")
        texts.append(part["text"])
    return "".join(texts)


def _calls(fields: Fields, name: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise fields.error(name, "a list of objects", type_name(calls))
    for index, call in enumerate(calls):
        if not isinstance(call, dict):
            raise fields.error(f"{name}[{index}]", "an object", type_name(call))
    return [_with_arguments(call) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
