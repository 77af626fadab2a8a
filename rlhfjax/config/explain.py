"""Mistakes of a configuration, in the words of its file: where, which key, what was expected, what was got."""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhfjax.config.reading import Path, dotted


def problems(error: ValidationError, schema: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Each problem as (path of the key it belongs to, one line); `schema` is the JSON Schema of what was validated."""
    for detail in error.errors(include_url=False):
        path: Path = tuple(detail["loc"])
        name = dotted(path)
        match detail["type"]:
            case "extra_forbidden":
                yield path, f"{name}: unknown key{_nearest(path, schema)}"
            case "missing":
                yield path[:-1], f"{name}: missing; expected {expected(_at(schema, path), schema)}"
            case "value_error":
                message = detail["msg"].removeprefix("Value error, ")
                yield path, f"{name}: {message}" if name else message
            case _:
                yield path, f"{name or 'the configuration'}: {_mismatch(detail, path, schema)}"


def _mismatch(detail: ErrorDetails, path: Path, schema: dict[str, Any]) -> str:
    wanted = expected(_at(schema, path), schema)
    return f"expected {wanted}, got {shown(detail['input'])}"


def shown(value: Any) -> str:
    """A value as an error shows it: short, text in quotes, sections by their size."""
    if isinstance(value, dict):
        return f"a section with {', '.join(list(value)[:4])}" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def expected(part: dict[str, Any] | None, schema: dict[str, Any]) -> str:
    """A JSON Schema in words: `a number > 0`, `one of linear, cosine`, `a list of sections (source, split, …)`."""
    part = _resolve(part, schema)
    if part is None:
        return "another value"
    if "anyOf" in part:
        return " or ".join(expected(option, schema) for option in part["anyOf"])
    if "enum" in part:
        return f"one of {', '.join(str(choice) for choice in part['enum'])}"
    if "const" in part:
        return str(part["const"])
    return _expected_type(part, schema)


def _expected_type(part: dict[str, Any], schema: dict[str, Any]) -> str:
    match part.get("type"):
        case "array":
            least = f" of at least {part['minItems']}" if "minItems" in part else ""
            return f"a list{least}, each {expected(part.get('items'), schema)}"
        case "object":
            return f"a section ({', '.join(part.get('properties', {}))})"
        case "string":
            return f"text that matches {part['pattern']}" if "pattern" in part else "text"
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case kind:
            return " ".join(["a whole number" if kind == "integer" else "a number", *_limits(part)])


def _limits(part: dict[str, Any]) -> list[str]:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    found = [f"{sign} {part[key]}" for key, sign in signs.items() if key in part]
    return [" and ".join(found)] if found else []


def _resolve(part: dict[str, Any] | None, schema: dict[str, Any]) -> dict[str, Any] | None:
    while part and "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]
    return part


def _at(schema: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The part of a JSON Schema that describes the value at a path; None where there is none."""
    part: dict[str, Any] | None = schema
    for name in path:
        part = _resolve(part, schema)
        for option in (part or {}).get("anyOf", [part]):
            option = _resolve(option, schema) or {}
            named = option.get("properties", {}).get(name, option.get("additionalProperties") or None)
            child = option.get("items") if isinstance(name, int) else named
            if child is not None:
                break
        else:
            return None
        part = child
    return part


def _keys(part: dict[str, Any] | None, schema: dict[str, Any]) -> list[str]:
    part = _resolve(part, schema) or {}
    options = [_resolve(option, schema) or {} for option in part.get("anyOf", [part])]
    return [key for option in options for key in option.get("properties", {})]


def _nearest(path: Path, schema: dict[str, Any]) -> str:
    """`; did you mean …?`: a near name in the same section, else where in the file that very name belongs."""
    siblings, key = _keys(_at(schema, path[:-1]), schema), str(path[-1])
    near = [(*path[:-1], name) for name in difflib.get_close_matches(key, siblings, n=1)]
    everywhere = list(_all_paths(schema, schema))
    elsewhere = [found for found in everywhere if found[-1] == key]
    inside = [found for found in everywhere if found[: len(path) - 1] == path[:-1]]
    below = [found for found in inside if found in elsewhere]
    alike = difflib.get_close_matches(key, {str(found[-1]) for found in inside}, n=1)
    below = below or [found for found in inside if found[-1] in alike]
    if meant := near or below or (elsewhere if len(elsewhere) == 1 else []):
        return f"; did you mean {' or '.join(map(dotted, meant[:3]))}?"
    nearest = difflib.get_close_matches(key, siblings, n=1, cutoff=0.0)
    return f"; nearest is {dotted((*path[:-1], *nearest))}, known here are {', '.join(siblings)}" if siblings else ""


def _all_paths(part: dict[str, Any] | None, schema: dict[str, Any], path: Path = ()) -> Iterator[Path]:
    part = _resolve(part, schema) or {}
    for option in part.get("anyOf", [part]):
        for key, child in (_resolve(option, schema) or {}).get("properties", {}).items():
            yield (*path, key)
            yield from _all_paths(child, schema, (*path, key))
