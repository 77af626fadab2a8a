"""Blocks that lie across the array that they are put into arrive as NumPy itself would put them."""

import itertools

import numpy as np
import pytest

from rlhfjax.leaves import fill, put


def _back(axes):
    return [axes.index(axis) for axis in range(len(axes))]


@pytest.mark.parametrize("shape", [(), (1,), (37,), (37, 50), (16, 32), (1, 40, 3), (2, 33, 5, 18)])
def test_any_block_into_any_array(shape):
    numbers = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    for one, other in itertools.product(itertools.permutations(range(len(shape))), repeat=2):
        block = np.array(np.transpose(numbers, one), order="C").transpose(_back(one))
        for dtype in (np.float32, np.float64):
            made = np.zeros([shape[axis] for axis in other], dtype).transpose(_back(other))
            put(made[(...,)], block)
            assert made.tolist() == numbers.astype(dtype).tolist()


def test_a_block_into_a_part_read_from_behind():
    numbers = np.arange(40 * 50, dtype=np.float32).reshape(40, 50)
    made = np.zeros((60, 50), np.float32)
    put(made[10:50], numbers.T[::-1].T)
    assert made[10:50].tolist() == [row[::-1] for row in numbers.tolist()]
    assert not made[:10].any()
    assert not made[50:].any()


def test_a_number_is_filled_as_well():
    class One:
        def blocks(self, path, region):
            yield (), np.float32(7)

    made = np.zeros((), np.float32)
    fill(made, One(), "head/bias", ())  # pyright: ignore[reportArgumentType]
    assert made == 7
