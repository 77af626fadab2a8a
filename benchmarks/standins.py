"""Imports of this package where packages for data and settings are not installed.

A machine that is lent for measurements may have jax, flax, optax and orbax, but nothing that reads data or settings.
The steps that are timed need none of that, only the modules that compile them import it. `install()` puts inert
modules in the place of packages that are missing; of pydantic it gives what classes of settings need.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar

OPTIONAL = (
    "pydantic",
    "pydantic_core",
    "grain",
    "tensorflow_datasets",
    "array_record",
    "tensorboardX",
    "gguf",
    "sentencepiece",
    "tokenizers",
    "typer",
    "rich",
    "yaml",
    "jinja2",
    "matplotlib",
    "google.protobuf",
    "importlib_resources",
)


class _Anything(type):
    """The type of a placeholder: it can be inherited from, called, subscripted and asked for any attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not Placeholder:
            return type.__call__(cls)
        decorates = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if decorates else Placeholder

    def __getitem__(cls, _: Any) -> Any:
        return Placeholder


class Placeholder(metaclass=_Anything):
    """Stands for a class, a function or a decorator of a package that is not here."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


class BaseModel:
    """A class of settings: given values, else the defaults of its body; nothing is checked."""

    model_fields: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        own = vars(cls).get("__annotations__", {})
        cls.model_fields = cls.model_fields | {name: vars(cls).get(name) for name in own}

    def __init__(self, **values: Any):
        for name, value in values.items():
            setattr(self, name, value)

    def model_dump(self, **_: Any) -> dict[str, Any]:
        found = {name: getattr(self, name, None) for name in self.model_fields}
        return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in found.items()}


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return BaseModel if (self.__name__, name) == ("pydantic", "BaseModel") else Placeholder


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]):
        self._names = tuple(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(name == missing or name.startswith(f"{missing}.") for missing in self._names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def missing() -> list[str]:
    """The optional packages that are not installed."""
    return [name for name in OPTIONAL if not _is_here(name)]


def _is_here(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def install() -> list[str]:
    """Puts stand-ins where packages are missing; returns their names."""
    names = missing()
    if names:
        sys.meta_path.append(_Finder(names))
    return names
