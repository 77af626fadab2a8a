"""Guesses by lookup, against loops over lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.generation.lookup import lookup


def looked_up(row: list[int], count: int, longest: int) -> list[int] | None:
    """The longest ending that occurs before, at its latest place; what followed it, over and over."""
    for size in range(min(longest, len(row) - 1), 0, -1):
        for end in range(len(row) - 2, size - 2, -1):
            if row[end - size + 1 : end + 1] == row[len(row) - size :]:
                after = row[end + 1 :]
                return [after[i % len(after)] for i in range(count)]
    return None


@pytest.mark.parametrize("longest", [1, 3])
@pytest.mark.parametrize("vocabulary", [2, 6, 40])
def test_equals_a_search_through_lists(vocabulary, longest):
    # meant to catch matches that wrap around the row or read beyond its length, and earlier ones taken for later ones
    rng = np.random.default_rng(vocabulary)
    context = rng.integers(0, vocabulary, (64, 17))
    lengths = np.concatenate([[1, 2, 17], rng.integers(1, 18, 61)])
    context[1, :2] = 0  # one token and the same again
    drafts = jax.jit(lookup, static_argnums=(2, 3))(jnp.asarray(context, jnp.int32), jnp.asarray(lengths), 5, longest)
    wanted = [looked_up(row[:n].tolist(), 5, longest) for row, n in zip(context, lengths, strict=True)]
    assert drafts.tolist() == [[-1] * 5 if want is None else want for want in wanted]
    assert any(want is None for want in wanted)
    assert any(want is not None for want in wanted)


def test_the_longest_ending_wins_over_a_later_shorter_one():
    #      1 2 3 | 9 3 8 | 1 2 3: "1 2 3" was followed by 9, the later "3" by 8
    row = jnp.asarray([[1, 2, 3, 9, 3, 8, 1, 2, 3, 0, 0]], jnp.int32)
    assert lookup(row, jnp.asarray([9]), 4, 3).tolist() == [[9, 3, 8, 1]]
    assert lookup(row, jnp.asarray([9]), 4, 1).tolist() == [[8, 1, 2, 3]]
