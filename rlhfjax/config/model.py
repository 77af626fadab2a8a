"""The model that is trained: its shape, or the checkpoint that it comes from, and its adapters."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhfjax.config.sections import Count, NonNegative, Positive, Section


class Experts(Section):
    """Experts in the place of every feed-forward block, each `mlp_width` wide; None keeps the family's choice.

    With `capacity_factor` an expert takes at most so many times its even share of a row's tokens while a policy is
    trained on text; without, all of them. The two coefficients are of the routers' losses, in nats per token.
    """

    count: Count | None = None
    per_token: Count | None = None
    norm_topk: bool | None = None
    capacity_factor: Positive | None = None
    load_balancing_coef: NonNegative | None = None
    router_z_coef: NonNegative | None = None


class Attention(Section):
    """What a position sees and how; None keeps the family's choice.

    `window_pattern` says by layer, over and over, who sees only the last `window` tokens: L (local) or G (global).
    `implementation` is no property of the model: which program computes attention in training and scoring (auto: cudnn
    on GPUs, splash on TPUs, blocked elsewhere; what cudnn does not take, xla does).
    """

    window: Count | None = None
    window_pattern: Annotated[str, Field(pattern="^[LG]+$")] | None = None
    rope_local_theta: Positive | None = None
    qk_norm: bool | None = None
    qkv_biases: bool | None = None
    attention_softcap: Positive | None = None
    implementation: Literal["auto", "xla", "blocked", "cudnn", "splash"] = "auto"


class Embedding(Section):
    """The two ends of the decoder; None keeps the family's choice.

    `mtp_heads` heads predict tokens 2, 3 … ahead; `mtp_coef` is the weight of their loss in pretraining and SFT.
    """

    scale_embeddings: bool | None = None
    logit_softcap: Positive | None = None
    mtp_heads: Annotated[int, Field(ge=0)] = 0
    mtp_coef: NonNegative = 0.3


class Architecture(Section):
    """What differs from the family's own choice; None keeps that choice."""

    norm: Literal["layer", "rms"] | None = None
    positions: Literal["learned", "rope"] | None = None
    activation: Literal["gelu", "gelu_exact", "swiglu", "geglu"] | None = None
    biases: bool | None = None
    tied: bool | None = None
    head_dim: Count | None = None
    norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    init_std: Positive | None = None
    attention: Attention = Attention()
    embedding: Embedding = Embedding()
    experts: Experts = Experts()

    def style(self) -> dict[str, Any]:
        """Every choice but the experts, by the name that the decoder has for it."""
        own = self.model_dump(exclude={"attention", "embedding", "experts"})
        attention = self.attention.model_dump()
        attention["attention"] = attention.pop("implementation")
        return own | attention | self.embedding.model_dump()


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): every stage after pretraining trains them, and leaves the base as it is.

    They go beside every linear whose path holds a match of one of the regular expressions `targets`. Their product is
    scaled by alpha / rank.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Annotated[list[str], Field(min_length=1)] = ["attention/(query|value)"]

    @field_validator("targets")
    @classmethod
    def _compile(cls, targets: list[str]) -> list[str]:
        for pattern in targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return targets


Family = Literal[
    "gpt1",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "gpt_oss",
    "transformer_2017",
]


class Model(Section):
    """The decoder's shape, or `checkpoint`: a checkpoint directory to start from (its shape and tokenizer are used)."""

    checkpoint: str | None = None
    family: Family = "llama"
    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    kv_heads: Count | None = None
    mlp_width: Count | None = None
    context: Count = 512
    remat: Literal["none", "full", "halves", "dots", "attention", "offload"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    architecture: Architecture = Architecture()
    lora: Lora | None = None

    @property
    def attention(self) -> str:
        """The program that computes attention."""
        return self.architecture.attention.implementation

    @model_validator(mode="after")
    def _shape_or_checkpoint(self):
        given = sorted(self.model_fields_set - {"checkpoint", "dtype", "remat", "lora"})
        shape = self.architecture.model_dump(exclude={"attention": {"implementation"}})
        if shape == Architecture().model_dump(exclude={"attention": {"implementation"}}):
            given = [name for name in given if name != "architecture"]
        if self.checkpoint and given:
            raise ValueError(f"a model from a checkpoint has its shape already; remove {', '.join(given)}")
        if self.family == "transformer_2017" and (self.kv_heads or self.architecture != Architecture()):
            raise ValueError("transformer_2017 is the published shape; remove kv_heads and architecture")
        if self.architecture.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} (or give head_dim)")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self
