"""An algorithm on some of its parameters: the others are there, and are not trained."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from typing import Any

from rlhfjax.algorithms.mix import Mix
from rlhfjax.types import Params


def restrict(algorithm: Any, whole: Callable[[Params], Params]) -> Any:
    """The algorithm, or both parts of a mix, as a function of what is trained: p -> loss(whole(p), …).

    `whole` makes all parameters from the trained ones. The functions that an algorithm is made of are those of
    parameters, so composing each with it is enough.
    """
    if isinstance(algorithm, Mix):
        return Mix(restrict(algorithm.first, whole), algorithm.coef, restrict(algorithm.second, whole))
    parts = {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}
    return replace(algorithm, **{name: _on(part, whole) for name, part in parts.items() if callable(part)})


def _on(function: Callable, whole: Callable[[Params], Params]) -> Callable:
    @wraps(function)
    def restricted(params: Params, *args: Any) -> Any:
        return function(whole(params), *args)

    return restricted
