"""The configuration of a decoder: its shape and its style."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and style of a decoder; every field is a number, a word, None or some numbers, so that JSON holds it.

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

    # Norms. `pre` has one before each block, `output` one after each block, `sandwich` both, and `post` one after each
    # sum and none at the end. With `norm_offset` the scale is 1 + w.
    norm: str = "rms"  # layer | rms
    norm_place: str = "pre"  # pre | output | sandwich | post
    norm_offset: bool = False
    norm_eps: float = 1e-5

    # Both blocks of a layer read its input, and both are added to it (Wang and Komatsuzaki 2021). What a block adds is
    # multiplied by `residual_multiplier`.
    parallel: bool = False
    residual_multiplier: float = 1.0

    # Positions. The first `rope_fraction` of each head turns, in the layers that are R in `rope_pattern` (repeated over
    # the layers; N: none). Frequencies are stretched by `rope_scaling`, and sines and cosines are multiplied by
    # `rope_attention_factor`; layers with a window may have a theta of their own, without either.
    positions: str = "rope"  # learned | rope
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_fraction: float = 1.0
    rope_pattern: str = "R"
    rope_scaling: str = "none"  # none | linear | dynamic | llama3 | yarn | longrope: `rlhfjax.models.rotary`
    rope_factor: float = 1.0
    rope_attention_factor: float = 1.0
    rope_original_context: int = 8192
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True
    rope_short_factors: tuple[float, ...] = ()
    rope_long_factors: tuple[float, ...] = ()

    # Attention. Layers that are L in `window_pattern` (repeated over the layers) see the last `window` tokens, their
    # own among them; layers that are G see all. Scores are multiplied by `attention_multiplier` (None: divided by the
    # root of `query_scalar`; None: of head_dim). Norms of queries and keys are of each head, or `qk_norm_whole`.
    window: int | None = None
    window_pattern: str = "L"
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qkv_biases: bool = False
    query_scalar: float | None = None
    attention_multiplier: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False  # a score of each head that stands for no token

    activation: str = "swiglu"  # gelu | gelu_exact | swiglu | geglu | clamped_swiglu: `rlhfjax.models.activations`
    biases: bool = False  # of every linear layer but the unembedding, experts and routers among them

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
    embedding_multiplier: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None

    # Heads that predict tokens 2 … mtp_heads + 1 ahead, and the weight of their loss (DeepSeek-AI 2024, section 2.2).
    mtp_heads: int = 0
    mtp_coef: float = 0.3

    family: str = "llama"
    init_std: float = 0.02
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / rank
    remat: str = "none"  # none | full | halves | dots | attention | offload
    attention: str = "auto"  # auto | xla | blocked | cudnn | splash: what computes it, `rlhfjax.models.attention`
    dtype: str = "float32"  # of the computation; parameters, logits and softmax are float32

    def __post_init__(self):
        for name in ("rope_short_factors", "rope_long_factors"):  # lists, where JSON had them
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate."""
        return not self.activation.startswith("gelu")

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.attention_multiplier or (self.query_scalar or self.head_dim) ** -0.5

    @property
    def input_scale(self) -> float:
        """What embeddings of tokens are multiplied by."""
        return self.embedding_multiplier * (self.width**0.5 if self.scale_embeddings else 1.0)

    @property
    def rotated_size(self) -> int:
        """How many of the coordinates of a head turn with the position."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers have the window."""
        return self._by_layer(self.window_pattern if self.window else "G", "L")

    @property
    def rotated_layers(self) -> tuple[bool, ...]:
        """Which layers know of positions."""
        return self._by_layer(self.rope_pattern if self.positions == "rope" else "N", "R")

    def _by_layer(self, pattern: str, letter: str) -> tuple[bool, ...]:
        return tuple(pattern[layer % len(pattern)] == letter for layer in range(self.layers))
