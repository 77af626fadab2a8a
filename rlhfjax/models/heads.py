"""The scalar head of reward and value models: a decoder's hidden state to one number."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.types import Params


def init_head(key: jax.Array, width: int) -> Params:
    """Weights ~ N(0, 1/(d+1)), that is standard deviation 1/sqrt(d+1); bias 0 (Stiennon et al. 2020, appendix)."""
    return {"kernel": jax.random.normal(key, (width,), jnp.float32) / jnp.sqrt(width + 1.0), "bias": jnp.zeros(())}


def zero_head(width: int) -> Params:
    """A head that says 0 everywhere: a value model that starts from the policy (Ziegler et al. 2019)."""
    return {"kernel": jnp.zeros((width,)), "bias": jnp.zeros(())}


def apply_head(head: Params, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T"]:
    """h · w + b, float32."""
    return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]


def rescale_head(head: Params, gain: Float[Array, ""], bias: Float[Array, ""]) -> Params:
    """The head whose output is gain x output + bias."""
    return {"kernel": head["kernel"] * gain, "bias": head["bias"] * gain + bias}


def with_head(decoder: Params, head: Params) -> Params:
    """Parameters of a scalar model: the decoder without what predicts tokens, and the head."""
    kept = {name: tree for name, tree in decoder.items() if name not in ("unembed", "mtp_heads")}
    return {"decoder": kept, "head": head}
