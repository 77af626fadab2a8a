"""Whole conversations: ShareGPT and OpenAI's chat form, alone, with two last answers, or with a label.

Sources: FastChat and axolotl (`conversations` of from and value), LLaMA-Factory's data README (its preference and KTO
forms, observation and function_call), OpenAI's fine-tuning guides (messages with weights; input, preferred_output).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields
from rlhfjax.data.labels import meaning, take_label
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Layout, Object, Way
from rlhfjax.data.layouts.preferences import DIFFER, compared
from rlhfjax.data.layouts.turns import Message, answer_text, to_last_answer, tools, turns, with_system

_LABELS = ("kto_tag", "label")


def _opened(key: str, fields: Fields) -> list[Message]:
    return with_system(fields, turns(fields, key, fields.take(key, list, "a list of messages")))


def _conversation(key: str, fields: Fields) -> list[Object]:
    messages = _opened(key, fields)
    return [{"messages": to_last_answer(fields, key, messages), **tools(fields)}]


def _question(key: str, fields: Fields) -> list[Object]:
    """What is to be answered: the conversation without its last answer, if it ends with one."""
    messages = _opened(key, fields)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return [{"messages": messages, **tools(fields)}]


def _preferred(key: str, fields: Fields) -> list[Object]:
    return compared(fields, _opened(key, fields), fields.pop("chosen"), fields.pop("rejected"))


def _judged(key: str, fields: Fields) -> list[Object]:
    messages = _opened(key, fields)
    label = next((name for name in _LABELS if name in fields), _LABELS[0])
    *before, answer = to_last_answer(fields, key, messages)
    given = {"completion": answer_text(fields, key, answer), "label": take_label(fields, label)}
    return [{"messages": before, **given, **tools(fields)}]


def _openai_preferred(fields: Fields) -> list[Object]:
    given = Fields(fields.kind, fields.take("input", dict, "an object with messages"), f"{fields.where}: input")
    asked = _opened("messages", given)
    row = compared(fields, asked, fields.pop("preferred_output"), fields.pop("non_preferred_output"))
    beside = {**tools(given), **given.left}
    return [{**beside, **each} for each in row]


def _is(key: str) -> Callable[[Object], bool]:
    def fits(obj: Object) -> bool:
        value = obj.get(key)
        return isinstance(value, list) and bool(value) and all(_says_who(message) for message in value)

    return fits


def _says_who(message: Any) -> bool:
    return isinstance(message, dict) and ("role" in message or "from" in message)


def _labelled(obj: Object) -> bool:
    return any(meaning(obj.get(name)) is not None for name in _LABELS)


def _both(obj: Object) -> bool:
    return all(obj.get(name) is not None for name in ("chosen", "rejected"))


def _family(name: str, key: str) -> tuple[Layout, ...]:
    """A key that holds conversations, with a label, with two last answers, and alone."""
    conversation = layout(
        name,
        key,
        lambda obj: _is(key)(obj) and not _labelled(obj),
        "demonstration",
        partial(_conversation, key),
        f"{key} → messages, to the last answer",
    )
    asked = Way(f"{key} → messages, without the answer they end with", partial(_question, key))
    return (
        layout(
            f"{name}_kto",
            f"{key}, kto_tag or label",
            lambda obj: _is(key)(obj) and _labelled(obj),
            "unpaired",
            partial(_judged, key),
            f"{key} before the last answer → messages, the last answer → completion, kto_tag or label → label",
        ),
        layout(
            f"{name}_preference",
            f"{key}, chosen, rejected",
            lambda obj: _is(key)(obj) and _both(obj) and "prompt" not in obj,
            "comparison",
            partial(_preferred, key),
            f"{key} → messages, chosen and rejected → the two responses",
            DIFFER,
        ),
        Layout(name, key, conversation.fits, {**conversation.ways, "prompt": asked}),
    )


LAYOUTS = (
    layout(
        "openai_preference",
        "input, preferred_output, non_preferred_output",
        lambda obj: (
            {"input", "preferred_output", "non_preferred_output"} <= set(obj) and isinstance(obj["input"], dict)
        ),
        "comparison",
        _openai_preferred,
        "input.messages → messages, preferred_output and non_preferred_output → the two responses, input.tools → tools",
        DIFFER,
    ),
    *_family("sharegpt", "conversations"),
    *_family("openai_chat", "messages"),
    *_family("conversation", "conversation"),
)
