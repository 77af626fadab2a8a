"""First-fit decreasing against the loop of the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.functional.packing import first_fit


def textbook(lengths, width):
    """(row, offset, number) of each, the longest first."""
    rows, placed = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, members in enumerate(rows) if sum(members) + lengths[i] <= width), len(rows))
        if row == len(rows):
            rows.append([])
        placed[i] = row, sum(rows[row]), len(rows[row]) + 1
        rows[row].append(lengths[i])
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


def test_full_rows_hold_one_each():
    got = first_fit(jnp.full(4, 6, jnp.int32), 6, 4)
    assert got.row.tolist() == [0, 1, 2, 3]
    assert got.offset.tolist() == [0, 0, 0, 0]
    assert got.used == 4
