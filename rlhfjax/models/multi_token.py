"""Heads that predict the tokens after the next one, from the same hidden state.

Head h reads the hidden state that predicts token t+1 and predicts token t+1+h: a residual block of its own, then the
model's unembedding (the blocks of Medusa, Cai et al. 2024, section 2.1.1; the joint training and the shared unembedding
of Gloeckle et al. 2024, section 2). They are pure functions of parameters {"up": [N, D, D], "down": [N, D, D]} under
`mtp_heads` of a policy. What a model says of the next token has nothing of them in it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.types import Params

NAME = "mtp_heads"


def init_heads(key: jax.Array, heads: int, width: int, std: float) -> Params:
    """Fresh heads, float32: up ~ N(0, std²), down 0, so that each begins as the prediction of the next token."""
    up = std * jax.random.normal(key, (heads, width, width), jnp.float32)
    return {"up": up, "down": jnp.zeros((heads, width, width), jnp.float32)}


def ahead(heads: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "N *B D"]:
    """h + silu(h · up_n) · down_n for each head n, in the type of the hidden states."""
    inner = jax.nn.silu(jnp.einsum("...d,nde->n...e", hidden, heads["up"].astype(hidden.dtype)))
    return hidden[None] + jnp.einsum("n...d,nde->n...e", inner, heads["down"].astype(hidden.dtype))
