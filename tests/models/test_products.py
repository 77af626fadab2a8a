"""The product of linear layers and its gradients against `jax.lax.dot_general`, and a product that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models.products import dot_general, settled

CASES = {"plain": ((2, 3, 4), (4, 5), (2,), (0,)), "to heads": ((2, 3, 4), (4, 2, 5), (2,), (0,)),
         "from heads": ((2, 3, 2, 4), (2, 4, 5), (2, 3), (0, 1))}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients(name):
    # meant to catch a kernel's gradient that contracts an axis too few
    inputs_shape, kernel_shape, axes, kernel_axes = CASES[name]
    rng = np.random.default_rng(0)
    inputs, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (inputs_shape, kernel_shape))
    numbers = ((axes, kernel_axes), ((), ()))

    def total(product):
        return lambda x, w: jnp.sin(product(x, w, numbers)).sum()

    got = jax.value_and_grad(total(dot_general), (0, 1))(inputs, kernel)
    wanted = jax.value_and_grad(total(jax.lax.dot_general), (0, 1))(inputs, kernel)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 32, 65])
def test_what_is_settled_is_the_same_to_the_last_bit(size):
    angles = jnp.arange(50, dtype=jnp.float32)[:, None, None] * 1e-6 ** jnp.linspace(0.0, 1.0, size)[None, None, :]
    for x in (jnp.sin(angles), jnp.cos(angles)):
        for got in (settled(x), jax.jit(settled)(x)):
            np.testing.assert_array_equal(np.asarray(got).view(np.uint32), np.asarray(x).view(np.uint32))
