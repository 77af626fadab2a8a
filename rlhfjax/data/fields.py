"""Checks on one decoded JSON object: take a field, or say where it is, what was expected and what was got."""

import difflib
from typing import Any

from rlhfjax.errors import DataError

_MAX_DEPTH = 100
ROLES = ("system", "user", "assistant")
_JSON_TYPES = {
    str: "a string",
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def check_values(value: Any, where: str, name: str = "", depth: int = 0) -> None:
    """Refuses what cannot be stored: half surrogate pairs, NUL, and objects nested more than 100 deep."""
    if isinstance(value, str):
        place = name or "a field name"
        if "\0" in value:
            raise DataError(f"{where}: {place}: expected text, got a NUL character; remove it")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{where}: {place}: expected Unicode text, got half of a surrogate pair; write both halves")
    elif isinstance(value, (dict, list)):
        if depth == _MAX_DEPTH:
            raise DataError(f"{where}: expected values nested at most {_MAX_DEPTH} deep, got deeper ones; flatten them")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                check_values(key, where)
            inner = f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}" if name else key
            check_values(item, where, inner, depth + 1)


def type_name(value: Any) -> str:
    """The JSON name of a value's type, for error messages."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


class Fields:
    """The fields of one object: taken one by one with their checks; what nobody took is the record's `extra`."""

    def __init__(self, kind: str, obj: dict[str, Any], where: str):
        self.kind, self.where, self._left = kind, where, dict(obj)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def error(self, name: str, expected: str, got: str, remedy: str = "") -> DataError:
        """The error to raise about the field `name`."""
        return DataError(f"{self.where}: {name}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")

    def take(self, name: str, kind: type, expected: str) -> Any:
        """The value of a field that must be there and of exactly this type."""
        if name not in self._left:
            near = difflib.get_close_matches(name, self._left, 1)
            hint = f" (is {near[0]!r} meant?)" if near else ""
            raise self.error(name, f"this field in a {self.kind}", f"an object without it{hint}")
        value = self._left.pop(name)
        if type(value) is not kind:  # a boolean is an int to isinstance
            raise self.error(name, expected, type_name(value))
        return value

    def text(self, name: str) -> str:
        """A string with more in it than white space."""
        value = self.take(name, str, "a string")
        if not value.strip():
            raise self.error(name, "text", "nothing but white space" if value else "an empty string", "drop the record")
        return value

    def optional(self, *names: str) -> dict[str, Any]:
        """Those of the named text fields that the object has."""
        return {name: self.text(name) for name in names if name in self._left}

    def rest(self) -> dict[str, Any]:
        """The fields that nobody took, under `extra`."""
        return {"extra": self._left} if self._left else {}

    def messages(self, last: str) -> dict[str, Any]:
        """Checked `messages` whose last one is of role `last` and where what is to be answered is not empty."""
        messages = self.take("messages", list, "a list of {role, content}")
        for index, message in enumerate(messages):
            self._check_message(f"messages[{index}]", message)
        if not messages or messages[-1]["role"] != last:
            got = f"one from the {messages[-1]['role']}" if messages else "an empty list"
            raise self.error("messages", f"the last message of a {self.kind} from the {last}", got)
        must_speak = messages[-2:] if last == "assistant" else messages[-1:]
        if len(messages) < (2 if last == "assistant" else 1):
            raise self.error("messages", "a message to answer before the answer", "the answer alone")
        for message in must_speak:
            if not message["content"].strip():
                raise self.error("messages", f"text in the last {message['role']} message", "an empty prompt or answer")
        return {"messages": messages}

    def _check_message(self, name: str, message: Any) -> None:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            got = f"the fields {sorted(message)}" if isinstance(message, dict) else type_name(message)
            raise self.error(name, "an object with exactly role and content", got)
        if message["role"] not in ROLES:
            raise self.error(f"{name}.role", f"one of {', '.join(ROLES)}", repr(message["role"])[:40])
        if not isinstance(message["content"], str):
            raise self.error(f"{name}.content", "a string", type_name(message["content"]))

    def prompt(self) -> dict[str, Any]:
        """`messages` ending with the user, or a `prompt` string; not both."""
        self.not_both("messages", "prompt")
        return self.messages("user") if "messages" in self else {"prompt": self.text("prompt")}

    def not_both(self, one: str, other: str) -> None:
        """Refuses two fields that say the same thing in two ways."""
        if one in self and other in self:
            raise self.error(one, f"either {one} or {other}", "both", "keep the one that is meant")
