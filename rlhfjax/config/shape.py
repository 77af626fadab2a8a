"""The decoder's shape and its number of parameters, from the configuration alone (no jax, no arrays)."""

import re
from dataclasses import dataclass

from rlhfjax.config.model import Lora, Model

# What a family chooses where `model.architecture` says nothing (Radford et al. 2019; Touvron et al. 2023).
_LLAMA = {"norm": "rms", "positions": "rope", "activation": "swiglu", "biases": False, "tied": True}
_GPT = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": True, "tied": True}
_GEMMA = _LLAMA | {"activation": "geglu"}
_OLMO = _LLAMA | {"tied": False, "norm_place": "output", "qk_norm": True, "qk_norm_whole": True}
_GATED = {"swiglu", "geglu", "clamped_swiglu"}
_CHOICES = {"norm", "positions", "activation", "biases", "qkv_biases", "qk_norm", "tied", "mtp_heads"}
_STYLES = {
    "gpt1": _GPT | {"norm_place": "post"},
    "gpt2": _GPT,
    "transformer_2017": {
        "norm": "layer",
        "positions": "sinusoidal",
        "activation": "relu",
        "biases": True,
        "tied": True,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA | {"tied": False},
    "qwen2": _LLAMA | {"qkv_biases": True},
    "qwen3": _LLAMA | {"qk_norm": True},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"norm_place": "sandwich"},
    "gemma3": _GEMMA | {"norm_place": "sandwich", "qk_norm": True},
    "gpt_neox": _GPT | {"tied": False, "positions": "rope", "rope_fraction": 0.25, "activation": "gelu_exact"},
    "phi3": _LLAMA | {"tied": False},
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "mixtral": _LLAMA | {"tied": False, "experts": 8, "experts_per_token": 2},
    "gpt_oss": _LLAMA
    | {
        "tied": False,
        "biases": True,
        "activation": "clamped_swiglu",
        "attention_sinks": True,
        "experts": 32,
        "experts_per_token": 4,
    },
    "qwen3_moe": _LLAMA | {"tied": False, "qk_norm": True, "experts": 128, "experts_per_token": 8},
}


@dataclass(frozen=True)
class Shape:
    """A decoder with every size decided; sizes are counts."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    norm: str
    positions: str
    activation: str
    biases: bool
    tied: bool
    norm_place: str = "pre"
    rope_fraction: float = 1.0
    qkv_biases: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_sinks: bool = False
    experts: int = 0
    experts_per_token: int = 2
    mtp_heads: int = 0

    @property
    def encoder(self) -> bool:
        """Whether a second stack of layers reads the prompt (Vaswani et al. 2017)."""
        return self.positions == "sinusoidal"


def model_shape(model: Model) -> Shape:
    """The shape that `model` describes; with a gate the default width is 8/3 of the model's, as costly as 4 without."""
    given = model.architecture.style().items()
    style = _STYLES[model.family] | {name: choice for name, choice in given if name in _CHOICES and choice is not None}
    experts = model.architecture.experts
    if count := experts.count or style.get("experts"):
        style |= {"experts": count, "experts_per_token": experts.per_token or style.get("experts_per_token", 2)}
    default = 4 * model.width if style["activation"] not in _GATED else -(-8 * model.width // 3 // 8) * 8
    return Shape(
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.architecture.head_dim or model.width // model.heads,
        mlp_width=model.mlp_width or default,
        context=model.context,
        **style,
    )


def linears(shape: Shape) -> dict[str, int]:
    """Paths of the linears that adapters can go beside, and the sum of each one's input and output size."""
    queries, keys = shape.width + shape.heads * shape.head_dim, shape.width + shape.kv_heads * shape.head_dim
    attention = {"query": queries, "key": keys, "value": keys, "out": queries}
    inner = ("up", "gate", "down") if shape.activation in _GATED else ("up", "down")
    found = {f"blocks/attention/{name}": size for name, size in attention.items()}
    if not shape.experts:
        found |= {f"blocks/mlp/{name}": shape.width + shape.mlp_width for name in inner}
    if not shape.encoder:
        return found
    crossed = {f"blocks/cross_attention/{name}": size for name, size in attention.items()}
    stacks = {"encoder": found, "decoder": found | crossed}
    return {f"{stack}/{name}": size for stack, names in stacks.items() for name, size in names.items()}


def adapter_count(shape: Shape, lora: Lora) -> int:
    """Parameters of a policy's adapters: rank x (inputs + outputs) for each targeted linear of each layer."""
    sizes = [size for name, size in linears(shape).items() if any(re.search(t, name) for t in lora.targets)]
    return shape.layers * lora.rank * sum(sizes)


def active_count(shape: Shape, vocab_size: int) -> int:
    """Parameters that one token meets: of the experts, only those it is sent to."""
    idle = shape.layers * max(shape.experts - shape.experts_per_token, 0) * _mlp_count(shape)
    return parameter_count(shape, vocab_size) - idle


def _mlp_count(shape: Shape) -> int:
    """Parameters of a feed-forward block, or of one expert."""
    inner = 2 if shape.activation in _GATED else 1
    biases = shape.biases * (inner * shape.mlp_width + shape.width)
    return (inner + 1) * shape.width * shape.mlp_width + biases


def parameter_count(shape: Shape, vocab_size: int) -> int:
    """Parameters of the policy: embeddings, `layers` blocks, a final norm, an output matrix unless tied, heads."""
    bias = int(shape.biases)
    norm = shape.width * (2 if shape.norm == "layer" else 1)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.width * (2 * queries + 2 * keys) + bias * shape.width
    attention += (queries + 2 * keys) * (shape.biases or shape.qkv_biases)
    if shape.qk_norm:
        normed = queries + keys if shape.qk_norm_whole else 2 * shape.head_dim
        attention += normed * (2 if shape.norm == "layer" else 1)
    attention += shape.heads * shape.attention_sinks
    mlp = _mlp_count(shape)
    if shape.experts:
        mlp = shape.experts * (mlp + shape.width + shape.biases)  # and what the router knows each by
    positions = shape.context * shape.width if shape.positions == "learned" else 0
    embeddings = vocab_size * shape.width * (1 if shape.tied else 2) + positions
    if shape.encoder:  # two norms in a layer that reads, three in one that writes, none at the end
        return embeddings + shape.layers * (3 * attention + 2 * mlp + 5 * norm)
    embeddings += shape.mtp_heads * 2 * shape.width**2
    around = 4 if shape.norm_place == "sandwich" else 2
    return embeddings + shape.layers * (attention + mlp + around * norm) + norm * (shape.norm_place != "post")
