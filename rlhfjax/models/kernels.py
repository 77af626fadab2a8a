"""Attention by a kernel that NVIDIA keeps for its GPUs: cuDNN's, which never holds the scores of all heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.splash import padded
from rlhfjax.target import current


def cudnn_takes(query: Array, key: Array, softcap: float | None) -> bool:
    """Whether cuDNN has a program for arrays of these types and shapes on the target, a GPU of NVIDIA's.

    Its kernels are of half precision, for head sizes of a multiple of 8 up to 128, or 256 from Hopper on, and have no
    soft cap. Any length and any number of segments will do.
    """
    capability = current().capability
    if capability is None or softcap is not None:
        return False
    if query.dtype != key.dtype or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    size = query.shape[-1]
    return capability >= 8.0 and size % 8 == 0 and size <= (256 if capability >= 9.0 else 128)


def cudnn_attention(
    query: Float[Array, "B N H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    prefixes: Int[Array, "B T"] | None = None,
    slots: Int[Array, "N"] | None = None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B N H D"]:
    """cuDNN's flash attention; segments are a bias [B, 1, T, T] that the heads share.

    Its packed layout would skip what lies between segments, but needs a bound on their number for the compiler, and
    workspace that grows with it: at 8 x 2048 tokens, 32 heads of 64, 32 segments 4.7 GB against 0.3 GB, for 1.8 ms
    against 2.9 ms forward and backward on an H100, and 18 ms without a kernel.
    """
    del softcap
    asked, length = query.shape[1], key.shape[1] + key.shape[1] % 2
    query = padded(query, asked + asked % 2)
    key, value, segments = (padded(x, length) for x in (key, value, segments))
    places = None if slots is None else jnp.pad(slots, (0, asked % 2), mode="edge")
    related = _of_queries(segments, places) == segments[:, None, :]
    if prefixes is not None:
        related |= _of_queries(padded(prefixes, length), places) == segments[:, None, :]
    if places is not None:
        distance = places[:, None] - jnp.arange(length)[None, :]
        related &= ((distance >= 0) & (distance < (window or length)))[None]
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=related[:, None],
        scale=scale,
        is_causal=places is None,
        local_window_size=None if window is None or places is not None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :asked]


def _of_queries(segments: Int[Array, "B T"], places: Int[Array, "N"] | None) -> Int[Array, "B N 1"]:
    return (segments if places is None else segments[:, places])[:, :, None]
