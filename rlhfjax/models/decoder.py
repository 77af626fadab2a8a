"""One decoder-only transformer; GPT-2 and Llama are configurations of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhfjax.models.layers import Block, DecoderConfig, _norm, attention_mask

FAMILIES = {
    "gpt2": {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": True, "tied": True},
    "llama": {"norm": "rms", "positions": "rope", "activation": "swiglu", "biases": False, "tied": True},
}

_REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def decoder_config(
    family: str,
    *,
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    context: int,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    head_dim: int | None = None,
    **style,
) -> DecoderConfig:
    """The configuration of a family; `style` overrides what the family chooses, None keeps it."""
    chosen = FAMILIES[family] | {key: value for key, value in style.items() if value is not None}
    if mlp_width is None:  # SwiGLU has three matrices, so 8/3 of the width keeps the parameter count of 4x
        mlp_width = 4 * width if chosen["activation"] == "gelu" else -(-8 * width // 3 // 8) * 8
    return DecoderConfig(
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        mlp_width=mlp_width,
        context=context,
        **chosen,
    )


def compute_dtype(wanted: str = "auto") -> str:
    """bfloat16 on accelerators; float32 on CPUs, where bfloat16 decoding is many times slower."""
    if wanted != "auto":
        return wanted
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


class Decoder(nn.Module):
    """Token ids to final hidden states, and hidden states to logits."""

    config: DecoderConfig
    dropout: float = 0.0

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        self.embed = nn.Embed(c.vocab_size, c.width, embedding_init=normal)
        if c.positions == "learned":
            self.positions = nn.Embed(c.context, c.width, embedding_init=normal)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_REMAT[c.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.layers,
        )(c, self.dropout)
        self.final_norm = _norm(c, "final_norm")
        if not c.tied:
            self.unembed = nn.Dense(c.vocab_size, use_bias=False, kernel_init=normal)

    def hidden(self, tokens, positions, segments, key_segments=None, cache=None, index=0):
        """[B, T] tokens to [B, T, width]; with a cache also the cache with these tokens in slots index … index+T-1."""
        c = self.config
        x = self.embed(tokens)
        if c.positions == "learned":
            x = x + self.positions(jnp.minimum(positions, c.context - 1))
        mask = attention_mask(segments, segments if key_segments is None else key_segments, index)
        x, cache = self.blocks(x.astype(c.compute_dtype), cache, positions, mask, index)
        return self.final_norm(x), cache

    def logits(self, hidden):
        """[..., width] to [..., vocabulary], float32."""
        hidden = hidden.astype(jnp.float32)
        return hidden @ self.embed.embedding.T if self.config.tied else self.unembed(hidden)

    def __call__(self, tokens, positions, segments):
        return self.logits(self.hidden(tokens, positions, segments)[0])
