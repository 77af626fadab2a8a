"""Activations: the functions between the matrices of a feed-forward block."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss


def clamped_swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """g · sigmoid(1.702 g) · (u + 1) with g at most 7 and u within ±7 (OpenAI 2025, gpt-oss model card)."""
    gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
    return gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1)


# Of the gate and the other product (Shazeer 2020), and of a product alone. GELU is the tanh form unless it is exact.
GATED: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "geglu": lambda gate, up: jax.nn.gelu(gate) * up,
    "clamped_swiglu": clamped_swiglu,
}
PLAIN: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
}
