"""The families as transformers has them: how their settings are read and written, and which tensors they have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.interop.rope import PLAIN, RopeKeys, read_rope, read_two_ropes, write_rope
from rlhfjax.interop.settings import Settings
from rlhfjax.interop.tensors import Weight, gpt_weights, llama_weights
from rlhfjax.models import DecoderConfig

MOST_LAYERS = 10_000  # what is listed by layer stays small whatever a file claims
_KINDS = {"sliding_attention": "L", "full_attention": "G"}  # of layers


@dataclass(frozen=True)
class Architecture:
    """One family. `read` returns fields of DecoderConfig, and `write` is its inverse."""

    stem: str  # of the class names: LlamaForCausalLM, LlamaForSequenceClassification
    model_type: str
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    weights: Callable[[DecoderConfig], tuple[Weight, ...]]
    causal: str = "ForCausalLM"
    classified: bool = True  # whether there is a class with a score in the place of the unembedding


def read_gpt(s: Settings) -> dict[str, Any]:
    """What GPT and GPT-2 share."""
    width, heads = s.size("n_embd"), s.size("n_head")
    return {
        "vocab_size": s.size("vocab_size"),
        "layers": s.size("n_layer", most=MOST_LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": divided(width, heads),
        "mlp_width": 4 * width,
        "context": s.size("n_positions"),
        "norm": "layer",
        "norm_eps": s.positive("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "activation": "gelu",
        "biases": True,
        "tied": s.take("tie_word_embeddings", bool, True),
        "init_std": s.positive("initializer_range", 0.02),
    }


def divided(width: int, heads: int) -> int:
    """The size of a head."""
    if width % heads:
        raise ConfigError(f"config.json: expected a width that is a multiple of {heads} heads, got {width}")
    return width // heads


def _read_gpt1(s: Settings) -> dict[str, Any]:
    s.expect("afn", ("gelu",), "gelu")  # GPT's own gelu is the tanh form
    return read_gpt(s) | {"norm_place": "post"}


def _read_gpt2(s: Settings) -> dict[str, Any]:
    s.expect("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    s.expect("scale_attn_weights", (True,), True)
    fields = read_gpt(s)
    return fields | {"mlp_width": s.size("n_inner", None) or fields["mlp_width"]}


def _write_gpt(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_layer": c.layers,
        "n_embd": c.width,
        "n_head": c.heads,
        "n_positions": c.context,
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tied,
    }


def _write_gpt2(c: DecoderConfig) -> dict[str, Any]:
    return _write_gpt(c) | {"n_inner": c.mlp_width, "activation_function": "gelu_new"}


def read_llama(
    s: Settings,
    rope: RopeKeys | dict[str, Any] = PLAIN,
    *,
    activation: str = "hidden_act",
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
) -> dict[str, Any]:
    """What all later families share; the arguments are their defaults over there, or rotary positions as read."""
    width, heads = s.size("hidden_size"), s.size("num_attention_heads")
    if activation == "hidden_act":
        s.expect("hidden_act", ("silu", "swish"), "silu")
    return {
        "vocab_size": s.size("vocab_size"),
        "layers": s.size("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": s.size("num_key_value_heads", None) or heads,
        "head_dim": s.size("head_dim", head_dim) or divided(width, heads),
        "mlp_width": s.size("intermediate_size"),
        "norm_eps": s.positive("rms_norm_eps", norm_eps),
        "tied": s.take("tie_word_embeddings", bool, tied),
        "init_std": s.positive("initializer_range", 0.02),
        **(read_rope(s, rope) if isinstance(rope, RopeKeys) else rope),
    }


def write_llama(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        **write_rope(c),
    }


def _read_mistral(s: Settings) -> dict[str, Any]:
    return read_llama(s) | {"window": s.size("sliding_window", 4096)}


def _write_mistral(c: DecoderConfig) -> dict[str, Any]:
    return write_llama(c) | {"sliding_window": c.window}


def read_windows(s: Settings, layers: int, window: int | None, usual: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers have the window: `layer_types`, or `usual` where an older file has none."""
    kinds = s.take("layer_types", list, None)
    if kinds is None:
        kinds = ["sliding_attention" if usual(layer) else "full_attention" for layer in range(layers)]
    if len(kinds) != layers or not all(isinstance(kind, str) and kind in _KINDS for kind in kinds):
        raise ConfigError(f"config.json: expected layer_types with {' or '.join(_KINDS)} for each of {layers} layers")
    pattern = "".join(_KINDS[kind] for kind in kinds)
    if "L" not in pattern or window is None:
        return {}
    return {"window": window, "window_pattern": shortest(pattern)}


def shortest(pattern: str) -> str:
    """What is repeated over the layers."""
    layers = len(pattern)
    return next(pattern[:n] for n in range(1, layers + 1) if (pattern[:n] * layers)[:layers] == pattern)


def write_windows(c: DecoderConfig) -> dict[str, Any]:
    """Window and `layer_types`."""
    kinds = {letter: kind for kind, letter in _KINDS.items()}
    return {"sliding_window": c.window, "layer_types": [kinds["L" if local else "G"] for local in c.local_layers]}


def read_qwen(s: Settings, head_dim: int | None = None) -> dict[str, Any]:
    """Windows only where they are switched on, from layer `max_window_layers` on."""
    fields = read_llama(s, head_dim=head_dim)
    window, first = s.size("sliding_window", 4096), s.take("max_window_layers", int, 28)
    window = window if s.take("use_sliding_window", bool, False) else None
    return fields | read_windows(s, fields["layers"], window, lambda layer: window is not None and layer >= first)


def write_qwen(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_qwen`."""
    first = c.local_layers.index(True) if any(c.local_layers) else c.layers
    return write_llama(c) | write_windows(c) | {"use_sliding_window": any(c.local_layers), "max_window_layers": first}


_GEMMA = {"activation": "geglu", "norm_offset": True, "scale_embeddings": True}


def _read_gemma(s: Settings) -> dict[str, Any]:
    s.expect("hidden_act", ("gelu_pytorch_tanh", "gelu", None), None)  # which means the same there
    s.expect("hidden_activation", ("gelu_pytorch_tanh", None), None)
    return read_llama(s, activation="", head_dim=256, tied=True) | _GEMMA


def _read_later_gemma(
    s: Settings, cap: float | None, logit_cap: float | None, rope: RopeKeys | dict[str, Any] = PLAIN
) -> dict[str, Any]:
    for key in ("hidden_activation", "hidden_act"):
        s.expect(key, ("gelu_pytorch_tanh", None), None)
    return (
        read_llama(s, rope, activation="", head_dim=256, tied=True)
        | _GEMMA
        | {
            "norm_place": "sandwich",
            "query_scalar": s.positive("query_pre_attn_scalar", 256),
            "attention_softcap": s.positive("attn_logit_softcapping", cap),
            "logit_softcap": s.positive("final_logit_softcapping", logit_cap),
        }
    )


def _read_gemma2(s: Settings) -> dict[str, Any]:
    fields = _read_later_gemma(s, 50.0, 30.0)
    return fields | read_windows(s, fields["layers"], s.size("sliding_window", 4096), lambda layer: layer % 2 == 0)


def _read_gemma3(s: Settings) -> dict[str, Any]:
    rope = read_two_ropes(s, 1e6, 1e4, "rope_local_base_freq")
    fields = _read_later_gemma(s, None, None, rope) | {"qk_norm": True}
    period = s.size("_sliding_window_pattern", s.size("sliding_window_pattern", 6))
    usual = lambda layer: (layer + 1) % period != 0  # noqa: E731
    return fields | read_windows(s, fields["layers"], s.size("sliding_window", 4096), usual)


def _write_gemma(c: DecoderConfig) -> dict[str, Any]:
    return write_llama(c) | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _write_later_gemma(c: DecoderConfig) -> dict[str, Any]:
    scalar, local = c.query_scalar or c.head_dim, c.rope_local_theta
    return (
        _write_gemma(c)
        | write_windows(c)
        | ({} if local is None else {"rope_local_base_freq": local})
        | {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.logit_softcap,
        }
    )


def _gpt1_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    return gpt_weights(c, "tokens_embed", "positions_embed", None)


def _gpt2_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    return gpt_weights(c, "wte", "wpe", "ln_f")


# By family; later ones and mixtures of experts are in files of their own.
ARCHITECTURES = {
    "gpt1": Architecture("OpenAIGPT", "openai-gpt", _read_gpt1, _write_gpt, _gpt1_weights, "LMHeadModel"),
    "gpt2": Architecture("GPT2", "gpt2", _read_gpt2, _write_gpt2, _gpt2_weights, "LMHeadModel"),
    "llama": Architecture("Llama", "llama", read_llama, write_llama, llama_weights),
    "mistral": Architecture("Mistral", "mistral", _read_mistral, _write_mistral, llama_weights),
    "qwen2": Architecture("Qwen2", "qwen2", lambda s: read_qwen(s) | {"qkv_biases": True}, write_qwen, llama_weights),
    "qwen3": Architecture(
        "Qwen3", "qwen3", lambda s: read_qwen(s, head_dim=128) | {"qk_norm": True}, write_qwen, llama_weights
    ),
    "gemma": Architecture("Gemma", "gemma", _read_gemma, _write_gemma, llama_weights),
    "gemma2": Architecture("Gemma2", "gemma2", _read_gemma2, _write_later_gemma, llama_weights),
    "gemma3": Architecture("Gemma3", "gemma3_text", _read_gemma3, _write_later_gemma, llama_weights),
}
