"""Causal attention within segments: one function, and four programs that compute it.

`xla` is the reference: the matrix of scores as it stands in the equation. The others never hold it whole. `blocked` is
for CPUs, `cudnn` for NVIDIA GPUs, `splash` for TPUs; `auto` takes the one of the backend. Which one runs is decided
while tracing, from types and shapes alone, and what a kernel does not take goes to `xla`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models.kernels import cudnn_attention, cudnn_takes, splash_attention

Spread = Callable[[Callable[..., Array]], Callable[..., Array]]
_spread: list[Spread] = [lambda program: program]  # of the process: programs may be compiled in several threads


@contextmanager
def spread_by(wrapper: Spread) -> Iterator[None]:
    """Within, `attend` runs wrapper(kernel): the composition root splits rows and heads over devices with it.

    XLA can't split a kernel by itself; what it compiles from the equations it lays out like everything else.
    """
    _spread.append(wrapper)
    try:
        yield
    finally:
        _spread.remove(wrapper)


def attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    local: bool | Bool[Array, ""],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H D"]:
    """softmax(scale · q·k) · v over earlier tokens of the same segment and their own (Vaswani et al. 2017, eq. 1).

    `local` layers see the last `window` tokens only; it may be traced. Heads are a multiple of the K key heads. With
    `softcap` scores are softcap · tanh(score / softcap). Segments are runs of equal ids; padding is one, whatever its
    id. Raises ValueError on another implementation.
    """
    scale = scale or query.shape[-1] ** -0.5
    program = _program(implementation, query, key, softcap)
    everything = partial(program, window=None, scale=scale, softcap=softcap)
    nearby = partial(program, window=window, scale=scale, softcap=softcap)
    # On several CPU devices `blocked` stays out: around its loops their collectives began in different orders.
    if program in (cudnn_attention, splash_attention):
        everything, nearby = _spread[-1](everything), _spread[-1](nearby)
    arrays = (query, key, value, segments)
    if window is None or window >= query.shape[1]:
        return everything(*arrays)
    if isinstance(local, bool):
        return (nearby if local else everything)(*arrays)
    return jax.lax.cond(local, nearby, everything, *arrays)


def _program(wanted: str, query: Array, key: Array, softcap: float | None) -> Callable[..., Array]:
    """The program that runs for these shapes on this backend."""
    if wanted == "auto":
        wanted = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "blocked")
    if wanted == "cudnn" and not cudnn_takes(query, key, softcap):
        wanted = "xla"
    programs = {"xla": reference, "blocked": blocked, "cudnn": cudnn_attention, "splash": splash_attention}
    if wanted not in programs:
        raise ValueError(f"expected implementation auto, {', '.join(programs)}; got {wanted!r}")
    return programs[wanted]


def attention_mask(
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    index: Int[Array, ""] | int,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Queries at slots index … index+T-1 see earlier slots of their own segment, with a window the last `window` of
    them.

    Padding is a segment of its own (0), so no row of the softmax is empty, and what it holds reaches no real token.
    """
    slots = index + jnp.arange(query_segments.shape[1], dtype=jnp.int32)
    distance = slots[:, None] - jnp.arange(key_segments.shape[1], dtype=jnp.int32)[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return seen[None] & (query_segments[:, :, None] == key_segments[:, None, :])


def masked_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H D"]:
    """Attention under any mask, keys of a cache among them; scores and softmax in float32.

    The soft cap is that of Gemma Team 2024, section 2.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation="xla")
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask[:, None, None], scale or size**-0.5, softcap).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def _weights(scores: Array, mask: Array, scale: float, softcap: float | None) -> Array:
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)


def reference(query, key, value, segments, *, window, scale, softcap):
    """The equation as it stands, with a matrix of scores [B, H, T, T]."""
    return masked_attention(query, key, value, attention_mask(segments, segments, 0, window), scale, softcap)


def blocked(query, key, value, segments, *, window, scale, softcap):
    """Row by row and block of queries by block, each against the keys that it may see.

    Half of the scores of causal attention are never computed, and those of a block fit in a CPU's cache. The backward
    pass computes them again, so that what is kept is linear in T (Dao 2024, section 3.1, without its running softmax).
    """
    batch, length, heads, size = query.shape
    groups = heads // key.shape[2]
    block = max(64, -(-length // 16))  # at most 16 blocks to compile

    def row(arrays):
        query, key, value, segments = arrays  # [G, T, D], [T, D], [T, D], [T]
        one = jax.checkpoint(partial(_block, window=window, scale=scale, softcap=softcap))
        outputs = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            seen = slice(0 if window is None else max(0, start - window + 1), stop)
            outputs.append(one(query[:, start:stop], key[seen], value[seen], segments[start:stop], segments[seen]))
        return jnp.concatenate(outputs, axis=1)

    query = jnp.moveaxis(query.reshape(batch, length, -1, groups, size), 1, 3).reshape(-1, groups, length, size)
    key, value = (jnp.moveaxis(x, 1, 2).reshape(-1, length, size) for x in (key, value))
    segments = jnp.repeat(segments, query.shape[0] // batch, axis=0)
    out = jax.lax.map(row, (query, key, value, segments)).reshape(batch, -1, groups, length, size)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, size)


def _block(query, key, value, query_segments, key_segments, *, window, scale, softcap):
    """Attention of the queries [G, T, D] of the last T of the S tokens that the keys are of."""
    scores = jnp.einsum("gtd,sd->gts", query, key, preferred_element_type=jnp.float32)
    mask = attention_mask(query_segments[None], key_segments[None], key.shape[0] - query.shape[1], window)
    return jnp.einsum("gts,sd->gtd", _weights(scores, mask, scale, softcap).astype(value.dtype), value)
