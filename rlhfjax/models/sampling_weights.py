"""A decoder's weights as sampling reads them: for one token per row, layer by layer, in blocks of outputs.

Training reads the layers in a scan over stacked parameters. A loop that samples would copy each layer's weights in
every step of it, so here the layers stand apart.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.lora import has_adapters, merge
from rlhfjax.models.quantized import is_quantized
from rlhfjax.target import current
from rlhfjax.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """What sampling reads of a decoder, from `arrange`. Every linear is {"kernel": blocks [in, outputs], …} or
    {"rows": blocks [outputs, in], …}."""

    ends: Params  # embeddings, final norm, unembedding, heads that predict further ahead
    layers: tuple[Params, ...]


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


def columns(linear: Params) -> tuple[Array, ...]:
    return tuple(block.T for block in linear["rows"]) if "rows" in linear else linear["kernel"]


def apply(config: DecoderConfig, linear: Params, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
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


def apply_all(config: DecoderConfig, linears: list[Params], x: Array) -> Array:
    made = [apply(config, linear, x) for linear in linears]
    return made[0] if len(made) == 1 else jnp.concatenate(made, axis=-1)
