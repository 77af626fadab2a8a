"""A layout that the user spells out: our field = their field."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts import conversations, own, preferences
from rlhfjax.data.layouts.layout import Layout, Object, Way
from rlhfjax.record_kinds import MAY_MISS, kind_of_map

_OURS = (*own.LAYOUTS, *own.DOCUMENTS)
_READERS = (*_OURS, *preferences.LAYOUTS, *conversations.LAYOUTS)


def mapped(mapping: Mapping[str, str]) -> Layout:
    """The layout in which our field `name` is their field `mapping[name]`; a dotted path goes into objects.

    Raises ConfigError for a name that no record has, and where the names make up no record.
    """
    words = ", ".join(f"{theirs} → {ours}" for ours, theirs in mapping.items())
    ways = {kind: Way(words, partial(_taken, dict(mapping), kind)) for kind in _given_with(kind_of_map(mapping))}
    return Layout("map", ", ".join(mapping.values()), lambda obj: True, ways)


def _given_with(kind: str) -> tuple[str, ...]:
    """The record kind and those that follow from it."""
    return next(layout.kinds for layout in _OURS if layout.kinds[0] == kind)


def _taken(mapping: Mapping[str, str], kind: str, fields: Fields) -> list[Object]:
    """The mapped fields, read as ours, or as messages where they hold such."""
    roots = {path: path if path in fields.left else path.partition(".")[0] for path in mapping.values()}
    there = {ours: path for ours, path in mapping.items() if ours not in MAY_MISS or roots[path] in fields.left}
    row = {ours: value for ours, path in there.items() if (value := _at(fields, path)) is not None}
    for root in roots.values():
        fields.pop(root)
    for layout in _READERS:
        if kind in layout.kinds and layout.fits(row):
            return layout.rows(kind, row, fields.where)
    return [row]


def _at(fields: Fields, path: str) -> Any:
    """What lies at a dotted path; a whole name with dots in it goes first. Raises DataError where nothing does."""
    if path in fields.left:
        return fields.left[path]
    value: Any = fields.left
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type_name(value)
            raise fields.error(path, f"the field {name!r} that --map names", f"the fields {there}")
        value = value[name]
    return value
