"""Labels of one answer: a boolean, or the word for it, which is all that a CSV file can hold."""

from typing import Any

from rlhfjax.data.fields import Fields

_WORDS = {"true": True, "false": False}


def meaning(value: Any) -> bool | None:
    """What a label says; None for what is none, such as the number of a class."""
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def take_label(fields: Fields, name: str) -> bool:
    """The label in a field that must be there. Raises DataError for what is no label."""
    said = meaning(fields.left.get(name))
    if said is None:
        return fields.take(name, bool, "true or false")
    fields.pop(name)
    return said
