"""A decoder that samples: weights laid out for one token per row, a cache of keys and values, and `extend`.

Training reads the layers in a scan over stacked parameters. A loop that samples would copy each layer's weights and the
whole cache in every step of it, so here the layers stand apart and are unrolled, and the cache is updated in place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.activations import GATED, PLAIN
from rlhfjax.models.attention import softmax
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.experts import Experts
from rlhfjax.models.layers import at_columns, by_heads, norm
from rlhfjax.models.lora import has_adapters, merge
from rlhfjax.models.quantized import Int8Vectors, empty_vectors, is_quantized, read_vectors, vectors
from rlhfjax.models.rotary import rotate, turns
from rlhfjax.target import current
from rlhfjax.types import Params

Store = Callable[[int, Array, Array], tuple[Any, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """What sampling reads of a decoder, from `arrange`. Every linear is {"kernel": blocks [in, outputs], …} or
    {"rows": blocks [outputs, in], …}."""

    ends: Params  # embeddings, final norm, unembedding, heads that predict further ahead
    layers: tuple[Params, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [B, kv_heads, S, head_dim]; a token's slot is its position. Each is an array, or
    integers and scales (`quantized.Int8Vectors`).

    The first `lengths` slots of a row are its own. What the others hold is never read.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    lengths: Int[Array, "B"]

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.values)[0].shape[2]

    def take(self, rows: Int[Array, "N"]) -> "Cache":
        """The cache of these rows, in this order; a row may come several times."""
        return jax.tree.map(lambda x: x[rows], self)

    def put(self, part: "Cache", rows: Int[Array, "N"]) -> "Cache":
        """This cache with the rows of one with at most as many slots at `rows`, distinct; those beyond the end go
        nowhere.
        """

        def write(mine: Array, theirs: Array) -> Array:
            place = (rows, *(slice(0, size) for size in theirs.shape[1:]))
            return mine.at[place].set(theirs, mode="drop", unique_indices=True)

        return jax.tree.map(write, self, part)


def empty_cache(config: DecoderConfig, rows: int, slots: int, int8: bool = False) -> Cache:
    """A cache of so many rows without a token."""
    c, lengths = config, jnp.zeros((rows,), jnp.int32)
    shape = rows, c.kv_heads, slots, c.head_dim
    keys, values = (tuple(empty_vectors(shape, 3, c.compute_dtype, int8) for _ in range(c.layers)) for _ in range(2))
    return Cache(keys, values, lengths)


def arrange(
    config: DecoderConfig, params: Any, parts: int | None = None, fused: bool = True, rows: int | None = None
) -> Weights:
    """Parameters in the order and type in which sampling reads them; weights stay as they are.

    Adapters are merged, unless what is below them is quantised. With `fused`, matrices that read the same input become
    one; on a mesh that splits heads they had better stay apart. Each is cut into `parts` blocks of outputs (None: as
    many as the target says), which XLA can multiply beside each other on a CPU, where a product of few rows uses one
    thread. Where only one of `rows` decodes, a CPU reads blocks of [outputs, in] faster; parts 0 asks for those.
    """
    if isinstance(params, Weights):
        return params
    if has_adapters(params) and not is_quantized(params):
        params = merge(params, config.lora_alpha)
    if parts is None:
        parts = 0 if rows == 1 and current().platform == "cpu" else current().blocks
    blocks = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.layers)]
    layers = tuple(_layer(config, block, parts, fused) for block in blocks)
    ends = {name: params[name] for name in ("embed", "positions", "final_norm", "mtp_heads") if name in params}
    if config.tied:
        table, scale = _cast(config, params["embed"]["embedding"]), params["embed"].get("embedding_scale")
        # CPUs multiply several rows by a transposed matrix more slowly; accelerators need no copy of it.
        rows_of_it = (table,) if parts else _blocks(table, current().blocks, axis=0)
        unembed: Params = {"rows": rows_of_it} if parts < 2 else {"kernel": _blocks(table.T, parts, axis=1)}
        unembed |= {} if scale is None else {"scale": scale[:, 0]}
    else:
        unembed = _linear(config, [params["unembed"]], 1, parts)
    # What is made here once must not be made again in the loop that reads it.
    return jax.lax.optimization_barrier(Weights(ends | {"unembed": unembed}, layers))


def _cast(config: DecoderConfig, x: Array) -> Array:
    return x if x.dtype == jnp.int8 else x.astype(config.compute_dtype)


def _blocks(x: Array, parts: int, axis: int) -> tuple[Array, ...]:
    """`x` in parts of nearly the same size, as arrays of their own."""
    size = x.shape[axis]
    bounds = [size * i // parts for i in range(parts + 1)]
    return tuple(jax.lax.slice_in_dim(x, *ends, axis=axis) for ends in pairwise(bounds) if ends[0] < ends[1])


def _linear(config: DecoderConfig, linears: list[Params], inputs: int, parts: int) -> Params:
    """One linear of all outputs of several that read the same input, `inputs` axes of it."""
    size = math.prod(linears[0]["kernel"].shape[:inputs])
    kernel = jnp.concatenate([_cast(config, one["kernel"].reshape(size, -1)) for one in linears], axis=1)
    blocks = _blocks(kernel, parts, axis=1) if parts else _blocks(kernel.T, current().blocks, axis=0)
    made: Params = {"kernel" if parts else "rows": blocks}
    for name, leaf in (("kernel_scale", "scale"), ("bias", "bias")):
        if name in linears[0]:
            made[leaf] = jnp.concatenate([one[name].reshape(-1) for one in linears])
    if "lora_a" in linears[0]:  # of one linear alone
        rank = linears[0]["lora_a"].shape[-1]
        made |= {"lora_a": linears[0]["lora_a"].reshape(size, rank), "lora_b": linears[0]["lora_b"].reshape(rank, -1)}
    return made


def _layer(config: DecoderConfig, block: Params, parts: int, fused: bool) -> Params:
    c, attention = config, block["attention"]

    def together(tree: Params, names: tuple[str, ...]) -> list[Params]:
        whole = fused and not any(has_adapters(tree[name]) for name in names)
        groups = [[tree[name] for name in names]] if whole else [[tree[name]] for name in names]
        return [_linear(c, group, 1, parts) for group in groups]

    made = {name: tree for name, tree in block.items() if name.endswith("_norm")}
    if "experts" in block:  # the router stays float32
        made["experts"] = {
            name: tree if name == "router" else {leaf: _cast(c, array) for leaf, array in tree.items()}
            for name, tree in block["experts"].items()
        }
    made |= {name: attention[name] for name in ("query_norm", "key_norm", "sinks") if name in attention}
    made |= {"qkv": together(attention, ("query", "key", "value")), "out": _linear(c, [attention["out"]], 2, parts)}
    if "mlp" in block:
        names = ("gate", "up") if c.gated else ("up",)
        made |= {"up": together(block["mlp"], names), "down": _linear(c, [block["mlp"]["down"]], 1, parts)}
    return made


def _columns(linear: Params) -> tuple[Array, ...]:
    return tuple(block.T for block in linear["rows"]) if "rows" in linear else linear["kernel"]


def _apply(config: DecoderConfig, linear: Params, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """x · kernel · scale + bias + (lora_alpha / r) (x · lora_a) · lora_b."""
    made = [x @ block.astype(x.dtype) for block in _columns(linear)]
    out = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    if "scale" in linear:
        out = (out.astype(jnp.float32) * linear["scale"][None, None, :]).astype(x.dtype)
    if "bias" in linear:
        out = out + linear["bias"].astype(x.dtype)[None, None, :]
    if "lora_a" in linear:
        down, up = linear["lora_a"].astype(x.dtype), linear["lora_b"].astype(x.dtype)
        out = out + (config.lora_alpha / down.shape[-1]) * (x @ down @ up)
    return out


def _all(config: DecoderConfig, linears: list[Params], x: Array) -> Array:
    made = [_apply(config, linear, x) for linear in linears]
    return made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)


def _norm(config: DecoderConfig, params: Params, name: str, x: Array) -> Array:
    return norm(config, name).apply({"params": params[name]}, x)  # pyright: ignore[reportReturnType]


def _attention(config: DecoderConfig, layer: Params, x: Array, turn: Any, mask: Array, store: Any, read: Any) -> Any:
    """Attention of T new tokens per row, or of those at `read`, to what `store` answers with once it has their keys and
    values.
    """
    c, batch = config, len(x)
    joined = _all(c, layer["qkv"], x).reshape(batch, x.shape[1], c.heads + 2 * c.kv_heads, c.head_dim)
    query, key, value = jnp.split(joined, [c.heads, c.heads + c.kv_heads], axis=2)
    if c.qk_norm:
        query = by_heads(c, lambda x: _norm(c, layer, "query_norm", x), query)
        key = by_heads(c, lambda x: _norm(c, layer, "key_norm", x), key)
    if turn is not None:
        query, key = rotate(query, turn), rotate(key, turn)
    keys, values = store(key.astype(c.compute_dtype), value.astype(c.compute_dtype))
    query, mask = _wanted(query, read), _wanted(mask, read)
    length = query.shape[1]
    grouped = query.reshape(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    numbers, scales = read_vectors(keys, query.dtype)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, numbers, preferred_element_type=jnp.float32)
    if scales is not None:
        scores = scores * scales[:, :, None, None, :, 0]
    scores = scores * c.score_scale
    if cap := c.attention_softcap:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = softmax(scores, layer.get("sinks"))
    numbers, scales = read_vectors(values, query.dtype)
    if scales is not None:
        weights = weights * scales[:, :, None, None, :, 0]
    out = jnp.einsum("bkgts,bksd->btkgd", weights.astype(numbers.dtype), numbers)
    return _apply(c, layer["out"], out.reshape(batch, length, -1)), (keys, values)


def _wanted(x: Float[Array, "B T *D"], read: Int[Array, "B N"] | None) -> Float[Array, "B N *D"]:
    return x if read is None else at_columns(x, read)


def _fed(config: DecoderConfig, layer: Params, x: Array) -> Array:
    c = config
    if c.experts:
        return Experts(c).apply({"params": layer["experts"]}, x, jnp.ones(x.shape[:2], bool))  # pyright: ignore
    hidden = _all(c, layer["up"], x)
    if not c.gated:
        return _apply(c, layer["down"], PLAIN[c.activation](hidden))
    return _apply(c, layer["down"], GATED[c.activation](*jnp.split(hidden, 2, axis=-1)))


def _block(config: DecoderConfig, layer: Params, x: Array, turn: Any, mask: Array, store: Any, read: Any) -> Any:
    """One layer, its norms where `norm_place` says (`layers.Block`); nothing but keys and values beside `read`."""
    c = config

    def normed(y: Array, name: str, *places: str) -> Array:
        return _norm(c, layer, name, y) if c.norm_place in places else y

    def added(block: Array, name: str) -> Array:
        out = normed(block, name, "output", "sandwich")
        return out if c.residual_multiplier == 1 else c.residual_multiplier * out

    attended, kept = _attention(c, layer, normed(x, "attention_norm", "pre", "sandwich"), turn, mask, store, read)
    before = _wanted(x, read)
    x = normed(before + added(attended, "attention_post_norm"), "attention_norm", "post")
    fed = _fed(c, layer, normed(before if c.parallel else x, "mlp_norm", "pre", "sandwich"))
    return normed(x + added(fed, "mlp_post_norm"), "mlp_norm", "post"), kept


def _embedded(config: DecoderConfig, weights: Weights, tokens: Array, positions: Array) -> Array:
    c, embed = config, weights.ends["embed"]
    x = embed["embedding"][tokens]
    if "embedding_scale" in embed:
        x = x.astype(jnp.float32) * embed["embedding_scale"][tokens]
    if c.input_scale != 1:
        x = x * c.input_scale
    if c.positions == "learned":
        x = x + weights.ends["positions"]["embedding"][jnp.minimum(positions, c.context - 1)]
    return x.astype(c.compute_dtype)


def _forward(
    config: DecoderConfig,
    weights: Weights,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    slots: int,
    store: Store,
    read: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B T D"], tuple, tuple]:
    """Hidden states of T tokens per row that see the slots up to their own, and the keys and values of every layer.

    With `read` the states of these columns of each row alone, [B, N, D].
    """
    c = config
    distance = positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    everything = distance >= 0
    near = everything & (distance < c.window) if c.window else everything

    turned = turns(c, positions)
    x, kept = _embedded(c, weights, tokens, positions), []
    for i, (layer, local, rotated) in enumerate(zip(weights.layers, c.local_layers, c.rotated_layers, strict=True)):
        mask, last = near if local else everything, read if i == c.layers - 1 else None
        turn = turned[local] if rotated else None
        x, pair = _block(c, layer, x, turn, mask, lambda key, value, i=i: store(i, key, value), last)
        kept.append(pair)
    if c.norm_place != "post":
        x = _norm(c, weights.ends, "final_norm", x)
    return x, *zip(*kept, strict=True)  # pyright: ignore[reportReturnType]


def extend(
    config: DecoderConfig, weights: Weights, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], Cache]:
    """Append the first `counts` of T tokens to each row, behind its own end; their hidden states.

    Every token sees its row up to itself. The states of the others mean nothing, and nothing is kept of them. With T 1
    this is decoding, with more the verification of draft tokens.
    """
    batch, length = tokens.shape
    steps = jnp.arange(length, dtype=jnp.int32)[None, :]
    positions = cache.lengths[:, None] + steps
    # Those that are not kept go to slots beyond the end, a different one each.
    slots = jnp.where(steps < counts[:, None], positions, cache.slots + steps)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def store(layer: int, key: Array, value: Array) -> tuple[Any, Any]:
        keys, values = cache.keys[layer], cache.values[layer]
        int8 = isinstance(keys, Int8Vectors)

        def put(mine: Array, new: Array) -> Array:
            return mine.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

        return jax.tree.map(put, keys, vectors(key, int8)), jax.tree.map(put, values, vectors(value, int8))

    hidden, keys, values = _forward(config, weights, tokens, positions, cache.slots, store)
    return hidden, Cache(keys, values, cache.lengths + counts)


def prefill(
    config: DecoderConfig, weights: Weights, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], int8: bool = False
) -> tuple[Float[Array, "B D"], Cache]:
    """`extend` of empty rows by their first `lengths` tokens, with as many slots as there are columns; the hidden state
    of the last of them.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

    def store(_: int, key: Array, value: Array) -> Any:
        kept = vectors(key, int8), vectors(value, int8)
        return jax.tree.map(lambda x: x.transpose(0, 2, 1, 3), kept)

    last = jnp.maximum(lengths - 1, 0)[:, None]
    hidden, keys, values = _forward(config, weights, tokens, positions, length, store, last)
    return hidden[:, 0], Cache(keys, values, lengths)


def unembed(config: DecoderConfig, weights: Weights, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Hidden states to float32 logits; products in the type of the computation, sums in float32."""
    linear, cap = weights.ends["unembed"], config.logit_softcap
    x = hidden.astype(config.compute_dtype)
    made = [jnp.matmul(x, block.astype(x.dtype), preferred_element_type=jnp.float32) for block in _columns(linear)]
    logits = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    if "scale" in linear:
        logits = logits * linear["scale"].reshape((1,) * (logits.ndim - 1) + (-1,))
    if config.logit_divisor != 1:
        logits = logits / config.logit_divisor
    return cap * jnp.tanh(logits / cap) if cap else logits
