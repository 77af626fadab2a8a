"""The most memory that an import needs beyond what the imported modules take, as a share of the model in float32.

    JAX_PLATFORMS=cpu python -m benchmarks.import_memory [SRC]

SRC is what `rlhfjax import` takes, smollm2 if none is given; or `gguf` or `mxfp4`, a model that is made here, one layer
as wide as Mistral 7B's in Q8_0, or as gpt-oss 20B's, all numbers 0. Pages of mapped files count.
"""

import json
import math
import resource
import sys
import tempfile
from pathlib import Path

import gguf as package
import jax.numpy as jnp
import numpy as np

from rlhfjax.interop import gguf, huggingface, known  # noqa: F401  imported before, so that they are not counted
from rlhfjax.interop.families import config_of, weights
from rlhfjax.interop.pretrained import names_of
from rlhfjax.training.checkpoint import find_checkpoint, open_leaves
from rlhfjax.transfer import import_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 4096,
    "layer_types": ["full_attention"],
    "tie_word_embeddings": False,
}


def largest() -> int:
    """Bytes of the process at its largest (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def made(kind: str, folder: Path) -> Path:
    """A source whose numbers are holes of the file."""
    return _gguf(folder / "model.gguf") if kind == "gguf" else _mxfp4(folder / "gpt_oss")


def _gguf(path: Path) -> Path:
    config = config_of(LLAMA)
    writer = package.GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    names, size = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, config.layers), 0
    for weight in weights(config):
        for _, name in names_of(weight, config):
            there = names.get_name(name, try_suffixes=(".weight",))
            matrix = len(weight.shape) == 2
            kind = package.GGMLQuantizationType.Q8_0 if matrix else package.GGMLQuantizationType.F32
            count = math.prod(weight.shape) // 32 * 34 if matrix else 4 * math.prod(weight.shape)
            row = (*weight.shape[:-1], weight.shape[-1] // 32 * 34) if matrix else (4 * weight.shape[0],)
            writer.add_tensor_info(there, row, np.dtype(np.uint8), count, raw_dtype=kind)
            size += -(-count // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + size)
    return path


def _mxfp4(folder: Path) -> Path:
    folder.mkdir()
    described = GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(described))
    config, header, end = config_of(GPT_OSS), {}, 0
    shapes = {name: weight.shape for weight in weights(config) for _, name in names_of(weight, config)}
    for name, shape in shapes.items():
        stored = {name: ("BF16", shape, 2)}
        if name.endswith("_proj") and ".experts." in name:
            experts, inputs, outputs = shape
            scales = (experts, outputs, inputs // 32)
            stored = {f"{name}_blocks": ("U8", (*scales, 16), 1), f"{name}_scales": ("U8", scales, 1)}
        for entry, (dtype, sizes, width) in stored.items():
            start, end = end, end + math.prod(sizes) * width
            header[entry] = {"dtype": dtype, "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    jnp.zeros(1).block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        source = str(made(source, Path(folder))) if source in ("gguf", "mxfp4") else source
        before = largest()
        import_model(source, Path(folder) / "model", dtype="float32", force=False, report=print)
        needed = largest() - before
        step_dir = find_checkpoint(Path(folder) / "model")
        shapes = open_leaves(step_dir, "policy", Path(folder))[1].shapes
        size = 4 * sum(map(math.prod, shapes.values()))
        layer = 4 * max(math.prod(shape[1:] if "blocks/" in path else shape) for path, shape in shapes.items())
    print(f"{needed / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB: {needed / size:.2f} x")
    print(f"its largest parameter of a layer has {layer / 1e6:.0f} MB: {needed / layer:.2f} x")


if __name__ == "__main__":
    main()
