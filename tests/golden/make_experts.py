"""Writes experts.npz: tiny Mixtral and Qwen3-MoE models of transformers, their files, and what they compute.

Run in an environment with PyTorch and transformers 5: python tests/golden/make_experts.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(num_local_experts=4, intermediate_size=24, **SHAPE)),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(norm_topk_prob=True, **QWEN, **SHAPE)),
    "qwen3_moe_unnormalised": (Qwen3MoeForCausalLM, Qwen3MoeConfig(norm_topk_prob=False, **QWEN, **SHAPE)),
}
LENGTHS, WIDTH, NEW = (9, 4, 1), 9, 8


def computed(model) -> dict[str, np.ndarray]:
    """Logits on left- and right-padded batches, greedy continuations, and the losses of the routers."""
    tokens = torch.randint(1, SHAPE["vocab_size"], (len(LENGTHS), WIDTH))
    right = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    left = right.flip(1)
    out = {"tokens": tokens, "right": right, "left": left}
    for side, mask in (("right", right), ("left", left)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        run = model(tokens, attention_mask=mask.long(), position_ids=positions, output_router_logits=True)
        out[f"{side}_logits"] = run.logits
        if side == "right":
            routers, few = run.router_logits, (model.config.num_local_experts, model.config.num_experts_per_tok)
            out["balancing"] = load_balancing_loss_func(routers, *few, mask.long())
            each = [load_balancing_loss_func((layer,), *few, mask.long()) for layer in routers]
            out["balancing_by_layer"] = torch.stack(each)
            kept = [torch.logsumexp(layer[mask.reshape(-1)], -1) ** 2 for layer in routers]
            out["z_by_layer"] = torch.stack([layer.mean() for layer in kept])
    greedy = model.generate(tokens, attention_mask=left.long(), max_new_tokens=NEW, do_sample=False)
    return {name: value.numpy() for name, value in (out | {"greedy": greedy[:, WIDTH:]}).items()}


@torch.no_grad()
def main() -> None:
    found = {}
    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found[f"{name}/config"] = np.frombuffer(Path(folder, "config.json").read_bytes(), np.uint8)
            assert json.loads(found[f"{name}/config"].tobytes())
            if name != "qwen3_moe_unnormalised":  # its weights are those of the one before
                tensors = load_file(Path(folder, "model.safetensors"))
                found |= {f"{name}/weights/{key}": value for key, value in tensors.items()}
        found |= {f"{name}/{key}": value for key, value in computed(model).items()}
    np.savez_compressed(Path(__file__).with_name("experts.npz"), **found)


main()
