"""Strict YAML: one meaning for every file, and the line of every value.

Scalars follow YAML 1.2 (`on`, `no` and `12:30` are text, `1e-3` is a number), because PyYAML's YAML 1.1 turns a key
`on` into True and a learning rate `1e-3` into text. Duplicate keys, anchors and aliases are errors.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 16

Path = tuple[str | int, ...]

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
)


class YamlError(ValueError):
    """Text that is not what a configuration may hold; `line` counts from 1."""

    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalar rules above; values are constructed by `read_yaml`."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


class Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` reads back: text that would read as a number is quoted."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes line separators such as U+0085 bare into its other styles, where they read back as spaces.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


Dumper.add_representer(str, Dumper.represent_str)


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str) -> tuple[Any, dict[Path, int]]:
    """The value of a YAML text, and for each path in it the line it stands on.

    Raises YamlError for anything that is not plain mappings, lists and scalars with unique text keys.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}", 1)
    lines: dict[Path, int] = {}
    try:
        _refuse_references(text)
        node = _Loader(text).get_single_node()
        return (None if node is None else _value(node, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not valid YAML: {error.problem or error.context}", mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as error:  # characters that YAML forbids
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise YamlError(f"not valid YAML: {getattr(error, 'reason', error)}", line) from None


def _refuse_references(text: str) -> None:
    """Anchors and aliases are refused while parsing, before anything could expand; so is deep nesting."""
    depth = 0
    for event in _events(text):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise YamlError("anchors and aliases (&name, *name) are not read; write the value out", line)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"expected at most {MAX_DEPTH} levels of nesting", line)


def _events(text: str) -> Iterator[yaml.Event]:
    loader = _Loader(text)
    while loader.check_event():
        yield loader.get_event()


def _value(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(child, (*path, index), lines) for index, child in enumerate(node.value)]
    return _scalar(node, line)


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if key_node.tag != "tag:yaml.org,2002:str" or not isinstance(key, str):
            shown = key if isinstance(key, str) else "a list or mapping"
            raise YamlError(f"expected a name as key, got {shown}; put it in quotes if it is one", line)
        if key in mapping:
            raise YamlError(f"key {dotted((*path, key))} is given twice, first on line {lines[(*path, key)]}", line)
        lines[(*path, key)] = line
        mapping[key] = _value(value_node, (*path, key), lines)
    return mapping


def _scalar(node: yaml.Node, line: int) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise YamlError(f"expected a plain mapping or list, got the tag {node.tag}", line)
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    text: str = node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:  # an explicit tag on other text, or digits beyond Python's limit
        raise YamlError(f"expected a number, got {text[:40]!r}", line) from None
    raise YamlError(f"expected a plain value, got the tag {node.tag}", line)


def dotted(path: Path) -> str:
    """`("stages", "ppo", "data", 0)` as `stages.ppo.data.0`."""
    return ".".join(str(part) for part in path)
