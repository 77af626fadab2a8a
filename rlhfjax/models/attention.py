"""Causal attention within segments: one function, and four programs that compute it.

`xla` is the reference: the matrix of scores as it stands in the equation. The others never hold it whole. `blocked` is
for CPUs, `cudnn` for NVIDIA GPUs, `splash` for TPUs; `auto` takes the one of the target. Which one runs is decided
while tracing, from target, types and shapes alone, and what a kernel does not take goes to `xla`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax import layout
from rlhfjax.models.kernels import cudnn_attention, cudnn_takes
from rlhfjax.models.splash import LONGEST_SHARED, splash_attention
from rlhfjax.target import current


@dataclass(frozen=True)
class Scoring:
    """How a key is scored: softcap · tanh(scale · q·k / softcap), or scale · q·k without a soft cap.

    Layers with a `window` score its last tokens alone. Without a scale it is 1 / sqrt(head size).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


def attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    local: bool | Bool[Array, ""],
    *,
    scoring: Scoring = Scoring(),
    prefixes: Int[Array, "B T"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H D"]:
    """softmax(scale · q·k) · v over earlier tokens of the same segment and their own (Vaswani et al. 2017, eq. 1).

    `local` layers see the last tokens only, those of the window; it may be traced. Heads are a multiple of the K key
    heads. Segments are runs of equal ids; padding is one, whatever its id. `prefixes` names the segment that a token's
    own goes on from, which it sees as well. With `sinks` each head may look at nothing (`softmax`), which `xla` alone
    computes. Raises ValueError on another implementation, and where `takes_prefixes` says no.
    """
    window, softcap, length = scoring.window, scoring.softcap, query.shape[1]
    scale = scoring.scale or query.shape[-1] ** -0.5
    program = _program(implementation, query, key, softcap) if sinks is None else partial(reference, sinks=sinks)
    if prefixes is not None and not takes_prefixes(implementation, window, length):
        raise ValueError(f"expected segments alone for {implementation!r} with window {window}, got prefixes too")
    arrays = (query, key, value, segments) + (() if prefixes is None else (prefixes,))
    near, everywhere = (partial(program, window=seen, scale=scale, softcap=softcap) for seen in (window, None))
    chosen = everywhere
    if window is not None and window < length:
        if isinstance(local, bool):
            chosen = near if local else everywhere
        else:
            chosen, arrays = partial(_either, near, everywhere), (*arrays, local)
    if devices := layout.current():
        chosen = devices.attention(chosen, program in (cudnn_attention, splash_attention))
    return chosen(*arrays)


def _either(near, everywhere, *arrays, **places):
    """What a layer computes that is `local` or not by the last of the arrays."""
    *arrays, local = arrays
    return jax.lax.cond(local, partial(near, **places), partial(everywhere, **places), *arrays)


def takes_prefixes(implementation: str, window: int | None, length: int) -> bool:
    """Whether segments of rows of this length may go on from others: not over a window, nor in splash attention of more
    tokens than it can name.
    """
    splash = implementation == "splash" or (implementation == "auto" and current().platform == "tpu")
    return (window is None or window >= length) and (not splash or length <= LONGEST_SHARED)


def _program(wanted: str, query: Array, key: Array, softcap: float | None) -> Callable[..., Array]:
    """The program that runs for these shapes on the target."""
    if wanted == "auto":
        wanted = {"gpu": "cudnn", "tpu": "splash"}.get(current().platform, "blocked")
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
    prefixes: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T S"]:
    """Queries at slots index … index+T-1 see earlier slots of their own segment, with a window the last `window` of
    them, and those of the segment that `prefixes` names.

    Padding is a segment of its own (0), so no row of the softmax is empty, and what it holds reaches no real token.
    """
    slots = index + jnp.arange(query_segments.shape[1], dtype=jnp.int32)
    distance = slots[:, None] - jnp.arange(key_segments.shape[1], dtype=jnp.int32)[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    related = query_segments[:, :, None] == key_segments[:, None, :]
    if prefixes is not None:
        related |= prefixes[:, :, None] == key_segments[:, None, :]
    return seen[None] & related


def masked_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H D"]:
    """Attention under any mask, keys of a cache among them; scores and softmax in float32.

    The soft cap is that of Gemma Team 2024, section 2.
    """
    if softcap is None and sinks is None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation="xla")
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask[:, None, None], scale or size**-0.5, softcap, sinks).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def _weights(scores: Array, mask: Array, scale: float, softcap: float | None, sinks: Array | None) -> Array:
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), sinks)


def softmax(scores: Float[Array, "B K G T S"], sinks: Float[Array, "K*G"] | None) -> Float[Array, "B K G T S"]:
    """exp(s) / Σ exp(s); with a sink of each head, a score that stands for no token, exp(s) / (Σ exp(s) + exp(sink)).

    (Xiao et al. 2024, section 3.3; OpenAI 2025, gpt-oss model card.)
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sink))
    parts = jnp.exp(scores - top)
    return parts / (parts.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))


def reference(query, key, value, segments, prefixes=None, *, window, scale, softcap, sinks=None):
    """The equation as it stands, with a matrix of scores [B, H, T, T]."""
    mask = attention_mask(segments, segments, 0, window, prefixes)
    return masked_attention(query, key, value, mask, scale, softcap, sinks)


def blocked(query, key, value, segments, prefixes=None, *, window, scale, softcap):
    """Block of queries by block, each against the keys that it may see.

    Half of the scores of causal attention are never computed, and those of a block are few. The backward pass computes
    them again from their logarithmic sums, so that what is kept is linear in T (Dao 2024, section 3.1).
    """
    return _blocked((window, scale, softcap), query, key, value, (segments, prefixes))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(static, query, key, value, ids):
    return _blocked_forward(static, query, key, value, ids)[0]


def _blocked_forward(static, query, key, value, ids):
    queries, keys, values = _by_head(query, key), _by_head(key, key)[:, :, 0], _by_head(value, key)[:, :, 0]
    outs, log_sums = [], []
    for rows, seen in _blocks(query.shape[1], static[0]):
        scores, _ = _scores(static, queries[..., rows, :], keys[..., seen, :], ids, rows, seen)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = jnp.einsum(
            "bkgts,bksd->bkgtd", weights.astype(value.dtype), values[..., seen, :], preferred_element_type=jnp.float32
        )
        outs.append((mixed / total).astype(query.dtype))
        log_sums.append(top + jnp.log(total))
    out, log_sum = jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)
    return _by_token(out, query.shape), (query, key, value, ids, out, log_sum)


def _blocked_backward(static, residuals, g):
    query, key, value, ids, out, log_sum = residuals
    window, scale, softcap = static
    queries, gs = _by_head(query, key), _by_head(g, key)
    keys, values = _by_head(key, key)[:, :, 0], _by_head(value, key)[:, :, 0]
    inner = (gs.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    of_queries, of_keys, of_values = [], *(jnp.zeros(keys.shape, jnp.float32) for _ in range(2))
    for rows, seen in _blocks(query.shape[1], window):
        some, taught = queries[..., rows, :], gs[..., rows, :]
        scores, mask = _scores(static, some, keys[..., seen, :], ids, rows, seen)
        weights = jnp.where(mask, jnp.exp(scores - log_sum[..., rows, :]), 0.0)
        of_weights = _product("bkgtd,bksd->bkgts", taught, values[..., seen, :])
        of_scores = scale * weights * (of_weights - inner[..., rows, :])
        if softcap is not None:
            of_scores = of_scores * jnp.where(mask, 1.0 - jnp.square(scores / softcap), 0.0)
        of_scores, weights = of_scores.astype(query.dtype), weights.astype(query.dtype)
        of_queries.append(_product("bkgts,bksd->bkgtd", of_scores, keys[..., seen, :]))
        of_keys = of_keys.at[..., seen, :].add(_product("bkgts,bkgtd->bksd", of_scores, some))
        of_values = of_values.at[..., seen, :].add(_product("bkgts,bkgtd->bksd", weights, taught))
    of_query = _by_token(jnp.concatenate(of_queries, axis=3), query.shape).astype(query.dtype)
    of_key, of_value = (_by_token(x[:, :, None], key.shape).astype(key.dtype) for x in (of_keys, of_values))
    return of_query, of_key, of_value, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that one of them may see."""
    blocks = min(16, -(-length // 64))  # no more to compile
    block = -(-length // blocks)
    for start in range(0, length, block):
        stop = min(start + block, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _scores(static, query, key, ids, rows, seen):
    """Scores [B, K, G, T, S] of a block, the least number where a key is not seen, and where it is."""
    window, scale, softcap = static
    scores = scale * _product("bkgtd,bksd->bkgts", query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    segments, prefixes = ids
    prefixes = None if prefixes is None else prefixes[:, rows]
    mask = attention_mask(segments[:, rows], segments[:, seen], rows.start - seen.start, window, prefixes)
    mask = mask[:, None, None]
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min), mask


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _by_head(x, key):
    """[B, T, H, D] to [B, K, G, T, D]."""
    batch, length, heads, size = x.shape
    kinds = key.shape[2]
    return jnp.moveaxis(x.reshape(batch, length, kinds, heads // kinds, size), 1, 3)


def _by_token(x, shape):
    """[B, K, G, T, D] to [B, T, H, D]."""
    return jnp.moveaxis(x, 3, 1).reshape(shape)
