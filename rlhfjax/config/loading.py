"""From a file or a shipped name, with overrides, to a `Run`; and back to text that loads as the same `Run`."""

import difflib
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhfjax.config import reading
from rlhfjax.config.explain import problems, shown
from rlhfjax.config.moved import moved, place_of
from rlhfjax.config.overrides import apply_override, parse_override
from rlhfjax.config.schema import Run
from rlhfjax.errors import ConfigError

MAX_PROBLEMS = 10


def load_config(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Run:
    """The validated configuration of a file, or of a shipped name such as `quickstart`, with overrides applied.

    Raises ConfigError that lists every problem, each with its line or override, its key, and what was expected.
    """
    path = config_path(path_or_name)
    text = _text(path)
    try:
        tree, lines = reading.read_yaml(text)
    except reading.YamlError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    if not isinstance(tree, dict):
        got = "an empty file" if tree is None else shown(tree)
        raise ConfigError(f"{path}: expected a configuration (name, model, tokenizer, stages), got {got}")
    tree = moved(tree)
    lines |= {place_of(key): line for key, line in lines.items()}
    overridden: list[str] = []
    for override in overrides:
        key, value = parse_override(override)
        key = place_of(key)
        tree = moved(apply_override(tree, key, value))
        overridden.append(reading.dotted(key))
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        found = [f"{_where(path, key, lines, overridden)}{line}" for key, line in problems(error, json_schema())]
        raise ConfigError(_listed(path, found)) from None


def key_sources(path_or_name: str | Path, overrides: Iterable[str] = ()) -> dict[str, str]:
    """Where each key was set that is not left to its default: `FILE:LINE`, or `override` with its text.

    For a configuration that `load_config` has read.
    """
    path = config_path(path_or_name)
    tree, lines = reading.read_yaml(_text(path))
    found = {reading.dotted(place_of(key)): f"{path}:{lines[key]}" for key in _leaf_keys(tree)}
    for override in overrides:
        key = reading.dotted(place_of(parse_override(override)[0]))
        found = {name: where for name, where in found.items() if not f"{name}.".startswith(f"{key}.")}
        found[key] = f"override {override}"
    return found


def _leaf_keys(tree: Any, path: reading.Path = ()) -> Iterator[reading.Path]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, part in items:
        yield from _leaf_keys(part, (*path, name))
    if not isinstance(tree, dict | list) or (path and not tree):
        yield path


def _where(path: Path, key: reading.Path, lines: dict[reading.Path, int], overridden: list[str]) -> str:
    """`FILE:LINE: ` of a key, or `override ` where an override set it, or made it on the way to what it set."""
    name = reading.dotted(key)
    set_it = any(f"{name}.".startswith(f"{override}.") for override in overridden)
    made_it = key not in lines and any(override.startswith(f"{name}.") for override in overridden)
    if set_it or made_it:
        return "override "
    while key not in lines and key:
        key = key[:-1]
    return f"{path}:{lines.get(key, 1)}: "


def _listed(path: Path, found: list[str]) -> str:
    if len(found) == 1:
        return found[0]
    rest = len(found) - MAX_PROBLEMS
    more = [f"… and {rest} more"] if rest > 0 else []
    return "\n  ".join([f"{path}: {len(found)} problems", *found[:MAX_PROBLEMS], *more])


def config_path(path_or_name: str | Path) -> Path:
    """The file of a path or of a shipped name. Raises ConfigError naming the nearest shipped one when there is none."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    known, name = _shipped_files(), str(path_or_name)
    if name in known:
        return known[name]
    if path.is_dir():
        raise ConfigError(f"{name}: expected a configuration file, got a directory")
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(known)}"
    raise ConfigError(f"{name}: no such file, and no shipped configuration of that name; {hint} (see `rlhfjax ls`)")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def shipped() -> dict[str, tuple[Path, str]]:
    """The configurations that come with the package: name -> (file, description)."""
    found = {}
    for name, path in _shipped_files().items():
        tree = reading.read_yaml(path.read_text(encoding="utf-8"))[0]
        found[name] = (path, str(tree.get("description", "")))
    return found


def _shipped_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_shipped_folder().glob("*.yaml"))}


def _shipped_folder() -> Path:
    """`rlhfjax/configs` of an installed wheel, or `configs` beside the package in a checkout."""
    package = Path(str(importlib.resources.files("rlhfjax")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def resolved(run: Run) -> dict[str, Any]:
    """Every key with its value, as plain data. A model from a checkpoint has no shape of its own to show."""
    tree = run.model_dump(mode="json")
    if run.model.checkpoint:
        kept = ("checkpoint", "remat", "dtype", *(("lora",) if run.model.lora else ()))
        tree["model"] = {key: tree["model"][key] for key in kept}
        if run.model.attention != "auto":
            tree["model"]["architecture"] = {"attention": {"implementation": run.model.attention}}
    return tree


def resolved_yaml(run: Run) -> str:
    """The complete configuration as YAML; loading it gives an equal `Run`."""
    return yaml.dump(resolved(run), Dumper=reading.Dumper, sort_keys=False, allow_unicode=True, width=100)


def config_hash(run: Run) -> str:
    """SHA-256 of the complete configuration, 64 hexadecimal digits; comments and key order do not change it."""
    text = json.dumps(resolved(run), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Run.model_json_schema() | {"title": "rlhfjax run configuration"}
