"""Options that belong together: a command that takes a dataclass of them has each of its fields as an option."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command that hands over each parameter which is a dataclass made of the options that are its fields.

    A field is written as a parameter of a command would be: annotated with its option, with a default. No name may
    occur twice.
    """
    own = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in own.items() if is_dataclass(one.annotation)}
    flat: list[inspect.Parameter] = []
    for name, parameter in own.items():
        flat += inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]

    @wraps(command)
    def taking(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    taking.__signature__ = inspect.Signature(flat)  # pyright: ignore[reportAttributeAccessIssue]
    taking.__annotations__ = {one.name: one.annotation for one in flat}
    return taking
