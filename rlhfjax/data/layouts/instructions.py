"""Instructions and questions with their answers: alpaca, dolly, self-instruct, GSM8K and their kin.

They are read as messages, so that what is asked and what is answered stand apart in every model's own way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Layout, Object
from rlhfjax.data.layouts.turns import Message, tools, with_system

_Ask = Callable[[Fields], list[Message]]


def _has(*names: str) -> Callable[[Object], bool]:
    return lambda obj: all(isinstance(obj.get(name), str) for name in names)


def _instruction(about: str, fields: Fields) -> list[Message]:
    """The instruction, a line below it what it is about (if anything), after what was said before."""
    parts = [fields.text("instruction")]
    if about in fields:
        parts.append(fields.take(about, str, "a string"))
    asked = {"role": "user", "content": "\n".join(part for part in parts if part.strip())}
    return with_system(fields, [*_history(fields), asked])


def _history(fields: Fields) -> list[Message]:
    messages = []
    for index, pair in enumerate(fields.pop("history") or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise fields.error(f"history[{index}]", "a pair of texts, asked and answered", type_name(pair))
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _answered(ask: _Ask, answer: str, fields: Fields) -> list[Object]:
    messages = ask(fields)
    said = {"role": "assistant", "content": fields.text(answer)}
    return [{"messages": [*messages, said], **tools(fields)}]


def _compared(ask: _Ask, fields: Fields) -> list[Object]:
    messages = ask(fields)
    pair = {name: fields.take(name, str, "a string") for name in ("chosen", "rejected")}
    return [{"messages": messages, **pair, **tools(fields)}]


def _judged(ask: _Ask, answer: str, label: str, fields: Fields) -> list[Object]:
    messages = ask(fields)
    given: dict[str, Any] = {"completion": fields.text(answer), "label": fields.take(label, bool, "true or false")}
    return [{"messages": messages, **given, **tools(fields)}]


_alpaca = partial(_instruction, "input")
_ALPACA = "system + history + instruction + input → the conversation before the answer"
LAYOUTS: tuple[Layout, ...] = (
    layout(
        "alpaca_kto",
        "instruction, input, output, kto_tag",
        lambda obj: _has("instruction", "output")(obj) and isinstance(obj.get("kto_tag"), bool),
        "unpaired",
        partial(_judged, _alpaca, "output", "kto_tag"),
        f"{_ALPACA}, output → completion, kto_tag → label",
    ),
    layout(
        "alpaca_preference",
        "instruction, input, chosen, rejected",
        _has("instruction", "chosen", "rejected"),
        "comparison",
        partial(_compared, _alpaca),
        f"{_ALPACA}, chosen and rejected → the two responses",
    ),
    layout(
        "alpaca",
        "instruction, input, output",
        _has("instruction", "output"),
        "demonstration",
        partial(_answered, _alpaca, "output"),
        f"{_ALPACA}, output → the answer",
    ),
    layout(
        "dolly",
        "instruction, context, response",
        _has("instruction", "response"),
        "demonstration",
        partial(_answered, partial(_instruction, "context"), "response"),
        "instruction + context → the user's message, response → the answer",
    ),
)
