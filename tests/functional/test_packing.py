"""First-fit decreasing against the loop of the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.functional.packing import first_fit


def textbook(lengths, width, parts=None, most=0):
    """(row, offset, number) of each, the longest first."""
    rows, placed, parts = [], {}, parts or [0] * len(lengths)

    def total(sizes, members):
        return sum(sizes[i] for i in members)

    def fits(members):
        return total(lengths, members) <= width and total(parts, members) <= most

    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, members in enumerate(rows) if fits([*members, i])), len(rows))
        if row == len(rows):
            rows.append([])
        placed[i] = row, total(lengths, rows[row]), len(rows[row]) + 1
        rows[row].append(i)
    return [placed[i] for i in range(len(lengths))], len(rows)


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    lengths, width = rng.integers(1, 11, 24), 10
    got = jax.jit(lambda x: first_fit(x, width, 24))(jnp.asarray(lengths, jnp.int32))
    wanted, used = textbook(lengths.tolist(), width)
    assert list(zip(got.row.tolist(), got.offset.tolist(), got.number.tolist(), strict=True)) == wanted
    assert got.used == used
    assert used >= np.ceil(lengths.sum() / width)


@pytest.mark.parametrize("most", [4, 6, 10])
@pytest.mark.parametrize("seed", range(3))
def test_first_fit_with_room_for_so_many_of_a_kind(seed, most):
    # meant to catch a row that is full of that kind and taken, and one that is passed by though both fit
    rng = np.random.default_rng(seed)
    lengths, width = rng.integers(1, 11, 24), 10
    parts = rng.integers(0, np.minimum(lengths, most) + 1)
    sizes = jnp.asarray(lengths, jnp.int32), jnp.asarray(parts, jnp.int32)
    got = jax.jit(lambda x, y: first_fit(x, width, 24, y, most))(*sizes)
    wanted, used = textbook(lengths.tolist(), width, parts.tolist(), most)
    assert list(zip(got.row.tolist(), got.offset.tolist(), got.number.tolist(), strict=True)) == wanted
    assert got.used == used
    held = np.bincount(np.asarray(got.row), parts)
    assert held.max() <= most
    without = textbook(lengths.tolist(), width)[0]
    assert (wanted == without) == (most == width)  # 10 is no limit of its own


def test_full_rows_hold_one_each():
    got = first_fit(jnp.full(4, 6, jnp.int32), 6, 4)
    assert got.row.tolist() == [0, 1, 2, 3]
    assert got.offset.tolist() == [0, 0, 0, 0]
    assert got.used == 4
