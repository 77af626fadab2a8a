"""Products of activations with matrices, whose gradients are the two products that are cheap everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from rlhfjax import layout
from rlhfjax.models.remat import PRODUCT
from rlhfjax.target import current


def dot_general(
    inputs: Array,
    kernel: Array,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    *,
    name: str = "",
    kernel_first: bool = False,
) -> Array:
    """`jax.lax.dot_general` of the last axes of `inputs` with the first of `kernel`; nothing else is a linear layer.

    A layout may know kernels of a `name`. With `kernel_first` the gradient of the inputs waits for that of the kernel
    on TPUs, where XLA would put products off that nothing reads soon, and hold what they read: half a GiB of each
    layer's backward pass of a model of 8B.
    """
    (axes, _), _ = dimension_numbers
    return checkpoint_name(_product(len(axes), name, kernel_first, inputs, kernel), PRODUCT)


def settled(x: Array) -> Array:
    """The same numbers, which a CPU computes once.

    XLA writes what is cheap to say into everything that reads it: the sines of RoPE into the queries and keys of each
    layer, for every head. Barriers it removes on a CPU, but not a product, here with the identity.
    """
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype) if current().platform == "cpu" else x


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(count, name, kernel_first, inputs, kernel):
    return _contract(inputs, range(inputs.ndim - count, inputs.ndim), layout.gathered(name, kernel), range(count))


def _forward(count, name, kernel_first, inputs, kernel):
    return _product(count, name, kernel_first, inputs, kernel), (inputs, kernel)


def _backward(count, name, kernel_first, residuals, g):
    inputs, kernel = residuals
    lead, features = inputs.ndim - count, kernel.ndim - count
    of_inputs = _contract(g, range(lead, g.ndim), kernel, range(kernel.ndim - features, kernel.ndim))
    # One of the two operands is transposed for this. XLA computes what is fused with a transposition on one core of a
    # CPU, and it is the cotangent that there would be something to compute for; `jax.grad` writes them the other way.
    of_kernel = _contract(inputs, range(lead), g, range(lead))
    if kernel_first and current().platform == "tpu":
        return jax.lax.optimization_barrier((of_inputs, of_kernel))
    return of_inputs, of_kernel


_product.defvjp(_forward, _backward)


def _contract(a, a_axes, b, b_axes):
    return jax.lax.dot_general(a, b, ((tuple(a_axes), tuple(b_axes)), ((), ())))
