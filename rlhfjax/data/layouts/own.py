"""Records as this project has them, read as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields
from rlhfjax.data.labels import meaning
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import Layout, Object, Way
from rlhfjax.data.messages import ROLES
from rlhfjax.record_kinds import FIELDS, SETTINGS

NAME = "rlhfjax"
_THEIRS = {"response", "response_0", "response_1"}  # the answers of other layouts with a prompt


def is_conversation(value: Any, *last: str) -> bool:
    """Whether this is a list of messages with our role names, the last of one of the given roles."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and message.get("role") in ROLES for message in value)
        and all("function_call" not in message for message in value)
        and value[-1]["role"] in last
    )


def contains_prompt(obj: Object) -> bool:
    """Whether chosen and rejected are texts that both begin with the prompt."""
    prompt = obj.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or not _texts(obj, "chosen", "rejected"):
        return False
    return obj["chosen"].startswith(prompt) and obj["rejected"].startswith(prompt)


def _texts(obj: Object, *names: str) -> bool:
    return all(isinstance(obj.get(name), str) for name in names)


def _plainly(obj: Object) -> bool:
    """Nothing is there that other layouts know to read: a system prompt beside, tools as text, answers as messages."""
    twice = obj.get("messages") is not None and obj.get("prompt") is not None
    in_messages = any(isinstance(obj.get(name), (list, dict)) for name in ("completion", "chosen", "rejected"))
    return not (twice or in_messages or obj.get("system") or isinstance(obj.get("tools"), str) or _THEIRS & set(obj))


def _asks(obj: Object) -> bool:
    if not _plainly(obj):
        return False
    if obj.get("messages") is not None:
        return is_conversation(obj["messages"], "user", "tool")
    return _texts(obj, "prompt")


def _is_demonstration(obj: Object) -> bool:
    if not _plainly(obj) or meaning(obj.get("label")) is not None:
        return False
    if obj.get("messages") is not None:
        return is_conversation(obj["messages"], "assistant")
    return _texts(obj, "prompt", "completion")


def _is_comparison(obj: Object) -> bool:
    ranked = isinstance(obj.get("responses"), list) and isinstance(obj.get("ranks"), list)
    return _asks(obj) and (ranked or (_texts(obj, "chosen", "rejected") and not contains_prompt(obj)))


def _is_unpaired(obj: Object) -> bool:
    return _asks(obj) and _texts(obj, "completion") and meaning(obj.get("label")) is not None


def _take(kind: str, fields: Fields) -> list[Object]:
    names = FIELDS[kind] | (SETTINGS if "prompt" in FIELDS[kind] else set())
    return [{name: fields.pop(name) for name in sorted(names) if name in fields}]


def _prompt(fields: Fields) -> list[Object]:
    """The prompt as it is, whatever stands beside it; of a whole conversation what comes before the last answer."""
    (row,) = _take("prompt", fields)
    if is_conversation(row.get("messages"), "assistant"):
        row["messages"] = row["messages"][:-1]
    return [row]


_PROMPT = Way("prompt or messages as they are, without the last answer", _prompt)


def _own(kind: str, shape: str, fits: Callable[[Object], bool]) -> Layout:
    own = layout(NAME, shape, fits, kind, partial(_take, kind), f"{shape} as they are")
    ways = {**own.ways, "prompt": _PROMPT} if "prompt" in own.ways else own.ways
    return Layout(NAME, shape, fits, ways)


LAYOUTS = (
    _own("unpaired", "prompt or messages, completion, label", _is_unpaired),
    _own("comparison", "prompt or messages, responses and ranks or chosen and rejected", _is_comparison),
    _own("demonstration", "prompt and completion or messages", _is_demonstration),
    _own("prompt", "prompt or messages", _asks),
    _own("rating", "output_id, labeler_id, likert, flags", lambda obj: {"output_id", "likert"} <= set(obj)),
)
DOCUMENTS = (_own("document", "text", lambda obj: "text" in obj),)
ANY = Layout(
    NAME,
    "those of a record kind",
    lambda obj: False,
    {own.kinds[0]: own.ways[own.kinds[0]] for own in (*LAYOUTS, *DOCUMENTS)},
)
"""All of them, for whoever names the layout and need not have it recognised."""
