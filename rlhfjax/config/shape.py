"""The decoder's shape and its number of parameters, from the configuration alone (no jax, no arrays)."""

from dataclasses import dataclass

from rlhfjax.config.schema import Model

# What a family chooses where `model.architecture` says nothing (Radford et al. 2019; Touvron et al. 2023).
_STYLES = {
    "gpt2": {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": True, "tied": True},
    "llama": {"norm": "rms", "positions": "rope", "activation": "swiglu", "biases": False, "tied": True},
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


def model_shape(model: Model) -> Shape:
    """The shape that `model` describes; SwiGLU's default width is 8/3 of the model's, as costly as GELU's 4."""
    given = model.architecture.model_dump(include=set(_STYLES["gpt2"]), exclude_none=True)
    style = _STYLES[model.family] | given
    default = 4 * model.width if style["activation"] == "gelu" else -(-8 * model.width // 3 // 8) * 8
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


def parameter_count(shape: Shape, vocab_size: int) -> int:
    """Parameters of the policy: embeddings, `layers` blocks, the final norm, and an output matrix unless tied."""
    bias = int(shape.biases)
    norm = shape.width * (2 if shape.norm == "layer" else 1)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.width * (2 * queries + 2 * keys) + bias * (queries + 2 * keys + shape.width)
    inner = 2 if shape.activation == "swiglu" else 1
    mlp = (inner + 1) * shape.width * shape.mlp_width + bias * (inner * shape.mlp_width + shape.width)
    positions = shape.context * shape.width if shape.positions == "learned" else 0
    embeddings = vocab_size * shape.width * (1 if shape.tied else 2) + positions
    return embeddings + shape.layers * (attention + mlp + 2 * norm) + norm
