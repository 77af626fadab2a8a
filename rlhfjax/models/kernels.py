"""Attention by kernels that others keep: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Both take what `attend` in `rlhfjax.models.attention` takes, and never hold the scores of all heads.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.target import current

INTERPRET = False  # splash attention runs by an interpreter where there is no TPU; tests set it


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
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    prefixes: Int[Array, "B T"] | None = None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H D"]:
    """cuDNN's flash attention; segments are a bias [B, 1, T, T] that the heads share.

    Its packed layout would skip what lies between segments, but needs a bound on their number for the compiler, and
    workspace that grows with it: at 8 x 2048 tokens, 32 heads of 64, 32 segments 4.7 GB against 0.3 GB, for 1.8 ms
    against 2.9 ms forward and backward on an H100, and 18 ms without a kernel.
    """
    del softcap
    length = query.shape[1]
    even = length + length % 2
    query, key, value, segments = (_padded(x, even) for x in (query, key, value, segments))
    related = segments[:, :, None] == segments[:, None, :]
    if prefixes is not None:
        related |= _padded(prefixes, even)[:, :, None] == segments[:, None, :]
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=related[:, None],
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :length]


def splash_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H D"]:
    """Pallas splash attention: blocks that the causal mask or the window leaves empty are not computed.

    Lengths are padded to whole blocks of 128, with a segment that no token is in. Inside a mesh of several devices it
    has to run under `shard_map` (`rlhfjax.layout`), since XLA can't split it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[1], query.shape[2]
    padded = 128 * math.ceil(length / 128)
    side = next(side for side in (512, 256, 128) if padded % side == 0)
    square = (padded, padded)
    seen = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=side,
            block_kv=side,
            block_q_dkv=side,
            block_kv_dkv=side,
            block_kv_dkv_compute=side,
            block_q_dq=side,
            block_kv_dq=side,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    arrays = (jnp.swapaxes(_padded(x, padded), 1, 2) for x in (query, key, value))
    ids = _padded(segments, padded)
    out: Any = jax.vmap(kernel)(*arrays, splash.SegmentIds(ids, ids))
    return jnp.swapaxes(out, 1, 2)[:, :length]


def _padded(x: Array, length: int) -> Array:
    """[B, T, …] to [B, length, …]; what is added to segments is -1, which is no segment's id."""
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
