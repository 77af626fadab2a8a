"""Pallas splash attention on TPUs: which blocks of scores it computes, and what a query sees in one, as plain data.

jax's own masks find the blocks by looking at each pair of tokens, minutes for 128k of them; and each is fixed while
tracing. Here blocks come from the first and last token of each, by numpy where they are known, else on the device.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

INTERPRET = False  # the kernels run by an interpreter where there is no TPU; tests set it

LONGEST_SHARED = 2**15  # tokens of a row with `prefixes`: two places of a row are one number of 32 bits


def splash_attention(
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
    """Blocks that the causal mask or the window leaves empty are not computed; with `prefixes` also those that no
    segment or shared prompt joins.

    `slots` are the places of the queries in the row, rising; without them they are those of all T tokens. Lengths are
    padded to whole blocks, with a segment that no token is in. Inside a mesh of several devices it has to run under
    `shard_map` (`rlhfjax.layout`), since XLA can't split it.
    """
    asked, length = query.shape[1], key.shape[1]
    rows, columns = (128 * math.ceil(count / 128) for count in (asked, length))
    side = next(side for side in (512, 256, 128) if rows % side == columns % side == 0)
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query = jnp.swapaxes(padded(query, rows), 1, 2)
    key, value = (jnp.swapaxes(padded(x, columns), 1, 2) for x in (key, value))
    segments = padded(segments, columns)
    places = np.arange(rows, dtype=np.int32) if slots is None else _continued(slots, rows)
    kernel = partial(kernel_of, side=side, softcap=softcap)
    if prefixes is None:
        program = kernel(causal_blocks(places, columns // side, window, side), places, Earlier(window))
        out: Any = jax.vmap(program)(query, key, value, _ids(segments[:, places], segments))
    else:
        shared = partial(_shared, kernel, places, side)
        out = jax.vmap(shared)(query, key, value, segments, padded(prefixes, columns))
    return jnp.swapaxes(out, 1, 2)[:, :asked]


@dataclass(frozen=True)
class Earlier:
    """Whether a query sees a key, by their places; a value, so that kernels of one shape are one program."""

    window: int | None

    def __call__(self, query: Any, key: Any) -> Any:
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)


@dataclass(frozen=True)
class OwnOrShared:
    """Whether a query sees a key of its group, where the keys of all T tokens come twice.

    Of the first T, those of prompts alone have a group's name, and all before the query's segment are seen; of the
    others its own segment up to itself. A query is where its segment begins, and in the lower 16 bits where it is.
    """

    length: int

    def __call__(self, query: Any, key: Any) -> Any:
        start, place, own = query >> 16, query & 0xFFFF, key - self.length
        return (key < start) | ((own >= start) & (own <= place))


def _shared(kernel, places, side, query, key, value, segments, prefixes) -> Any:
    """One row [heads, tokens, D] whose segments go on from others: a group has the name of its prompt's segment."""
    seen, codes, prompt = shared_blocks(places, side, segments, prefixes)
    program = kernel(seen, codes, OwnOrShared(len(segments)))
    twice = (jnp.concatenate([x, x], axis=1) for x in (key, value))
    return program(query, *twice, _ids(prefixes[places], jnp.concatenate([prompt, prefixes])))


def shared_blocks(
    places: Any, side: int, segments: Int[Array, "T"], prefixes: Int[Array, "T"]
) -> tuple[Bool[Array, "Q 2S"], Int[Array, "N"], Int[Array, "T"]]:
    """Blocks that the queries at these places see, where each query's segment begins and it is (`OwnOrShared`), and the
    name of each token of a prompt, -2 on others.
    """
    length = len(segments)
    begins = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(length, dtype=jnp.int32), 0))[places]
    prompt = jnp.where((segments == prefixes) & (segments > 0), segments, -2)
    groups = _groups(segments[places], prefixes[places], prompt, side)
    own = causal_blocks(places, length // side, None, side, start)
    return jnp.concatenate([groups, own], axis=1), start << 16 | places, prompt


def _groups(segments, prefixes, prompt, side: int) -> Bool[Array, "Q S"]:
    """Blocks of queries and of keys whose groups overlap: responses, and tokens of prompts."""
    response = (segments != prefixes) & (segments > 0)
    least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    low, high = _ends(jnp.where(response, prefixes, most), jnp.where(response, prefixes, least), side)
    first, last = _ends(jnp.where(prompt > 0, prompt, most), jnp.where(prompt > 0, prompt, least), side)
    return (low[:, None] <= last[None, :]) & (first[None, :] <= high[:, None])


def causal_blocks(places, blocks: int, window: int | None, side: int, start=None) -> Any:
    """Blocks [Q, S] in which a query at these places sees a key that is no later, in its window, and after `start`."""
    start = places if start is None else start
    first, last = _ends(start, places, side)
    column = np.arange(blocks) * side
    seen = column[None, :] <= last[:, None]
    if window is None and start is places:
        return seen
    return seen & (column[None, :] + side > first[:, None] - (0 if window is None else window - 1))


def _ends(low, high, side: int) -> Any:
    """The least of `low` and the greatest of `high` in each block."""
    return low.reshape(-1, side).min(axis=1), high.reshape(-1, side).max(axis=1)


def kernel_of(seen, places, function, *, side: int, softcap: float | None) -> Any:
    """Splash attention of blocks [Q, S] of `side` x `side` scores, forward and backward."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    by_query = _info(*_steps(seen), places)
    blocks, used = _steps(seen.T, again=True)
    by_key = _info(blocks.T, used.T, places)
    return splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=splash.BlockSizes(**dict.fromkeys(sizes, side)),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=None,
        mask_function=function,
        interpret=INTERPRET,
    )


def _steps(seen: Any, again: bool = False) -> tuple[Any, Any]:
    """The blocks of each row in the order in which they are computed, and which of the steps compute one.

    The others name the block that comes next, so that it is fetched then: the first of the next row, or, where a row
    comes `again` for each head, of the same. There are as many steps as the fullest row has blocks, if that is known.
    """
    math_of: Any = np if isinstance(seen, np.ndarray) else jnp
    width = int(seen.sum(axis=1).max()) if isinstance(seen, np.ndarray) else seen.shape[1]
    order = math_of.argsort(~seen, axis=1, stable=True)[:, :width]
    used = math_of.take_along_axis(seen, order, axis=1)
    first = order[:, :1] if again else math_of.roll(order[:, :1], -1, axis=0)
    return math_of.where(used, order, first), used


def _info(blocks, used, places) -> Any:
    """What the kernels read of a mask, in scalar memory, where each byte counts."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    small = jnp.int8 if max(blocks.shape) < 128 else jnp.int16
    return MaskInfo(
        data_next=jnp.asarray(blocks, small)[None],
        mask_next=None,
        block_mask=jnp.asarray(used, jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=jnp.asarray(places),  # pyright: ignore[reportArgumentType]
    )


def _ids(query: Array, key: Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(query, key)


def _continued(slots: Int[Array, "N"], length: int) -> Int[Array, "length"]:
    """`slots` up to this length, the last again."""
    return jnp.pad(slots, (0, length - len(slots)), mode="edge")


def padded(x: Array, length: int) -> Array:
    """[B, T, …] to [B, length, …]; what is added to segments is -1, which is no segment's id."""
    fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
