"""Where activations lie: models and equations name what they make, the composition root says where it lies.

As the target of a build (`target.py`), a layout is set around everything that is traced for it, and is part of the key
of each trace; so models hear of no mesh. Without one everything stays where XLA puts it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import jax

Program = Callable[..., Any]


class Layout(Protocol):
    """The devices that a program is traced for; a value that can be hashed and compared."""

    def lay(self, name: str, x: jax.Array) -> jax.Array:
        """`x` where activations of this name lie; sizes that the axes do not divide stay whole."""
        ...

    def attention(self, kernel: Program) -> Program:
        """f(query, key, value, segments, …) that each device computes on its own rows and heads."""
        ...


# Of the thread, like the target: one that traces for another sets what `current` was there.
_current: Any = jax.make_user_context(None)


@contextmanager
def laid_out_by(layout: Layout | None) -> Iterator[None]:
    """Within, what is traced lies where `layout` says; None is a single device."""
    with _current(layout):
        yield


def current() -> Layout | None:
    """The layout of what is traced now."""
    return _current.value


def lay(name: str, x: jax.Array) -> jax.Array:
    """`x` laid out as activations of this name are."""
    layout = current()
    return x if layout is None else layout.lay(name, x)
