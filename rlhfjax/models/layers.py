"""Layers of the decoder: norms, attention with an explicit cache, feed-forward blocks."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.layout import lay
from rlhfjax.models.activations import GATED, PLAIN
from rlhfjax.models.attention import Scoring, attend
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.experts import Experts
from rlhfjax.models.products import dot_general
from rlhfjax.models.quantized import int8_dot
from rlhfjax.models.remat import again, halfway, keep
from rlhfjax.models.rotary import Turn, rotate


class Kind(NamedTuple):
    """What differs from layer to layer within one scan: arrays over the layers; None where all are alike."""

    local: Array | None
    rotated: Array | None
    routes: Int[Array, "*L B T K"] | None = None  # of experts, where they are not to choose themselves


def kinds(config: DecoderConfig) -> Kind:
    """The kinds of all layers."""
    sides = config.local_layers, config.rotated_layers
    return Kind(*(jnp.asarray(side) if len(set(side)) == 2 else None for side in sides))


class Sight(NamedTuple):
    """What every layer is told of the tokens it reads: where they are, and what they may see."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 0 is padding
    prefixes: Int[Array, "B T"] | None  # the segments that those go on from, where there are such
    turns: dict[bool, Turn]  # of the kinds of layers that there are, `local` or not; none without RoPE
    read: Int[Array, "B N"] | None = None  # the columns whose output is wanted, where it is not that of all

    def wanted(self, x: Float[Array, "B T *D"]) -> Float[Array, "B N *D"]:
        """`x` at those columns."""
        return x if self.read is None else at_columns(x, self.read)


def at_columns(x: Float[Array, "B T *D"], columns: Int[Array, "B N"]) -> Float[Array, "B N *D"]:
    """The entries of each row at its own columns."""
    return jnp.take_along_axis(x, columns.reshape(columns.shape + (1,) * (x.ndim - 2)), axis=1)


class OffsetRMSNorm(nn.Module):
    """x / rms(x) · (1 + w), float32 inside; w starts at 0 (Gemma Team 2024)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        scale = 1.0 + self.param("scale", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.config.compute_dtype)


def norm(config: DecoderConfig, name: str) -> nn.Module:
    """The norm of this family; its statistics are float32 whatever the input's type."""
    if config.norm_offset:
        return nn.remat(OffsetRMSNorm, prevent_cse=False)(config, name=name)
    kind = nn.remat(nn.RMSNorm if config.norm == "rms" else nn.LayerNorm, prevent_cse=False)
    return kind(epsilon=config.norm_eps, dtype=config.compute_dtype, name=name)


def by_heads(config: DecoderConfig, apply: Callable[[Array], Array], x: Float[Array, "B T H D"]) -> Array:
    """A norm of queries or keys: of each head by itself, or of all of them together."""
    return apply(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if config.qk_norm_whole else apply(x)


class Linear(nn.DenseGeneral):
    """x · kernel + bias, and where the parameters hold an adapter also (lora_alpha / r) (x · lora_a) · lora_b.

    `lora_a` is [*input axes, r], `lora_b` [r, *features] (Hu et al. 2022, eq. 3); without these leaves none is added.
    A kernel may be int8 with its scales beside it (`models/quantized.py`).
    """

    lora_alpha: float = 16.0

    @nn.compact
    def __call__(self, inputs):
        out = self._quantized(inputs) if self.has_variable("params", "kernel_scale") else super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return out
        down = self.get_variable("params", "lora_a").astype(out.dtype)
        up = self.get_variable("params", "lora_b").astype(out.dtype)
        inner = jnp.tensordot(inputs.astype(out.dtype), down, axes=down.ndim - 1)
        return out + (self.lora_alpha / down.shape[-1]) * jnp.tensordot(inner, up, axes=1)

    def _quantized(self, inputs):
        kernel, scale = self.get_variable("params", "kernel"), self.get_variable("params", "kernel_scale")
        out = int8_dot(inputs, kernel, scale, 1 if isinstance(self.axis, int) else len(self.axis), self.dtype)
        if not self.use_bias:
            return out
        bias = self.get_variable("params", "bias").astype(out.dtype)
        return out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)


def _linear(
    config: DecoderConfig,
    features,
    name: str,
    axis: int | tuple[int, ...] = -1,
    std: float | None = None,
    bias: bool = False,
    kernel_first: bool = False,
):
    return Linear(
        features,
        axis=axis,
        use_bias=config.biases or bias,
        dtype=config.compute_dtype,
        kernel_init=nn.initializers.normal(std or config.init_std),
        dot_general=partial(dot_general, name=name, kernel_first=kernel_first),
        lora_alpha=config.lora_alpha,
        name=name,
    )


class Attention(nn.Module):
    """Multi-head or grouped-query attention within segments.

    `kind` says whether this layer has the window, and whether it knows of positions; where layers of a scan differ,
    they are traced.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, sight: Sight, kind: Kind):
        c = self.config
        local = all(c.local_layers) if kind.local is None else kind.local
        query = _linear(c, (c.heads, c.head_dim), "query", bias=c.qkv_biases)(x)
        key = _linear(c, (c.kv_heads, c.head_dim), "key", bias=c.qkv_biases)(x)
        value = _linear(c, (c.kv_heads, c.head_dim), "value", bias=c.qkv_biases)(x)
        if c.qk_norm:
            query, key = by_heads(c, norm(c, "query_norm"), query), by_heads(c, norm(c, "key_norm"), key)
        if sight.turns:
            turn = _unless_still(kind.rotated, _either(local, sight.turns))
            query, key = rotate(query, turn), rotate(key, turn)
        scoring = Scoring(c.window, c.score_scale, c.attention_softcap)
        how = {"scoring": scoring, "prefixes": sight.prefixes, "implementation": c.attention}
        if c.attention_sinks:
            how |= {"sinks": self.param("sinks", nn.initializers.normal(c.init_std), (c.heads,), jnp.float32)}
        query, key, value = keep(query, key, value)
        out = sight.wanted(keep(attend(query, key, value, sight.segments, local, **how)))
        # GPT-2's residual scaling: outputs of both blocks start smaller by 1/sqrt(2 x layers).
        return _linear(c, c.width, "out", axis=(-2, -1), std=c.init_std / (2 * c.layers) ** 0.5)(out)


def _either(local, turns):
    """What a layer of that kind has; `local` is traced where layers of both kinds are in one scan."""
    if isinstance(local, bool):
        return turns[local]
    return jax.tree.map(partial(jnp.where, local), turns[True], turns[False])


def _unless_still(rotated, turn: Turn) -> Turn:
    """The turn of a layer that may know of no positions; by an angle of 0, nothing moves."""
    if rotated is None:
        return turn
    return Turn(jnp.where(rotated, turn.sin, 0.0), jnp.where(rotated, turn.cos, 1.0))


class FeedForward(nn.Module):
    """Two matrices with an activation between them, or three with a gate."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        hidden = _linear(c, c.mlp_width, "up")(x)
        if not c.gated:
            hidden = again(PLAIN[c.activation])(hidden)
        else:
            hidden = again(GATED[c.activation])(_linear(c, c.mlp_width, "gate")(x), hidden)
        return _linear(c, c.width, "down", std=c.init_std / (2 * c.layers) ** 0.5, kernel_first=True)(hidden)


class Block(nn.Module):
    """One layer, in the (carry, output) form that `nn.scan` wants; the carry is the residual stream."""

    config: DecoderConfig
    dropout: float

    @nn.compact
    def __call__(self, x, kind: Kind, sight: Sight):
        c = self.config
        dropout = nn.Dropout(self.dropout, deterministic=self.dropout == 0.0)

        def normed(y, name, *places):
            return norm(c, name)(y) if c.norm_place in places else y

        def read_by(block, y, name, *arguments):
            return block(lay("inputs", normed(y, name, "pre", "sandwich")), *arguments)

        def added(block, name):
            out = dropout(normed(lay("residual", block), name, "output", "sandwich"))
            return out if c.residual_multiplier == 1 else c.residual_multiplier * out

        attended = read_by(Attention(c, name="attention"), x, "attention_norm", sight, kind)
        before, attended = sight.wanted(x), added(attended, "attention_post_norm")
        x = halfway(lay("residual", normed(before + attended, "attention_norm", "post")))
        read = before if c.parallel else x
        if c.experts:
            fed = read_by(Experts(c, name="experts"), read, "mlp_norm", sight.wanted(sight.segments > 0), kind.routes)
        else:
            fed = read_by(FeedForward(c, name="mlp"), read, "mlp_norm")
        return lay("residual", normed(x + added(fed, "mlp_post_norm"), "mlp_norm", "post")), None
