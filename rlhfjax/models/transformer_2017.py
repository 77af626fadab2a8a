"""Layers of the encoder–decoder Transformer as it was published (Vaswani et al. 2017): norms after the residual sum."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models.attention import attention_mask
from rlhfjax.models.layers import Linear
from rlhfjax.models.remat import POLICIES, halfway, keep

FAMILY = "transformer_2017"


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Shape of an encoder and a decoder of `layers` layers each. Sizes are counts; heads share `width` evenly.

    `context` holds a prompt and its response together; positions have no parameters. `start_id` is the token before
    the first of every response.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    context: int
    start_id: int
    norm_eps: float = 1e-5
    remat: str = "none"  # none | full | halves | dots | attention | offload
    lora_alpha: float = 16.0
    dtype: str = "float32"  # of the computation; parameters, logits and softmax are float32
    family: str = FAMILY

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def sinusoids(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """PE(p, 2i) = sin(p / 10000^(2i/D)) and PE(p, 2i+1) = cos of the same angle (Vaswani et al. 2017, section 3.5)."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return pairs.reshape(*positions.shape, -1)[..., :width]


def same_segment(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Every query sees all keys of its own segment."""
    return queries[:, :, None] == keys[:, None, :]


def _linear(config: EncoderDecoderConfig, features, axis: int | tuple[int, ...] = -1, name: str | None = None):
    return Linear(
        features,
        lora_alpha=config.lora_alpha,
        axis=axis,
        dtype=config.compute_dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        name=name,
    )


class MultiHeadAttention(nn.Module):
    """softmax(QKᵀ/√d_k) V by heads (eq. 1). Keys and values are made apart, so that a cache can stand between."""

    config: EncoderDecoderConfig

    def setup(self):
        c = self.config
        self.query = _linear(c, (c.heads, c.head_dim))
        self.key = _linear(c, (c.heads, c.head_dim))
        self.value = _linear(c, (c.heads, c.head_dim))
        self.out = _linear(c, c.width, axis=(-2, -1))

    def keys_values(self, x):
        return self.key(x), self.value(x)

    def __call__(self, x, keys, values, mask):
        query, keys, values = keep(self.query(x), keys, values)
        return self.out(
            keep(jax.nn.dot_product_attention(query, keys, values, mask=mask[:, None], implementation="xla"))
        )


class FeedForward(nn.Module):
    """max(0, x W₁ + b₁) W₂ + b₂ (eq. 2)."""

    config: EncoderDecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return _linear(c, c.width, name="down")(nn.relu(_linear(c, c.mlp_width, name="up")(x)))


def _add_and_norm(config: EncoderDecoderConfig, dropout: float, name: str, x, sublayer):
    """LayerNorm(x + Dropout(Sublayer(x))) (section 5.4), statistics in float32."""
    x = x + nn.Dropout(dropout, deterministic=dropout == 0.0)(sublayer)
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=config.compute_dtype, name=name)(x)


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, in the (carry, output) form that `nn.scan` wants."""

    config: EncoderDecoderConfig
    dropout: float

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        attention = MultiHeadAttention(c, name="attention")
        x = _add_and_norm(c, self.dropout, "attention_norm", x, attention(x, *attention.keys_values(x), mask))
        x = halfway(x)
        return _add_and_norm(c, self.dropout, "mlp_norm", x, FeedForward(c, name="mlp")(x)), None


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward.

    A cache holds this layer's keys and values, and those of the encoder's output once they are known: with `memory`
    they are computed, without it they are read.
    """

    config: EncoderDecoderConfig
    dropout: float

    @nn.compact
    def __call__(self, x, cache: Any, memory, mask, memory_mask, index):
        c = self.config
        attention = MultiHeadAttention(c, name="attention")
        cross_attention = MultiHeadAttention(c, name="cross_attention")
        crossed_keys, crossed_values = cache[2:] if memory is None else cross_attention.keys_values(memory)
        keys, values = attention.keys_values(x)
        if cache is not None:
            rows = jnp.arange(len(index), dtype=jnp.int32)
            keys, values = (
                kept.at[rows, index].set(new[:, 0], mode="drop", unique_indices=True)
                for kept, new in zip(cache, (keys, values), strict=False)
            )
        x = halfway(_add_and_norm(c, self.dropout, "attention_norm", x, attention(x, keys, values, mask)))
        crossed = cross_attention(x, crossed_keys, crossed_values, memory_mask)
        x = halfway(_add_and_norm(c, self.dropout, "cross_attention_norm", x, crossed))
        x = _add_and_norm(c, self.dropout, "mlp_norm", x, FeedForward(c, name="mlp")(x))
        return x, None if cache is None else (keys, values, crossed_keys, crossed_values)


class Stack(nn.Module):
    """`layers` blocks of one kind, their parameters stacked on the first axis."""

    config: EncoderDecoderConfig
    dropout: float
    block: type[nn.Module]
    axes: tuple

    @nn.compact
    def __call__(self, x, *args):
        c, block = self.config, self.block
        if c.remat != "none":
            block = nn.remat(block, policy=POLICIES[c.remat], prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=self.axes,  # pyright: ignore[reportArgumentType]
            length=c.layers,
        )
        return blocks(c, self.dropout, name="blocks")(x, *args)


class Transformer(nn.Module):
    """Prompts to the encoder's output, responses to the decoder's; one embedding for prompts, responses and logits."""

    config: EncoderDecoderConfig
    dropout: float = 0.0

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(c.width**-0.5))
        self.embed_dropout = nn.Dropout(self.dropout, deterministic=self.dropout == 0.0)
        self.encoder = Stack(c, self.dropout, EncoderBlock, (nn.broadcast,))
        self.decoder = Stack(c, self.dropout, DecoderBlock, (0, *[nn.broadcast] * 4))

    def _embedded(self, tokens, positions):
        c = self.config
        x = self.embed(tokens) * c.width**0.5 + sinusoids(positions, c.width)  # section 3.4
        return self.embed_dropout(x).astype(c.compute_dtype)

    def encode(self, tokens, positions, segments):
        """[B, P] tokens to [B, P, width]; tokens see all tokens of their segment."""
        return self.encoder(self._embedded(tokens, positions), same_segment(segments, segments))[0]

    def decode(self, tokens, positions, segments, memory, memory_segments, cache=None):
        """[B, T] tokens to [B, T, width]; with a cache one token per row, and the cache with it at its own position."""
        if cache is None:
            mask = attention_mask(segments, segments, 0)
        else:
            mask = jnp.arange(cache[0].shape[2], dtype=jnp.int32)[None, None, :] <= positions[:, :, None]
        memory_mask = same_segment(segments, memory_segments)
        return self.decoder(self._embedded(tokens, positions), cache, memory, mask, memory_mask, positions[:, 0])

    def logits(self, hidden):
        """[..., width] to [..., vocabulary], float32."""
        return hidden.astype(jnp.float32) @ self.embed.embedding.T

    def __call__(self, tokens, positions, segments):
        memory = self.encode(tokens, positions, segments)
        return self.logits(self.decode(tokens, positions, segments, memory, segments)[0])
