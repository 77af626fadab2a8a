"""The settings of a GGUF file's metadata, in the words of config.json, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop.gguf_files import GgufFile

# Architectures of llama.cpp that are known here.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gptneox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# Models whose queries are not scaled by their own width, which the file does not say: they have so many blocks.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
Get = Callable[..., Any]  # of a setting by its name, and what it is where it is not there


def described(file: GgufFile, architecture: str) -> dict[str, Any]:
    """config.json of the model that the metadata describes. Numbers in the file are float32: 1e-5 is 9.9999997e-06."""

    def get(name: str, otherwise: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{name}", otherwise)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise IntegrityError(f"{file.path}: expected a matrix token_embd.weight, got none; fetch the file again")
    found = {
        "architectures": [CLASSES[architecture]],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if architecture in ("gpt2", "gptneox"):
        found |= _gpt2(get) if architecture == "gpt2" else _gptneox(get)
    else:
        _refuse(file, architecture, get)
        found |= _llama(architecture, get)
        found |= _OWN.get(architecture, lambda get, found: {})(get, found)
    if architecture in _LARGEST_GEMMA:
        largest = get("block_count") == _LARGEST_GEMMA[architecture]
        own = found["hidden_size"] // found["num_attention_heads"] if largest else found["head_dim"]
        found |= {"query_pre_attn_scalar": own}
    return {key: value for key, value in found.items() if value is not None}


def _refuse(file: GgufFile, architecture: str, get: Get) -> None:
    """Raises ConfigError for what is read from safetensors alone."""
    scaled = {"rope_freqs.weight", "rope_factors_long.weight"} & file.tensors.keys()
    for there, what in (
        (get("expert_count"), "a dense model in GGUF, got experts"),
        (scaled or get("rope.scaling.type", "none") != "none", "rotary positions without scaling in GGUF, got scaled"),
        (architecture == "olmo2" and get("attention.sliding_window"), "OLMo 2 in GGUF, got OLMo 3, with its windows"),
    ):
        if there:
            raise ConfigError(f"{file.path}: expected {what}; import its safetensors instead")


def _gpt2(get: Get) -> dict[str, Any]:
    return {
        "n_embd": get("embedding_length"),
        "n_head": get("attention.head_count"),
        "n_layer": get("block_count"),
        "n_positions": get("context_length"),
        "n_inner": get("feed_forward_length"),
        "layer_norm_epsilon": get("attention.layer_norm_epsilon", 1e-5),
    }


def _gptneox(get: Get) -> dict[str, Any]:
    width, heads = get("embedding_length"), get("attention.head_count")
    return {
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "max_position_embeddings": get("context_length"),
        "layer_norm_eps": get("attention.layer_norm_epsilon", 1e-5),
        "rotary_emb_base": get("rope.freq_base", 1e4),
        "rotary_pct": _fraction(get, width, heads),
        "use_parallel_residual": get("use_parallel_residual", True),
    }


def _fraction(get: Get, width: Any, heads: Any) -> float | None:
    """How much of a head turns; None where the file lacks a number, which reading it then says."""
    turned, numbers = get("rope.dimension_count"), (width, heads)
    if not all(isinstance(x, int) and x > 0 for x in (turned, *numbers)) or width < heads:
        return None
    return turned / (width // heads)


def _llama(architecture: str, get: Get) -> dict[str, Any]:
    turned = None if architecture == "phi3" else get("rope.dimension_count")  # which is a part of a head there
    return {
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": get("attention.key_length", turned),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
    }


def _gemma(get: Get, found: dict[str, Any]) -> dict[str, Any]:
    window = {"sliding_window": get("attention.sliding_window")}
    return {"hidden_activation": "gelu_pytorch_tanh"} | window


def _gemma2(get: Get, found: dict[str, Any]) -> dict[str, Any]:
    return _gemma(get, found) | {
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }


def _granite(get: Get, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": get("attention.scale"),
        "embedding_multiplier": get("embedding_scale"),
        "residual_multiplier": get("residual_scale"),
        "logits_scaling": get("logit_scale"),
    }


def _phi3(get: Get, found: dict[str, Any]) -> dict[str, Any]:
    fraction = _fraction(get, found["hidden_size"], found["num_attention_heads"])
    return {"partial_rotary_factor": fraction, "sliding_window": get("attention.sliding_window") or None}


_OWN = {
    "gemma": lambda get, found: {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": _gemma2,
    "gemma3": _gemma,
    "granite": _granite,
    "phi3": _phi3,
    "smollm3": lambda get, found: {"no_rope_layer_interval": 4},  # as llama.cpp has it, whatever the file says
}


def metadata_of(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture of a config.json in GGUF, and its settings there, without the architecture before each.

    What cannot be said is left out, as reading it again shows. Raises ConfigError for an architecture that is unknown.
    """
    [name] = hf["architectures"]
    architectures = {name: architecture for architecture, name in CLASSES.items()} | _ALSO
    if name not in architectures:
        raise ConfigError(f"expected a model of {', '.join(architectures)} to write as GGUF, got {name}")
    architecture = architectures[name]
    if architecture == "olmo2" and hf["tie_word_embeddings"]:
        raise ConfigError(
            "expected OLMo 2 with an unembedding of its own, without which llama.cpp opens none, got tied"
        )
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // hf.get("num_attention_heads", 1)
    found = {ours: hf.get(theirs) for ours, theirs in (_WRITTEN | _WRITTEN_OF.get(architecture, {})).items()}
    if architecture in ("gptneox", "phi3"):
        found["rope.dimension_count"] = int(hf.get("rotary_pct", hf.get("partial_rotary_factor", 1.0)) * head_dim)
    if architecture not in ("gpt2", "gptneox"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return architecture, {key: value for key, value in found.items() if value is not None}


_ALSO = {"MistralForCausalLM": "llama"}  # one that has no window is a llama
_WRITTEN = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_WRITTEN_OF = {
    "gpt2": {
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "context_length": "n_positions",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "gptneox": {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "rope.freq_base": "rotary_emb_base",
        "use_parallel_residual": "use_parallel_residual",
    },
    "gemma2": {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"attention.sliding_window": "sliding_window"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "granite": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
}
