"""Overrides `dotted.key=value` of a configuration, the value read by the same rules as the file."""

from typing import Any

from rlhfjax.config.reading import Path, YamlError, dotted, read_yaml
from rlhfjax.errors import ConfigError

FORM = "dotted.key=value, such as stages.ppo.steps=200"


def parse_override(text: str) -> tuple[Path, Any]:
    """`stages.ppo.steps=9` as (("stages", "ppo", "steps"), 9); parts of digits are list positions.

    Raises ConfigError when the text has another form or its value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r}: expected {FORM}")
    try:
        return tuple(int(part) if part.isdecimal() and len(part) < 7 else part for part in parts), read_yaml(value)[0]
    except YamlError as error:
        raise ConfigError(f"override {key.strip()}: {error}") from None


def apply_override(tree: Any, path: Path, value: Any) -> Any:
    """A copy of `tree` with `value` at `path`; sections on the way that are absent or null are made.

    Raises ConfigError for a list position that is not there and for a path through a plain value.
    """
    return _set(tree, path, value, 0)


def _set(tree: Any, path: Path, value: Any, at: int) -> Any:
    if at == len(path):
        return value
    part = path[at]
    if isinstance(tree, list):
        if not isinstance(part, int) or part >= len(tree):
            raise ConfigError(f"override {dotted(path)}: expected {_positions(path[:at], tree)}, got {part}")
        return [_set(item, path, value, at + 1) if index == part else item for index, item in enumerate(tree)]
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"override {dotted(path)}: {dotted(path[:at])} is {tree!r}, which has no {part} inside")
    return tree | {str(part): _set(tree.get(str(part)), path, value, at + 1)}


def _positions(path: Path, items: list) -> str:
    if not items:
        return f"no position: the list {dotted(path)} is empty, give it whole"
    last = len(items) - 1
    return f"a position of {dotted(path)} from 0 to {last}" if last else f"position 0 of {dotted(path)}"
