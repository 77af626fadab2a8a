"""Records as this project has them, read as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import READ, Layout, Object
from rlhfjax.data.messages import ROLES

NAME = "rlhfjax"


def is_conversation(value: Any, *last: str) -> bool:
    """Whether this is a list of messages with our role names, the last of one of the given roles."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and message.get("role") in ROLES for message in value)
        and all("function_call" not in message for message in value)
        and value[-1]["role"] in last
    )


def _texts(obj: Object, *names: str) -> bool:
    return all(isinstance(obj.get(name), str) for name in names)


def _asks(obj: Object) -> bool:
    """A prompt of ours, and nothing beside it that we would read in another way."""
    if obj.get("system") or isinstance(obj.get("tools"), str):
        return False
    if obj.get("messages") is not None:
        return is_conversation(obj["messages"], "user", "tool")
    return _texts(obj, "prompt")


def _is_demonstration(obj: Object) -> bool:
    if obj.get("system") or isinstance(obj.get("tools"), str):
        return False
    if obj.get("messages") is not None:
        return is_conversation(obj["messages"], "assistant")
    return _texts(obj, "prompt", "completion") and not isinstance(obj.get("label"), bool)


def _is_comparison(obj: Object) -> bool:
    ranked = isinstance(obj.get("responses"), list) and isinstance(obj.get("ranks"), list)
    return _asks(obj) and (ranked or _texts(obj, "chosen", "rejected"))


def _is_unpaired(obj: Object) -> bool:
    return _asks(obj) and _texts(obj, "completion") and isinstance(obj.get("label"), bool)


def _take(kind: str, fields: Fields) -> list[Object]:
    return [{name: fields.pop(name) for name in sorted(READ[kind]) if name in fields}]


def _own(kind: str, shape: str, fits: Callable[[Object], bool]) -> Layout:
    return layout(NAME, shape, fits, kind, partial(_take, kind), f"{shape} as they are")


LAYOUTS = (
    _own("unpaired", "prompt or messages, completion, label", _is_unpaired),
    _own("comparison", "prompt or messages, responses and ranks or chosen and rejected", _is_comparison),
    _own("demonstration", "prompt and completion or messages", _is_demonstration),
    _own("prompt", "prompt or messages", _asks),
    _own("rating", "output_id, labeler_id, likert, flags", lambda obj: {"output_id", "likert"} <= set(obj)),
    _own("document", "text", lambda obj: "text" in obj),
)
ANY = Layout(
    NAME, "those of a record kind", lambda obj: False, {own.kinds[0]: own.ways[own.kinds[0]] for own in LAYOUTS}
)
"""All of them, for whoever names the layout and need not have it recognised."""
