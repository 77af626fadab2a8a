"""Writes peft.npz: a small Llama with adapters made by PEFT, as PEFT itself saves them, and its logits.

Run where PyTorch, transformers and PEFT are installed: python tests/golden/make_peft.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
TARGETS = ["self_attn.q_proj", "self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj"]


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    base = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {f"base/{name}": tensor.numpy().copy() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6.0, target_modules=TARGETS, task_type="CAUSAL_LM"))
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
        logits = model(tokens).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapters = load_file(Path(folder) / "adapter_model.safetensors")
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
    described = json.loads(config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    np.savez_compressed(
        Path(__file__).with_name("peft.npz"),
        **weights,
        **{f"adapters/{name}": array for name, array in adapters.items()},
        settings=np.array(json.dumps(settings, default=sorted)),
        config=np.array(json.dumps(described)),
        tokens=tokens.numpy(),
        logits=logits,
    )


if __name__ == "__main__":
    main()
