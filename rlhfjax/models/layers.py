"""Layers of the decoder: norms, rotary positions, attention with an explicit cache, feed-forward blocks."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and style of a decoder. Sizes are counts; `mlp_width` is the width inside the feed-forward block."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    norm: str = "rms"  # layer | rms
    positions: str = "rope"  # learned | rope
    activation: str = "swiglu"  # gelu | swiglu
    biases: bool = False
    tied: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    init_std: float = 0.02
    family: str = "llama"
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / rank
    remat: str = "none"  # none | full | dots
    dtype: str = "float32"  # of the computation; parameters, logits and softmax are float32

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def rotate(x: Float[Array, "B T H D"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H D"]:
    """Rotary position embedding, half-split (Su et al. 2021): pair (i, i + D/2) turns by position / theta^(2i/D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _norm(config: DecoderConfig, name: str):
    # Normalisation statistics are float32 in Flax whatever the input's type.
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_eps, dtype=config.compute_dtype, name=name)
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.compute_dtype, name=name)


class Linear(nn.DenseGeneral):
    """x · kernel + bias, and where the parameters hold an adapter also (lora_alpha / r) (x · lora_a) · lora_b.

    `lora_a` is [*input axes, r], `lora_b` [r, *features] (Hu et al. 2022, eq. 3); without these leaves nothing is added.
    """

    lora_alpha: float = 16.0

    @nn.compact
    def __call__(self, inputs):
        out = super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return out
        down = self.get_variable("params", "lora_a").astype(out.dtype)
        up = self.get_variable("params", "lora_b").astype(out.dtype)
        inner = jnp.tensordot(inputs.astype(out.dtype), down, axes=down.ndim - 1)
        return out + (self.lora_alpha / down.shape[-1]) * jnp.tensordot(inner, up, axes=1)


def _dense(config: DecoderConfig, features, name: str, axis: int | tuple[int, ...] = -1, std: float | None = None):
    return Linear(
        features,
        axis=axis,
        use_bias=config.biases,
        dtype=config.compute_dtype,
        kernel_init=nn.initializers.normal(std or config.init_std),
        lora_alpha=config.lora_alpha,
        name=name,
    )


class Attention(nn.Module):
    """Multi-head or grouped-query attention; keys and values go to slot `index` of the cache when there is one."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, mask, cache, index):
        c = self.config
        query = _dense(c, (c.heads, c.head_dim), "query")(x)
        key = _dense(c, (c.kv_heads, c.head_dim), "key")(x)
        value = _dense(c, (c.kv_heads, c.head_dim), "value")(x)
        if c.positions == "rope":
            query, key = rotate(query, positions, c.rope_theta), rotate(key, positions, c.rope_theta)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key.astype(cache[0].dtype), index, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value.astype(cache[1].dtype), index, axis=1)
            cache = (key, value)
        out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="xla")
        # GPT-2's residual scaling: outputs of both blocks start smaller by 1/sqrt(2 x layers).
        return _dense(c, c.width, "out", axis=(-2, -1), std=c.init_std / (2 * c.layers) ** 0.5)(out), cache


class FeedForward(nn.Module):
    """GELU or SwiGLU (Shazeer 2020) feed-forward block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        hidden = _dense(c, c.mlp_width, "up")(x)
        hidden = nn.gelu(hidden) if c.activation == "gelu" else nn.silu(_dense(c, c.mlp_width, "gate")(x)) * hidden
        return _dense(c, c.width, "down", std=c.init_std / (2 * c.layers) ** 0.5)(hidden)


class Block(nn.Module):
    """One pre-norm layer, in the (carry, output) form that `nn.scan` wants; the carry is the residual stream."""

    config: DecoderConfig
    dropout: float

    @nn.compact
    def __call__(self, x, cache, positions, mask, index):
        dropout = nn.Dropout(self.dropout, deterministic=self.dropout == 0.0)
        attended, cache = Attention(self.config, name="attention")(
            _norm(self.config, "attention_norm")(x), positions, mask, cache, index
        )
        x = x + dropout(attended)
        x = x + dropout(FeedForward(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x)))
        return x, cache


def attention_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], index: Int[Array, ""] | int
) -> Bool[Array, "B T S"]:
    """Queries at slots index … index+T-1 see earlier slots of their own segment.

    Padding is a segment of its own (0), so no row of the softmax is empty, and what it holds reaches no real token.
    """
    slots = index + jnp.arange(query_segments.shape[1], dtype=jnp.int32)
    causal = slots[:, None] >= jnp.arange(key_segments.shape[1], dtype=jnp.int32)[None, :]
    return causal[None] & (query_segments[:, :, None] == key_segments[:, None, :])
