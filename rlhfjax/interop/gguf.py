"""A model in GGUF, as llama.cpp writes it: its configuration, tokenizer and weights.

The metadata is put in the words of config.json and read by the same lists as a Hugging Face directory; tensors get the
names that transformers gives them. Three things are undone. The rows of Llama's query and key projections are in the
order of interleaved rotary pairs: row 2i + j of a head is row i + j·D/2 of ours. Gemma's norms have 1 added. GPT-2's
matrices are transposed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop.families import Weight, config_of, weights
from rlhfjax.interop.gguf_files import GgufFile, open_file
from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata
from rlhfjax.interop.pretrained import Pretrained, names_of
from rlhfjax.models import DecoderConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_NAMES = {  # transformers' name of a tensor, without layer and ending
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_IN_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")
# Models whose queries are not scaled by their own width, which the file does not say: blocks → why.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def open_gguf(path: Path) -> Pretrained:
    """The model of a file: its configuration, tokenizer and a reader of its weights, all of them checked.

    Raises ConfigError for what is not supported (architecture, setting, quantisation), IntegrityError for a file that
    does not hold what it says.
    """
    file = open_file(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: expected a model of {', '.join(_ARCHITECTURES)}, got architecture {str(architecture)[:80]!r}"
        )
    try:
        config = config_of(_described(file, architecture))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    wanted = weights(config)
    _check(file, wanted, config, architecture)
    tokenizer, note = tokenizer_of_metadata(file.metadata)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise IntegrityError(f"{path}: expected at most {config.vocab_size} tokens, got {tokenizer.vocab_size}")

    def read(weight: Weight, name: str) -> np.ndarray:
        return _as_transformers(file.read(_name(name, architecture)), name, architecture, config)

    return Pretrained(config, "policy", tokenizer, wanted, read, notes=(note,) if note else ())


def _described(file: GgufFile, architecture: str) -> dict[str, Any]:
    """config.json of the model that the metadata describes. Numbers in the file are float32: 1e-5 is 9.9999997e-06."""

    def get(name: str, otherwise: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{name}", otherwise)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise IntegrityError(f"{file.path}: expected a matrix token_embd.weight, got none; fetch the file again")
    common = {
        "architectures": [_ARCHITECTURES[architecture]],
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    width, heads = get("embedding_length"), get("attention.head_count")
    if architecture == "gpt2":
        return common | {
            "n_embd": width,
            "n_head": heads,
            "n_layer": get("block_count"),
            "n_positions": get("context_length"),
            "n_inner": get("feed_forward_length"),
            "layer_norm_epsilon": get("attention.layer_norm_epsilon", 1e-5),
        }
    if get("expert_count"):
        raise ConfigError(f"{file.path}: expected a dense model in GGUF, got experts; import its safetensors instead")
    if get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise ConfigError(
            f"{file.path}: expected rotary positions without scaling in GGUF, got scaled ones; import its safetensors"
        )
    described = common | {
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count")),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
    }
    if architecture in _LARGEST_GEMMA:
        largest = get("block_count") == _LARGEST_GEMMA[architecture]
        described |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": width // heads if largest else described["head_dim"],
            "sliding_window": get("attention.sliding_window"),
        }
    if architecture == "gemma2":
        described |= {
            "attn_logit_softcapping": get("attn_logit_softcapping"),
            "final_logit_softcapping": get("final_logit_softcapping"),
        }
    return {key: value for key, value in described.items() if value is not None}


def _check(file: GgufFile, wanted: tuple[Weight, ...], config: DecoderConfig, architecture: str) -> None:
    """Every tensor is there in its shape, and no other."""
    names = set()
    for weight in wanted:
        shape = weight.shape[::-1] if _transposed(weight.name, architecture) else weight.shape
        for _, theirs in names_of(weight, config):
            name = _name(theirs, architecture)
            names.add(name)
            if name not in file.tensors:
                raise IntegrityError(f"{file.path}: expected tensor {name!r}, which the file lacks; fetch it again")
            if file.tensors[name].shape != shape:
                raise IntegrityError(
                    f"{file.path}: expected tensor {name!r} of shape {list(shape)} as the metadata says, got "
                    f"{list(file.tensors[name].shape)}"
                )
    if odd := sorted(file.tensors.keys() - names):
        raise ConfigError(
            f"{file.path}: expected no tensor {odd[0][:80]!r} in {architecture} as it is known here, got one; "
            "import its safetensors instead"
        )


def _name(theirs: str, architecture: str) -> str:
    """The name in the file of a tensor of transformers."""
    stem, ending = theirs.rpartition(".")[::2]
    names: Mapping[str, str] = _NAMES | _GEMMA if architecture in _LARGEST_GEMMA else _NAMES
    inside = _IN_LAYER.fullmatch(stem)
    return f"blk.{inside[1]}.{names[inside[2]]}.{ending}" if inside else f"{names[stem]}.{ending}"


def _transposed(theirs: str, architecture: str) -> bool:
    return architecture == "gpt2" and theirs.endswith(
        ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    )


def _as_transformers(tensor: np.ndarray, theirs: str, architecture: str, config: DecoderConfig) -> np.ndarray:
    if _transposed(theirs, architecture):
        return tensor.T
    if architecture == "llama" and re.search(r"self_attn\.[qk]_proj\.", theirs):
        heads = config.heads if ".q_proj." in theirs else config.kv_heads
        pairs = tensor.reshape(heads, config.head_dim // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)
    if architecture in _LARGEST_GEMMA and theirs.endswith("norm.weight"):
        return tensor - np.float32(1)
    return tensor
