"""A layout that the user spells out: our field = their field."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rlhfjax.data.fields import Fields, type_name
from rlhfjax.data.layouts.derived import layout
from rlhfjax.data.layouts.layout import READ, Layout, Object
from rlhfjax.errors import ConfigError

_IDS = ("prompt_id", "labeler_id", "use_case", "tools", "chat_template_kwargs", "system")
_NEEDS = (  # what says which kind is meant, the richest first
    ("comparison", {"chosen", "rejected"}),
    ("comparison", {"responses", "ranks"}),
    ("unpaired", {"completion", "label"}),
    ("demonstration", {"completion"}),
    ("demonstration", {"messages"}),
    ("prompt", {"prompt"}),
    ("rating", {"output_id", "likert"}),
    ("document", {"text"}),
)


def mapped(mapping: Mapping[str, str]) -> Layout:
    """The layout in which our field `name` is their field `mapping[name]`; a dotted path goes into objects.

    Raises ConfigError for a name that no record has, and where the names make up no record.
    """
    known = sorted(frozenset().union(*READ.values()) | set(_IDS))
    for name in mapping:
        if name not in known:
            ours = ", ".join(known)
            raise ConfigError(f"--map {name}={mapping[name]}: expected a field of ours ({ours}), got {name!r}")
    kinds = [kind for kind, needs in _NEEDS if needs <= set(mapping)]
    if not kinds:
        raise ConfigError(
            f"--map: expected the fields of a record kind (such as prompt and completion), got {', '.join(mapping)}"
        )
    words = ", ".join(f"{theirs} → {ours}" for ours, theirs in mapping.items())
    return layout("map", ", ".join(mapping.values()), lambda obj: True, kinds[0], partial(_taken, dict(mapping)), words)


def _taken(mapping: Mapping[str, str], fields: Fields) -> list[Object]:
    row = {ours: _at(fields, theirs) for ours, theirs in mapping.items()}
    for path in mapping.values():
        fields.pop(path.partition(".")[0])
    return [{name: value for name, value in row.items() if value is not None}]


def _at(fields: Fields, path: str) -> Any:
    """What lies at a dotted path; a whole name with dots in it goes first. Raises DataError where nothing does."""
    if path in fields.left:
        return fields.pop(path)
    value: Any = fields.left
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type_name(value)
            raise fields.error(path, f"the field {name!r} that --map names", f"the fields {there}")
        value = value[name]
    return value
