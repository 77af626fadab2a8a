"""Instructions with their answers: alpaca with its kin, dolly, self-instruct.

They are read as messages, so that what is asked and what is answered stand apart in every model's own way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.labels import meaning, take_label
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Layout, Object
from rlhfjax.data.layouts.turns import Message, tools, with_system

_Ask = Callable[[Fields], list[Message]]


def has(*names: str) -> Callable[[Object], bool]:
    """A test whether a row has text in all of these fields."""
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
    for index, pair in enumerate(fields.take("history", list, "a list of pairs") if "history" in fields else []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise fields.error(f"history[{index}]", "a pair of texts, asked and answered", type_name(pair))
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def answered(ask: _Ask, answer: str, fields: Fields) -> list[Object]:
    """The demonstration in what `ask` makes of the row and the text in its field `answer`."""
    messages = ask(fields)
    said = {"role": "assistant", "content": fields.text(answer)}
    return [{"messages": [*messages, said], **tools(fields)}]


def asked_alone(ask: _Ask, fields: Fields) -> list[Object]:
    """The prompt that `ask` makes of the row; the field with its answer stays beside."""
    messages = ask(fields)
    return [{"messages": messages, **tools(fields)}]


def compared_after(ask: _Ask, fields: Fields) -> list[Object]:
    """The comparison of the texts in chosen and rejected after what `ask` makes of the row."""
    messages = ask(fields)
    pair = {name: fields.take(name, str, "a string") for name in ("chosen", "rejected")}
    return [{"messages": messages, **pair, **tools(fields)}]


def _judged(ask: _Ask, answer: str, label: str, fields: Fields) -> list[Object]:
    messages = ask(fields)
    given: dict[str, Any] = {"completion": fields.text(answer), "label": take_label(fields, label)}
    return [{"messages": messages, **given, **tools(fields)}]


def _seed_task(fields: Fields) -> list[Object]:
    """One demonstration for every instance of a task (Wang et al. 2023, self-instruct)."""
    instruction = fields.text("instruction")
    rows = []
    for index, instance in enumerate(fields.take("instances", list, "a list of instances")):
        where = f"{fields.where}: instances[{index}]"
        if not isinstance(instance, dict):
            raise fields.error(f"instances[{index}]", "an object with input and output", type_name(instance))
        given = Fields(fields.kind, {**instance, "instruction": instruction}, where)
        rows += answered(partial(_instruction, "input"), "output", given)
    return rows


_alpaca = partial(_instruction, "input")
_ALPACA = "system + history + instruction + input → the conversation before the answer"
LAYOUTS: tuple[Layout, ...] = (
    layout(
        "alpaca_kto",
        "instruction, input, output, kto_tag",
        lambda obj: has("instruction", "output")(obj) and meaning(obj.get("kto_tag")) is not None,
        "unpaired",
        partial(_judged, _alpaca, "output", "kto_tag"),
        f"{_ALPACA}, output → completion, kto_tag → label",
    ),
    layout(
        "alpaca_preference",
        "instruction, input, chosen, rejected",
        has("instruction", "chosen", "rejected"),
        "comparison",
        partial(compared_after, _alpaca),
        f"{_ALPACA}, chosen and rejected → the two responses",
    ),
    layout(
        "alpaca",
        "instruction, input, output",
        has("instruction", "output"),
        "demonstration",
        partial(answered, _alpaca, "output"),
        f"{_ALPACA}, output → the answer",
        asked=partial(asked_alone, _alpaca),
    ),
    layout(
        "dolly",
        "instruction, context, response",
        has("instruction", "response"),
        "demonstration",
        partial(answered, partial(_instruction, "context"), "response"),
        "system + instruction + context → what is asked, response → the answer",
        asked=partial(asked_alone, partial(_instruction, "context")),
    ),
    layout(
        "self_instruct",
        "instruction, instances",
        lambda obj: has("instruction")(obj) and isinstance(obj.get("instances"), list),
        "demonstration",
        _seed_task,
        "instruction + each instance's input → what is asked, its output → the answer",
    ),
)
