"""Where activations lie: models and equations name what they make, the composition root says where it lies.

As the target of a build (`target.py`), a layout is set around everything that is traced for it, and is part of the key
of each trace; so models hear of no mesh. Without one everything stays where XLA puts it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol

import jax

Program = Callable[..., Any]


class Words(Protocol):
    """A device's part of the vocabulary, and what it takes to speak of all of it."""

    first: Any  # the id of the first word of the part
    count: int  # words of the whole vocabulary
    padded: bool  # whether some part has more words than there are

    def summed(self, x: Any) -> Any:
        """Σ over the parts, of an array or several."""
        ...

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over the parts."""
        ...

    def likeliest(self, logits: jax.Array) -> jax.Array:
        """The first word of the largest logit [*B, words of the part] among all, int32 [*B]."""
        ...


class Layout(Protocol):
    """The devices that a program is traced for; a value that can be hashed and compared."""

    def lay(self, name: str, x: jax.Array) -> jax.Array:
        """`x` where activations of this name lie; sizes that the axes do not divide stay whole."""
        ...

    def gathered(self, name: str, kernel: jax.Array) -> jax.Array:
        """The kernel of a layer as its product reads it."""
        ...

    def attention(self, program: Program, kernel: bool) -> Program:
        """f(query, key, value, segments, …) that each device computes on its own rows and heads, of all tokens; XLA
        can't split a `kernel`.
        """
        ...

    def parameters(self, tree: Any) -> Any:
        """A tree named as parameters are, as gradients, where these lie."""
        ...

    def embedded(self, table: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
        """table[tokens] in that type: [V, D] and [B, T] to [B, T, D]."""
        ...

    def vocabulary(self, program: Program, axis: int, outs: tuple[str, ...], table: Any, *rows: Any) -> tuple:
        """`program(words, table, *rows)` on every device: its `Words`, their part of the table, and its own rows.

        Rows are [B, T, …]; `axis` of the table, a matrix, is that of the words, the other one is whole. `outs` says of
        what it returns whether these are `rows`, a `table` whose sum over the rows is wanted, which is added up in the
        type of the table that came, or a `number` to be summed likewise.
        """
        ...

    def experts(self, forward: Program, backward: Program) -> Program:
        """f(x, weights, chosen, kernels), each expert computed by the devices that hold it (`models/experts.py`)."""
        ...

    def weights(self, params: Any) -> Any:
        """Parameters, or what sampling makes of them, where they lie by their paths."""
        ...

    def by_vocabulary(self, program: Program) -> Program:
        """f(logits [B, V], …) as program(words, logits, …), which each device computes on its own rows and `Words`.

        All arguments begin with the rows, and so does what it gives, which is the same on all devices of a vocabulary.
        """
        ...

    def cached(self, program: Program) -> Program:
        """f(query [B, T, H, D], key, value, caches, layer, slots, mask, sinks) as each device computes it on its own
        rows and heads; what it gives are the mixed values [B, T, H, D] and the caches.

        Caches are [B, L, S, K·…], slots [B, T], masks [B, T, S], sinks [H] or None.
        """
        ...


# Of the thread, like the target: one that traces for another sets what `current` was there.
_current: Any = jax.make_user_context(None)


@contextmanager
def laid_out_by(layout: Layout | None) -> Iterator[None]:
    """Within, what is traced lies where `layout` says; None is a single device."""
    with _current(layout):
        yield


def laid_out_on(layout: Layout | None, program: Program) -> Program:
    """A function that is traced within `laid_out_by`, whoever calls it."""

    @wraps(program)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with laid_out_by(layout):
            return program(*args, **kwargs)

    return traced


def current() -> Layout | None:
    """The layout of what is traced now."""
    return _current.value


def lay(name: str, x: jax.Array) -> jax.Array:
    """`x` laid out as activations of this name are."""
    layout = current()
    return x if layout is None else layout.lay(name, x)


def gathered(name: str, kernel: jax.Array) -> jax.Array:
    """The kernel of a layer as its product reads it."""
    layout = current()
    return kernel if layout is None else layout.gathered(name, kernel)


def as_parameters(tree: Any) -> Any:
    """Gradients, or parameters after an update, where the parameters lie."""
    layout = current()
    return tree if layout is None else layout.parameters(tree)
