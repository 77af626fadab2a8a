"""Files of moderation as sections, with errors that say where."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ValidationError

from rlhfjax.config import reading
from rlhfjax.config.explain import problems, shown
from rlhfjax.config.sections import Section
from rlhfjax.errors import ConfigError
from rlhfjax.moderation.verdicts import CATEGORIES

T = TypeVar("T")
S = TypeVar("S", bound=Section)


def _known_categories(given: Any) -> Any:
    for name in given if isinstance(given, dict) else ():
        if name not in CATEGORIES:
            near = difflib.get_close_matches(str(name), CATEGORIES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"expected one of {', '.join(CATEGORIES)}, got {name}{hint}")
    return given


ByCategory = Annotated[dict[str, T], BeforeValidator(_known_categories)]


def read_section(path: Path, kind: type[S], what: str) -> tuple[S, Callable[..., str]]:
    """A YAML file as a section, and a function that gives `FILE:LINE: ` of a key in it.

    Raises ConfigError that names each problem with its line; `what` is what the file should be.
    """
    try:
        tree, lines = reading.read_yaml(path.read_bytes().decode("utf-8-sig"))
    except reading.YamlError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8 text, got other bytes") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a file of {what}, got {error.strerror}") from None

    def where(*key: str | int) -> str:
        while key and key not in lines:
            key = key[:-1]
        return f"{path}:{lines.get(key, 1)}: "

    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected {what}, got {'an empty file' if tree is None else shown(tree)}")
    try:
        return kind.model_validate(tree), where
    except ValidationError as error:
        found = [f"{where(*key)}{line}" for key, line in problems(error, kind.model_json_schema())]
        raise ConfigError("\n".join(found[:2]) + (f"\n… and {len(found) - 2} more" if found[2:] else "")) from None
