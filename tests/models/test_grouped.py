"""Products by group against a loop over the groups; the kernel for TPUs is interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models.grouped import _on_tpu, grouped

# Rows, columns of both kinds, and how many rows there are of each group: none, or fewer in all than there are rows.
CASES = {
    "one tile of rows": (40, 128, 256, (10, 0, 20, 5)),
    "several tiles, sizes that no tile divides": (1000, 96, 160, (300, 300, 400)),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(0.0, 1.0, shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("program", [grouped, partial(_on_tpu, True)], ids=["xla", "tpu"])
def test_products_and_gradients_are_those_of_each_group(name, program):
    rows, inner, outer, sizes = CASES[name]
    x, kernels, cotangent = normal(0, rows, inner), normal(1, len(sizes), inner, outer), normal(2, rows, outer)
    ends = np.cumsum(sizes)
    real = np.arange(rows) < ends[-1]

    @jax.jit
    def both_ways(x, kernels, sizes):
        out, back = jax.vjp(lambda x, kernels: program(x, kernels, sizes), x, kernels)
        return out, *back(jnp.asarray(cotangent))

    with jax.numpy_dtype_promotion("standard"):  # jax's own kernel is not strict
        out, of_x, of_kernels = both_ways(x, kernels, np.int32(sizes))
    for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        part = slice(end - size, end)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
        close(out[part], x[part] @ kernels[i])
        close(of_x[part], cotangent[part] @ kernels[i].T)
        close(of_kernels[i], x[part].T @ cotangent[part])
    assert np.isfinite(np.asarray(of_x)[real]).all()
