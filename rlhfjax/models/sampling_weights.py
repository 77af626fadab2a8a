"""A decoder's weights as sampling reads them: for one token per row, layer by layer, in blocks of outputs.

Training reads the layers in a scan over stacked parameters. A loop that samples would copy each layer's weights in
every step of it, so here the layers stand apart, but for TPUs, which read them where they lie.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax import layout
from rlhfjax.models.activations import GATED, PLAIN
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.experts import Experts
from rlhfjax.models.layers import FeedForward, Linear
from rlhfjax.models.lora import has_adapters, merge
from rlhfjax.models.products import dot_general
from rlhfjax.models.quantized import is_quantized
from rlhfjax.target import current
from rlhfjax.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """What sampling reads of a decoder, from `arrange`.

    The layers are `whole` where each is as the parameters have it. Elsewhere those that read the same input are joined,
    every linear is {"kernel": blocks [in, outputs], …} or {"rows": blocks [outputs, in], …}; as that of `unembed` is.
    """

    ends: Params  # embeddings, final norm, unembedding, heads that predict further ahead
    layers: Any  # each by itself, or the stack of them, as the parameters have it

    @property
    def stacked(self) -> bool:
        return isinstance(self.layers, dict)

    @property
    def whole(self) -> bool:
        return self.stacked or "attention" in self.layers[0]


def stacks_layers() -> bool:
    """Whether the layers of a sampler are scanned on the target."""
    return current().platform == "tpu"


def arrange(config: DecoderConfig, params: Any, rows: int | None = None) -> Weights:
    """Parameters in the order and type in which sampling reads them; weights stay as they are.

    Adapters are merged, unless what is below them is quantised. On several devices and where layers are scanned they
    stay whole: of joined matrices each device would lack parts of its own. Elsewhere matrices that read the same input
    become one, cut into as many blocks of outputs as the target says, which XLA can multiply beside each other on a
    CPU, where a product of few rows uses one thread. Where only one of `rows` decodes, a CPU reads blocks of
    [outputs, in] faster.
    """
    if isinstance(params, Weights):
        return params
    if has_adapters(params) and not is_quantized(params):
        params = merge(params, config.lora_alpha)
    devices = layout.current()
    if devices is not None or stacks_layers():
        made = _whole(config, params)
        made = made if devices is None else devices.weights(made)
    else:
        made = _joined(config, params, 0 if rows == 1 and current().platform == "cpu" else current().blocks)
    # What is made here once must not be made again in the loop that reads it.
    return jax.lax.optimization_barrier(made)


def _joined(config: DecoderConfig, params: Params, parts: int) -> Weights:
    blocks = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.layers)]
    layers = tuple(_layer(config, block, parts) for block in blocks)
    ends = _ends(params)
    if config.tied:
        table = _cast(config, params["embed"]["embedding"])
        # CPUs multiply several rows by a transposed matrix more slowly; accelerators need no copy of it.
        rows_of_it = (table,) if parts else _blocks(table, current().blocks, axis=0)
        unembed: Params = {"rows": rows_of_it} if parts < 2 else {"kernel": _blocks(table.T, parts, axis=1)}
        unembed |= _scale_of(params["embed"])
    else:
        unembed = _linear(config, [params["unembed"]], 1, parts)
    return Weights(ends | {"unembed": unembed}, layers)


def _whole(config: DecoderConfig, params: Params) -> Weights:
    c, ends = config, _ends(params)
    if c.input_scale == 1 and c.positions != "learned":  # so that nothing is rounded twice
        ends["embed"] = ends["embed"] | {"embedding": _cast(c, ends["embed"]["embedding"])}
    if c.tied:
        unembed = {"rows": (_cast(c, params["embed"]["embedding"]),)} | _scale_of(params["embed"])
    else:
        unembed = _linear(c, [params["unembed"]], 1, 1)

    def ready(path: tuple, x: Array) -> Array:
        names = [entry.key for entry in path]
        return _cast(c, x) if names[-1] == "kernel" and "router" not in names else x

    blocks = jax.tree_util.tree_map_with_path(ready, params["blocks"])
    apart = (jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(c.layers))
    return Weights(ends | {"unembed": unembed}, blocks if stacks_layers() else tuple(apart))


def _ends(params: Params) -> Params:
    return {name: params[name] for name in ("embed", "positions", "final_norm", "mtp_heads") if name in params}


def _scale_of(embed: Params) -> Params:
    return {"scale": embed["embedding_scale"][:, 0]} if "embedding_scale" in embed else {}


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


def _layer(config: DecoderConfig, block: Params, parts: int) -> Params:
    c, attention = config, block["attention"]

    def together(tree: Params, names: tuple[str, ...]) -> list[Params]:
        whole = not any(has_adapters(tree[name]) for name in names)
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


def columns(linear: Params) -> tuple[Array, ...]:
    return tuple(block.T for block in linear["rows"]) if "rows" in linear else linear["kernel"]


def projected(config: DecoderConfig, layer: Params, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
    """Queries [B, T, H, D], keys and values [B, T, K, D] of a layer's input."""
    c = config
    if "attention" in layer:
        parts = (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads))
        made = (_of_whole(c, layer["attention"][name], (count, c.head_dim), x) for name, count in parts)
        query, key, value = made
        return query, key, value
    joined = _apply_all(c, layer["qkv"], x).reshape(*x.shape[:2], c.heads + 2 * c.kv_heads, c.head_dim)
    query, key, value = jnp.split(joined, [c.heads, c.heads + c.kv_heads], axis=2)
    return query, key, value


def put_out(config: DecoderConfig, layer: Params, x: Float[Array, "B T H D"]) -> Float[Array, "B T W"]:
    """What attention adds to the residual stream."""
    if "attention" in layer:
        return _of_whole(config, layer["attention"]["out"], config.width, x, axis=(-2, -1))
    return _apply(config, layer["out"], x.reshape(*x.shape[:2], -1))


def routed(
    config: DecoderConfig, layer: Params, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
    """The feed-forward block of experts, and which of them each token was sent to."""
    inputs = {"params": layer["experts"]}, x, jnp.ones(x.shape[:2], bool)
    out, sown = Experts(config).apply(*inputs, mutable=["chosen"])
    (chosen,) = jax.tree.leaves(sown)
    return out, chosen.astype(jnp.int16)  # pyright: ignore[reportReturnType]


def fed(config: DecoderConfig, layer: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The feed-forward block."""
    c = config
    if c.experts:
        return Experts(c).apply({"params": layer["experts"]}, x, jnp.ones(x.shape[:2], bool))  # pyright: ignore
    if "mlp" in layer:
        return FeedForward(c).apply({"params": layer["mlp"]}, x)  # pyright: ignore[reportReturnType]
    hidden = _apply_all(c, layer["up"], x)
    if not c.gated:
        return _apply(c, layer["down"], PLAIN[c.activation](hidden))
    return _apply(c, layer["down"], GATED[c.activation](*jnp.split(hidden, 2, axis=-1)))


def _of_whole(
    config: DecoderConfig, params: Params, features: Any, x: Array, axis: int | tuple[int, ...] = -1
) -> Array:
    how: dict[str, Any] = {"dtype": config.compute_dtype, "dot_general": dot_general, "lora_alpha": config.lora_alpha}
    linear = Linear(features, axis=axis, use_bias="bias" in params, **how)
    return linear.apply({"params": params}, x)  # pyright: ignore[reportReturnType]


def _apply(config: DecoderConfig, linear: Params, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """x · kernel · scale + bias + (lora_alpha / r) (x · lora_a) · lora_b."""
    made = [x @ block.astype(x.dtype) for block in columns(linear)]
    out = made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
    if "scale" in linear:
        out = (out.astype(jnp.float32) * linear["scale"][None, None, :]).astype(x.dtype)
    if "bias" in linear:
        out = out + linear["bias"].astype(x.dtype)[None, None, :]
    if "lora_a" in linear:
        down, up = linear["lora_a"].astype(x.dtype), linear["lora_b"].astype(x.dtype)
        out = out + (config.lora_alpha / down.shape[-1]) * (x @ down @ up)
    return out


def _apply_all(config: DecoderConfig, linears: list[Params], x: Array) -> Array:
    made = [_apply(config, linear, x) for linear in linears]
    return made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
