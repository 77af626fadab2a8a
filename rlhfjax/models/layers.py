"""Layers of the decoder: norms, rotary positions, attention with an explicit cache, feed-forward blocks."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.attention import attend
from rlhfjax.models.experts import Experts
from rlhfjax.models.products import dot_general, settled
from rlhfjax.models.quantized import int8_dot
from rlhfjax.models.remat import again, keep


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and style of a decoder; every field is a number, a word or None, so that JSON holds it.

    Sizes are counts; `mlp_width` is the width inside the feed-forward block, or inside one expert.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int

    # Norms. `pre` has one before each block, `post` one after each sum and none at the end, `sandwich` one on each side
    # of each block. With `norm_offset` the scale is 1 + w.
    norm: str = "rms"  # layer | rms
    norm_place: str = "pre"  # pre | post | sandwich
    norm_offset: bool = False
    norm_eps: float = 1e-5

    # Positions. Frequencies are stretched by `rope_scaling`; layers with a window may have a theta of their own.
    positions: str = "rope"  # learned | rope
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_scaling: str = "none"  # none | linear | llama3
    rope_factor: float = 1.0
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_context: int = 8192

    # Attention. Layers that are L in `window_pattern` (repeated over the layers) see the last `window` tokens, their
    # own among them; layers that are G see all. Scores are divided by the root of `query_scalar` (None: head_dim).
    window: int | None = None
    window_pattern: str = "L"
    qk_norm: bool = False
    qkv_biases: bool = False
    query_scalar: float | None = None
    attention_softcap: float | None = None

    activation: str = "swiglu"  # gelu | swiglu | geglu
    biases: bool = False  # of every linear layer but the unembedding

    # Mixture of experts in the place of the feed-forward block; 0 experts: none. No capacity factor: none dropped.
    experts: int = 0
    experts_per_token: int = 2
    norm_topk: bool = True
    capacity_factor: float | None = None
    load_balancing_coef: float = 0.0
    router_z_coef: float = 0.0

    # Both ends of the decoder.
    tied: bool = True
    scale_embeddings: bool = False  # by sqrt(width)
    logit_softcap: float | None = None

    # Heads that predict tokens 2 … mtp_heads + 1 ahead, and the weight of their loss (DeepSeek-AI 2024, section 2.2).
    mtp_heads: int = 0
    mtp_coef: float = 0.3

    family: str = "llama"
    init_std: float = 0.02
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / rank
    remat: str = "none"  # none | full | dots | attention | offload
    attention: str = "auto"  # auto | xla | blocked | cudnn | splash: what computes it, `rlhfjax.models.attention`
    dtype: str = "float32"  # of the computation; parameters, logits and softmax are float32

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers have the window."""
        pattern = self.window_pattern if self.window else "G"
        return tuple(pattern[layer % len(pattern)] == "L" for layer in range(self.layers))


class Turn(NamedTuple):
    """Sines and cosines of the angles by which RoPE turns each pair of a token's coordinates."""

    sin: Float[Array, "B T 1 D/2"]
    cos: Float[Array, "B T 1 D/2"]


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


def rope_frequencies(config: DecoderConfig, local: bool = False) -> Float[Array, "D/2"]:
    """Radians a position: theta^(-2i/D), stretched as `rope_scaling` says; layers with a theta of their own are not.

    `linear` divides all by the factor. `llama3` divides those whose wavelength is over original_context / low_freq,
    keeps those under original_context / high_freq, and blends in between (Grattafiori et al. 2024, section 3.4.1).
    """
    half, own = config.head_dim // 2, config.rope_local_theta if local else None
    frequency = (own or config.rope_theta) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if own is not None or config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    turns = config.rope_original_context * frequency / (2 * jnp.pi)  # in the original context
    keep = (turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / config.rope_factor


def turns(config: DecoderConfig, positions: Int[Array, "B T"]) -> dict[bool, Turn]:
    """The turns of tokens at these positions in each kind of layer, once for all layers; none without RoPE."""
    if config.positions != "rope":
        return {}

    def turn(local: bool) -> Turn:
        angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config, local)[None, None, None, :]
        return Turn(settled(jnp.sin(angle)), settled(jnp.cos(angle)))

    return {local: turn(local) for local in sorted(set(config.local_layers))}


def rotate(x: Float[Array, "B T H D"], turn: Turn) -> Float[Array, "B T H D"]:
    """Rotary position embedding, half-split (Su et al. 2021): pair (i, i + D/2) turns by position · frequency_i."""
    sin, cos = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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
):
    return Linear(
        features,
        axis=axis,
        use_bias=config.biases or bias,
        dtype=config.compute_dtype,
        kernel_init=nn.initializers.normal(std or config.init_std),
        dot_general=dot_general,
        lora_alpha=config.lora_alpha,
        name=name,
    )


class Attention(nn.Module):
    """Multi-head or grouped-query attention within segments.

    `local` says whether this layer has the window: a bool, or a traced one where layers of a scan differ.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, sight: Sight, local):
        c = self.config
        query = _linear(c, (c.heads, c.head_dim), "query", bias=c.qkv_biases)(x)
        key = _linear(c, (c.kv_heads, c.head_dim), "key", bias=c.qkv_biases)(x)
        value = _linear(c, (c.kv_heads, c.head_dim), "value", bias=c.qkv_biases)(x)
        if c.qk_norm:
            query, key = norm(c, "query_norm")(query), norm(c, "key_norm")(key)
        if c.positions == "rope":
            turn = _either(local, sight.turns)
            query, key = rotate(query, turn), rotate(key, turn)
        scale = None if c.query_scalar is None else c.query_scalar**-0.5
        how = {"softcap": c.attention_softcap, "implementation": c.attention, "prefixes": sight.prefixes}
        query, key, value = keep(query, key, value)
        out = sight.wanted(keep(attend(query, key, value, sight.segments, local, window=c.window, scale=scale, **how)))
        # GPT-2's residual scaling: outputs of both blocks start smaller by 1/sqrt(2 x layers).
        return _linear(c, c.width, "out", axis=(-2, -1), std=c.init_std / (2 * c.layers) ** 0.5)(out)


def _either(local, turns):
    """What a layer of that kind has; `local` is traced where layers of both kinds are in one scan."""
    if isinstance(local, bool):
        return turns[local]
    return jax.tree.map(partial(jnp.where, local), turns[True], turns[False])


class FeedForward(nn.Module):
    """GELU, or gated by SiLU or GELU (SwiGLU and GeGLU of Shazeer 2020); GELU is the tanh form."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        hidden = _linear(c, c.mlp_width, "up")(x)
        if c.activation == "gelu":
            hidden = again(nn.gelu)(hidden)
        else:
            gate = nn.silu if c.activation == "swiglu" else nn.gelu
            hidden = again(lambda opened, hidden: gate(opened) * hidden)(_linear(c, c.mlp_width, "gate")(x), hidden)
        return _linear(c, c.width, "down", std=c.init_std / (2 * c.layers) ** 0.5)(hidden)


class Block(nn.Module):
    """One layer, in the (carry, output) form that `nn.scan` wants; the carry is the residual stream.

    `local` is None where all layers are of one kind.
    """

    config: DecoderConfig
    dropout: float

    @nn.compact
    def __call__(self, x, local, sight: Sight):
        c = self.config
        dropout = nn.Dropout(self.dropout, deterministic=self.dropout == 0.0)
        before = (lambda y, name: y) if c.norm_place == "post" else (lambda y, name: norm(c, name)(y))
        after = (lambda y, name: norm(c, name)(y)) if c.norm_place == "sandwich" else (lambda y, name: y)
        total = (lambda y, name: norm(c, name)(y)) if c.norm_place == "post" else (lambda y, name: y)

        local = all(c.local_layers) if local is None else local
        attended = Attention(c, name="attention")(before(x, "attention_norm"), sight, local)
        x = total(sight.wanted(x) + dropout(after(attended, "attention_post_norm")), "attention_norm")
        read = before(x, "mlp_norm")
        real = sight.wanted(sight.segments > 0)
        fed = Experts(c, name="experts")(read, real) if c.experts else FeedForward(c, name="mlp")(read)
        return total(x + dropout(after(fed, "mlp_post_norm")), "mlp_norm"), None
