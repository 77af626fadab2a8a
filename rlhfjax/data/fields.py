"""Checks on one decoded JSON object: take a field, or say where it is, what was expected and what was got."""

import difflib
import re
from typing import Any

from rlhfjax.errors import DataError

_MAX_DEPTH = 100
_SHOWN = 12  # fields named in an error
_SURROGATE = re.compile("[\ud800-\udfff]")
_OPTIONAL = frozenset(
    {"prompt", "messages", "completion", "responses", "ranks", "chosen", "rejected", "tools", "chat_template_kwargs"}
    | {"prompt_id", "labeler_id", "use_case"}
)
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
        if not value.isascii() and _SURROGATE.search(value):
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
    """The fields of one object: taken one by one with their checks; what nobody took is the record's `extra`.

    A field that holds null counts as absent where it may be absent: tables have a value for every column.
    """

    def __init__(self, kind: str, obj: dict[str, Any], where: str):
        self.kind, self.where, self.left = kind, where, dict(obj)
        self._names = sorted(name for name in obj if isinstance(name, str))

    def __contains__(self, name: str) -> bool:
        return self.left.get(name) is not None

    def error(self, name: str, expected: str, got: str, remedy: str = "") -> DataError:
        """The error to raise about the field `name`."""
        return DataError(f"{self.where}: {name}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")

    def take(self, name: str, kind: type, expected: str) -> Any:
        """The value of a field that must be there and of exactly this type."""
        if name not in self.left:
            near = difflib.get_close_matches(name, self.left, 1)
            hint = f" (is {near[0]!r} meant?)" if near else ""
            there = f"the fields {', '.join(self._names[:_SHOWN])}" if self._names else "an object without fields"
            raise self.error(name, f"this field in a {self.kind}", f"{there}{hint}")
        value = self.left.pop(name)
        if type(value) is not kind:  # a boolean is an int to isinstance
            raise self.error(name, expected, type_name(value))
        return value

    def pop(self, name: str) -> Any:
        """The value of a field that may be absent and of any type; None where it is."""
        return self.left.pop(name, None)

    def text(self, name: str) -> str:
        """A string with more in it than white space."""
        value = self.take(name, str, "a string")
        if not value.strip():
            raise self.error(name, "text", "nothing but white space" if value else "an empty string", "drop the record")
        return value

    def optional(self, *names: str) -> dict[str, Any]:
        """Those of the named text fields that the object has."""
        return {name: self.text(name) for name in names if name in self}

    def identity(self, name: str) -> str:
        """An id, as text: many tools number people and prompts."""
        if type(self.left.get(name)) is int:
            self.left[name] = str(self.left[name])
        return self.text(name)

    def ids(self, *names: str) -> dict[str, Any]:
        """Those of the named ids that the object has."""
        return {name: self.identity(name) for name in names if name in self}

    def rest(self) -> dict[str, Any]:
        """The fields that nobody took, under `extra`; fields of records that hold null are none."""
        left = {name: value for name, value in self.left.items() if value is not None or name not in _OPTIONAL}
        return {"extra": left} if left else {}

    def objects(self, name: str) -> list[dict[str, Any]]:
        """A list of objects."""
        value = self.take(name, list, "a list of objects")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                raise self.error(f"{name}[{index}]", "an object", type_name(item))
        return value

    def not_both(self, one: str, other: str) -> None:
        """Refuses two fields that say the same thing in two ways."""
        if one in self and other in self:
            raise self.error(one, f"either {one} or {other}", "both", "keep the one that is meant")
