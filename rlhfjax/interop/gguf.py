"""A model in GGUF, as llama.cpp writes it: its configuration, tokenizer and weights.

The metadata is put in the words of config.json and read by the same lists as a Hugging Face directory; tensors get the
names that transformers gives them. Four things are undone. The rows of Llama's query and key projections (and of those
that follow it) are in the order of interleaved rotary pairs: row 2i + j of a head is row i + j·D/2 of ours. Gemma's
norms have 1 added. GPT-2's matrices are transposed. GPT-NeoX has all queries before all keys, and not head by head.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop.families import Weight, config_of, weights
from rlhfjax.interop.gguf_files import GgufFile, open_file
from rlhfjax.interop.gguf_settings import CLASSES, described
from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata
from rlhfjax.interop.pretrained import Pretrained, names_of
from rlhfjax.interop.safetensors_files import finite
from rlhfjax.interop.tensors import box
from rlhfjax.leaves import Region
from rlhfjax.models import DecoderConfig

# Gemma 2 and 3, and OLMo 2, have norms behind their blocks.
_LATER_GEMMA = ("gemma2", "gemma3")
_INTERLEAVED = {"llama", "granite", "smollm3"}
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
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_BEHIND = {  # where blocks have norms behind them
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_IN_LAYER = re.compile(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)\.(.+)")


def open_gguf(path: Path) -> Pretrained:
    """The model of a file: its configuration, tokenizer and a reader of its weights, all of them checked.

    Raises ConfigError for what is not supported (architecture, setting, quantisation), IntegrityError for a file that
    does not hold what it says.
    """
    file = open_file(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in CLASSES:
        raise ConfigError(
            f"{path}: expected a model of {', '.join(CLASSES)}, got architecture {str(architecture)[:80]!r}"
        )
    try:
        config = config_of(described(file, architecture))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    wanted = weights(config)
    _check(file, wanted, config, architecture)
    tokenizer, note = tokenizer_of_metadata(file.metadata)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise IntegrityError(f"{path}: expected at most {config.vocab_size} tokens, got {tokenizer.vocab_size}")

    def read(weight: Weight, name: str, region: Region) -> np.ndarray:
        block, see = box(weight, region)
        made = _as_transformers(file, name, block, architecture, config)
        if not finite(made):
            raise IntegrityError(
                f"{path}: expected finite numbers in tensor {name!r}, got infinite ones or none (NaN); fetch it again"
            )
        return see(made)

    return Pretrained(config, "policy", tokenizer, wanted, read, notes=(note,) if note else ())


def _check(file: GgufFile, wanted: tuple[Weight, ...], config: DecoderConfig, architecture: str) -> None:
    """Every tensor is there in its shape, and no other."""
    names = set()
    for weight in wanted:
        shape = weight.shape[::-1] if transposed(weight.name, architecture) else weight.shape
        for _, theirs in names_of(weight, config):
            name = name_in_file(theirs, architecture)
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


def name_in_file(theirs: str, architecture: str) -> str:
    """The name in the file of a tensor of transformers."""
    stem, ending = theirs.rpartition(".")[::2]
    names: Mapping[str, str] = _NAMES | _BEHIND if architecture in (*_LATER_GEMMA, "olmo2") else _NAMES
    inside = _IN_LAYER.fullmatch(stem)
    return f"blk.{inside[1]}.{names[inside[2]]}.{ending}" if inside else f"{names[stem]}.{ending}"


def transposed(theirs: str, architecture: str) -> bool:
    return architecture == "gpt2" and theirs.endswith(
        ("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight")
    )


def as_in_file(tensor: np.ndarray, theirs: str, architecture: str, config: DecoderConfig) -> np.ndarray:
    """A float32 tensor of transformers as llama.cpp has it: what reading undoes."""
    if transposed(theirs, architecture):
        return tensor.T
    if architecture in _INTERLEAVED and re.search(r"self_attn\.[qk]_proj\.", theirs):
        heads = config.heads if ".q_proj." in theirs else config.kv_heads
        halves = tensor.reshape(heads, 2, config.head_dim // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture == "gptneox" and "query_key_value" in theirs:
        kinds = tensor.reshape(config.heads, 3, config.head_dim, *tensor.shape[1:])
        return kinds.swapaxes(0, 1).reshape(tensor.shape)
    if architecture.startswith("gemma") and theirs.endswith("norm.weight"):
        return tensor + np.float32(1)
    return tensor


def _as_transformers(
    file: GgufFile, theirs: str, block: Region, architecture: str, config: DecoderConfig
) -> np.ndarray:
    """A block of a tensor of transformers."""
    name, order = name_in_file(theirs, architecture), _order(theirs, architecture, config)
    if len(block) == 1:
        row = file.read(name, slice(0, 1), slice(0, *file.tensors[name].shape))[0]
        made = (row if order is None else row[order])[block]
        return made - np.float32(1) if architecture.startswith("gemma") and theirs.endswith("norm.weight") else made
    if transposed(theirs, architecture):
        return file.read(name, block[1], block[0]).T
    return file.read(name, block[0] if order is None else order[block[0]], block[1])


def _order(theirs: str, architecture: str, config: DecoderConfig) -> np.ndarray | None:
    """Which row of the file each row of transformers' is, unless they are in one order."""
    if architecture in _INTERLEAVED and re.search(r"self_attn\.[qk]_proj\.", theirs):
        heads = config.heads if ".q_proj." in theirs else config.kv_heads
        pairs = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(-1)
    if architecture == "gptneox" and "query_key_value" in theirs:
        kinds = np.arange(3 * config.heads * config.head_dim).reshape(3, config.heads, config.head_dim)
        return kinds.swapaxes(0, 1).reshape(-1)
    return None
