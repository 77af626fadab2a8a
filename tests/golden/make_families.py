"""Tiny models of every family, as transformers computes them: configurations, logits, greedy tokens.

Weights are not stored: here and in the tests each tensor is drawn by its name. Run it with torch and transformers:

    python tests/golden/make_families.py [NAME …]
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

VOCAB, LENGTHS, NEW = 48, (12, 7), 8

GPT = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.1, 1.7], "long_factor": [2.0, 5.0]}
PHI = {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "rope_scaling": LONGROPE}
NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rotary_emb_base": 1000.0,
    "rotary_pct": 0.5,
}
SOME_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4, "pad_token_id": 0}
FAMILIES = {
    "gpt1": ("OpenAIGPTLMHeadModel", GPT),
    "gpt2": ("GPT2LMHeadModel", GPT | {"n_inner": 48}),
    "llama2": ("LlamaForCausalLM", BASE),
    "llama3": ("LlamaForCausalLM", BASE | {"tie_word_embeddings": True, "rope_theta": 50.0, "rope_scaling": LLAMA3}),
    "llama_linear": ("LlamaForCausalLM", BASE | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "mistral": ("MistralForCausalLM", BASE | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", BASE | QWEN | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", BASE | {"head_dim": 12, "rope_theta": 1e6}),
    "gemma2": ("Gemma2ForCausalLM", BASE | GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        BASE
        | GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_theta": 1000.0,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "llama_dynamic": ("LlamaForCausalLM", BASE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama_yarn": ("LlamaForCausalLM", BASE | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "qwen3_yarn": (
        "Qwen3ForCausalLM",
        BASE | {"head_dim": 12, "rope_theta": 50.0, "rope_scaling": YARN | {"truncate": False, "beta_fast": 4.0}},
    ),
    "gemma": ("GemmaForCausalLM", BASE | {"head_dim": 12, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
    "gpt_neox_sequential": (
        "GPTNeoXForCausalLM",
        NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_fast", "rotary_pct": 1.0},
    ),
    "phi3": ("Phi3ForCausalLM", BASE | {"sliding_window": 4}),
    "phi3_short": ("Phi3ForCausalLM", BASE | PHI | {"original_max_position_embeddings": 32}),
    "phi3_long": ("Phi3ForCausalLM", BASE | PHI | {"original_max_position_embeddings": 4}),
    "olmo2": ("Olmo2ForCausalLM", BASE),
    "olmo3": (
        "Olmo3ForCausalLM",
        BASE | SOME_WINDOWS | {"rope_theta": 5e5, "rope_scaling": YARN | {"attention_factor": 1.2}},
    ),
    "granite": (
        "GraniteForCausalLM",
        BASE
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
        },
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        BASE | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        BASE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "rope_scaling": YARN | {"truncate": False},
        },
    ),
    "gpt_neox_score": ("GPTNeoXForSequenceClassification", NEOX | {"num_labels": 1, "pad_token_id": 0}),
    "gpt2_score": ("GPT2ForSequenceClassification", GPT | {"num_labels": 1, "pad_token_id": 0}),
    "qwen2_score": ("Qwen2ForSequenceClassification", BASE | QWEN | {"num_labels": 1, "pad_token_id": 0}),
    "gemma3_score": ("Gemma3TextForSequenceClassification", BASE | GEMMA | {"num_labels": 1}),
}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a tensor, by its name alone; scales of norms are around 1."""
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return np.random.default_rng(zlib.crc32(name.encode())).normal(mean, 0.25, shape).astype(np.float32)


def padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask; padding is token 0."""
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, here], mask[i, here] = row, True
    return tokens, mask


def build(class_name: str, settings: dict):
    """A transformers model with our weights; its normal dropout-free float32 forward pass."""
    import torch
    import transformers

    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings, attn_implementation="eager")).eval()
    if class_name.startswith("Gemma3"):
        assert model.config.model_type == "gemma3_text"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.replace("lm_head", "embed_out") if class_name.startswith("GPTNeoX") else name  # as in files
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    return model


def logits_of(model, rows: list[np.ndarray], side: str) -> list[np.ndarray]:
    """The logits at the real tokens of each row; positions count real tokens, whatever the side of the padding."""
    import torch

    tokens, mask = padded(rows, side)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.from_numpy(positions),
        )
    return [row[where] for row, where in zip(out.logits.numpy(), mask, strict=True)]


def check_precedence() -> None:
    """What the tests hold of files in which `rope_scaling` stands beside `rope_parameters` and `rope_theta`."""
    from transformers import LlamaConfig

    linear, plain = {"rope_type": "linear", "factor": 3.0}, {"rope_type": "default", "rope_theta": 500.0}
    both = LlamaConfig(rope_parameters=dict(plain), rope_scaling=dict(linear), rope_theta=500.0)
    assert both.rope_parameters == linear | {"rope_theta": 500.0}
    alone = LlamaConfig(rope_parameters=dict(plain), rope_scaling=dict(linear))
    assert alone.rope_parameters == linear | {"rope_theta": 10_000.0}  # that of rope_parameters is lost
    assert LlamaConfig(rope_parameters=dict(plain), rope_theta=7.0).rope_parameters == plain


def main() -> None:
    check_precedence()
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, VOCAB, length) for length in LENGTHS]
    wanted = sys.argv[1:] or FAMILIES
    for family, (class_name, settings) in ((name, FAMILIES[name]) for name in wanted):
        model = build(class_name, settings)
        described = model.config.to_dict() | {"architectures": [class_name]}
        arrays = {"config": json.dumps(described, sort_keys=True), "row0": rows[0], "row1": rows[1]}
        if class_name.endswith("ForSequenceClassification"):
            tokens, _ = padded(rows, "right")
            import torch

            mask = torch.from_numpy((tokens > 0).astype(np.int64))
            with torch.no_grad():
                arrays["scores"] = model(input_ids=torch.from_numpy(tokens), attention_mask=mask).logits.numpy()[:, 0]
        else:
            right, left = (logits_of(model, rows, side) for side in ("right", "left"))
            for i in range(2):
                assert np.abs(right[i] - left[i]).max() < 1e-4, family
                arrays[f"logits{i}"] = right[i]
            longer = [row.copy() for row in rows]
            for _ in range(NEW):
                last = [logits[-1] for logits in logits_of(model, longer, "left")]
                gap = min(np.diff(np.sort(x)[-2:])[0] for x in last)
                assert gap > 1e-3, (family, gap)
                longer = [np.append(row, x.argmax()) for row, x in zip(longer, last, strict=True)]
            arrays["greedy"] = np.stack([row[-NEW:] for row in longer])
        path = Path(__file__).parent / "families" / f"{family}.npz"
        np.savez_compressed(path, **arrays)
        spread = arrays["scores"] if "scores" in arrays else arrays["logits0"].std()
        print(family, path.stat().st_size, spread, arrays.get("greedy", np.zeros(0))[:1])


if __name__ == "__main__":
    main()
