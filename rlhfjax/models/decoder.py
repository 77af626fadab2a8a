"""One decoder-only transformer; GPT, Llama, Qwen, Gemma, OLMo, Phi, Granite and others are configurations of it."""

from collections.abc import Callable
from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhfjax import layout
from rlhfjax.layout import lay
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.layers import Block, Linear, Sight, kinds, norm
from rlhfjax.models.quantized import int8_dot
from rlhfjax.models.remat import POLICIES
from rlhfjax.models.rotary import turns
from rlhfjax.target import current

_GPT = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": True, "tied": True}
_LLAMA = {"norm": "rms", "positions": "rope", "activation": "swiglu", "biases": False, "tied": True}
_QWEN = _LLAMA | {"rope_theta": 1e6, "norm_eps": 1e-6}
_GEMMA = _LLAMA | {"activation": "geglu", "norm_offset": True, "norm_eps": 1e-6, "scale_embeddings": True}
_GEMMA2 = _GEMMA | {"norm_place": "sandwich"}
_OLMO = _LLAMA | {"tied": False, "norm_place": "output", "norm_eps": 1e-6, "qk_norm": True, "qk_norm_whole": True}

# What each family chooses where nothing else is said; windows are those of the published models.
FAMILIES = {
    "gpt1": _GPT | {"norm_place": "post"},
    "gpt2": _GPT,
    "llama": _LLAMA,
    "mistral": _LLAMA | {"window": 4096, "tied": False},
    "qwen2": _QWEN | {"qkv_biases": True},
    "qwen3": _QWEN | {"qk_norm": True},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2 | {"window": 4096, "window_pattern": "LG", "attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3": _GEMMA2
    | {"window": 1024, "window_pattern": "LLLLLG", "qk_norm": True, "rope_theta": 1e6, "rope_local_theta": 1e4},
    "gpt_neox": _GPT
    | {
        "tied": False,
        "positions": "rope",
        "rope_fraction": 0.25,
        "activation": "gelu_exact",
        "parallel": True,
    },
    "phi3": _LLAMA | {"tied": False},
    "olmo2": _OLMO | {"rope_theta": 5e5},
    "olmo3": _OLMO | {"rope_theta": 5e5, "rope_local_theta": 5e5, "window": 4096, "window_pattern": "LLLG"},
    "granite": _LLAMA | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logit_divisor": 8.0},
    "smollm3": _LLAMA | {"rope_theta": 2e6, "rope_pattern": "RRRN", "norm_eps": 1e-6},
    "mixtral": _LLAMA
    | {"tied": False, "rope_theta": 1e6, "experts": 8, "experts_per_token": 2, "load_balancing_coef": 0.02},
    "gpt_oss": _LLAMA
    | {
        "tied": False,
        "biases": True,
        "activation": "clamped_swiglu",
        "attention_sinks": True,
        "window": 128,
        "window_pattern": "LG",
        "rope_theta": 1.5e5,
        "experts": 32,
        "experts_per_token": 4,
        "load_balancing_coef": 0.001,
    },
    "qwen3_moe": _QWEN
    | {"qk_norm": True, "tied": False, "experts": 128, "experts_per_token": 8, "load_balancing_coef": 0.001},
}


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
    if mlp_width is None:  # a gate makes it three matrices, so 8/3 of the width keeps the parameter count of 4x
        mlp_width = 4 * width if chosen["activation"] in ("gelu", "gelu_exact") else -(-8 * width // 3 // 8) * 8
    return DecoderConfig(
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        mlp_width=mlp_width,
        context=context,
        family=family,
        **chosen,
    )


def _unroll(config: DecoderConfig) -> int:
    """How many layers of the loop over layers are written out.

    On a CPU a short loop is: what the backward pass reads is then not copied into stacked arrays and out of them. What
    is to be computed twice stays in a loop, where XLA does not see that it is the same.
    """
    short = config.layers <= current().unrolled_layers and config.remat == "none"
    return config.layers if short else 1


def compute_dtype(wanted: str = "auto") -> str:
    """bfloat16 on accelerators; float32 on CPUs, where bfloat16 decoding is many times slower."""
    if wanted != "auto":
        return wanted
    return "float32" if current().platform == "cpu" else "bfloat16"


@lru_cache
def _traced_once(config: DecoderConfig) -> Callable:
    """A layer of this configuration as a jitted function: what has the same shape shares its trace and its gradient's.

    PPO reads four models of one shape, and tracing them is most of what a start from compiled programs takes.
    """
    return jax.jit(Block(config, 0.0, parent=None).apply)


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
            block = nn.remat(Block, policy=POLICIES[c.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, "routing": 0, "chosen": 0, "rerouted": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.layers,
            unroll=1 if self.is_initializing() else _unroll(c),
        )(c, self.dropout)
        if c.norm_place != "post":
            self.final_norm = norm(c, "final_norm")
        if not c.tied:
            self.unembed = Linear(c.vocab_size, use_bias=False, dtype=jnp.float32, kernel_init=normal)

    def hidden(self, tokens, positions, segments, read=None, prefixes=None, routes=None):
        """[B, T] tokens to [B, T, width], or to [B, N, width] at the columns `read`; `prefixes` as `attend` has it, and
        `routes` [B, T, L, K] of experts as `TokenBatch` has them.

        Sampling has a forward pass of its own (`rlhfjax.models.decoding`).
        """
        c, x = self.config, self.beginning(tokens, positions)
        kind = kinds(c)  # which is no parameter
        if routes is not None:
            kind = kind._replace(routes=jnp.moveaxis(routes, 2, 0))
        x, sight = lay("residual", x.astype(c.compute_dtype)), Sight(positions, segments, prefixes, turns(c, positions))
        if read is not None and _unroll(c) > 1 and not c.experts and not self.dropout:
            x = self._last_apart(x, kind, sight, read)
        else:
            x, _ = self.blocks(x, kind, sight)
            x = sight._replace(read=read).wanted(x)
        return self.ending(x)

    def beginning(self, tokens, positions):
        """What the first layer reads, in whatever type."""
        c, here = self.config, layout.current()
        x = self.embed(tokens) if here is None else here.embedded(self.embed.embedding, tokens, c.compute_dtype)
        if self.embed.has_variable("params", "embedding_scale"):
            x = x.astype(jnp.float32) * self.embed.get_variable("params", "embedding_scale")[tokens]
        if c.input_scale != 1:
            x = x * c.input_scale
        if c.positions == "learned":
            x = x + self.positions(jnp.minimum(positions, c.context - 1))
        return x

    def ending(self, x):
        """What the last layer gives, normed where the family does."""
        return x if self.config.norm_place == "post" else self.final_norm(x)

    def _last_apart(self, x, kind, sight, read):
        """The same layers one by one: the last computes nothing but keys and values where it is not read.

        Where layers are few that is a good part of the work, a fifth of a reward model of four.
        """
        block = _traced_once(self.config)
        stacked = self.variables["params"]["blocks"]
        count = self.config.layers
        # One split and not slices, whose gradients would be padded and added up.
        leaves, tree = jax.tree.flatten(stacked)
        layers = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
        for i in range(count):
            params = jax.tree.unflatten(tree, [leaf[i][0] for leaf in layers])
            sight = sight._replace(read=read if i == count - 1 else None)
            x, _ = block({"params": params}, x, jax.tree.map(lambda side, i=i: side[i], kind), sight)
        return x

    def logits(self, hidden):
        """[..., width] to [..., vocabulary], float32."""
        hidden, cap = hidden.astype(jnp.float32), self.config.logit_softcap
        if not self.config.tied:
            logits = self.unembed(hidden)
        elif self.embed.has_variable("params", "embedding_scale"):
            scale = self.embed.get_variable("params", "embedding_scale")
            logits = int8_dot(hidden, self.embed.embedding.T, scale.T, 1, jnp.float32)
        else:
            logits = hidden @ self.embed.embedding.T
        if self.config.logit_divisor != 1:
            logits = logits / self.config.logit_divisor
        return cap * jnp.tanh(logits / cap) if cap else logits

    def __call__(self, tokens, positions, segments):
        return self.logits(self.hidden(tokens, positions, segments))
