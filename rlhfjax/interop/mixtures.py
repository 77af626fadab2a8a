"""Mixtures of experts as transformers has them.

Files of Mixtral and Qwen3-MoE have a tensor for each expert and matrix, those of gpt-oss one for all experts.
"""

from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.interop.architectures import Architecture, read_llama, read_windows, write_llama, write_windows
from rlhfjax.interop.rope import RopeKeys, write_rope
from rlhfjax.interop.settings import Settings
from rlhfjax.interop.tensors import Weight, linear, llama_weights, same
from rlhfjax.models import DecoderConfig
from rlhfjax.models.activations import ALPHA, LIMIT


def _read_mixtral(s: Settings) -> dict[str, Any]:
    s.take("router_jitter_noise", float, 0.0)  # of their training only
    own = {"window": s.size("sliding_window", None)}
    return (
        read_llama(s, RopeKeys(1e6), norm_eps=1e-5)
        | own
        | _read_router(s, s.size("num_local_experts", 8), 2)
        | {"norm_topk": True}
    )


def _read_qwen3_moe(s: Settings) -> dict[str, Any]:
    s.expect("decoder_sparse_step", (1,), 1)  # experts in every layer
    s.expect("mlp_only_layers", ([], None), None)
    s.take("max_window_layers", int, 28)  # the window, where there is one, is that of all layers
    window, named = s.size("sliding_window", 4096), s.size("num_local_experts", None)
    return (
        read_llama(s)
        | _read_router(s, s.size("num_experts", None) or named or 128, 8)
        | {
            "qk_norm": True,
            "window": window if s.take("use_sliding_window", bool, False) else None,
            "mlp_width": s.size("moe_intermediate_size", 768),
            "norm_topk": s.take("norm_topk_prob", bool, False),
        }
    )


_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_OSS_SWIGLU = {"swiglu_alpha": ALPHA, "swiglu_limit": LIMIT}


def _read_gpt_oss(s: Settings) -> dict[str, Any]:
    s.expect("attention_bias", (True,), True)
    for key, constant in _OSS_SWIGLU.items():
        s.expect(key, (constant,), constant)
    s.take("initial_context_length", int, None)  # says again what rotary positions say
    router = _read_router(s, s.size("num_local_experts", s.size("num_experts", 128)), 4)
    s.expect("experts_per_token", (router["experts_per_token"], None), None)
    fields = read_llama(s, RopeKeys(1.5e5, usual=_OSS_ROPE), head_dim=64, norm_eps=1e-5) | router
    own = {"biases": True, "activation": "clamped_swiglu", "attention_sinks": True, "norm_topk": True}
    window = read_windows(s, fields["layers"], s.size("sliding_window", 128), lambda layer: layer % 2 == 0)
    return fields | own | window


def _write_gpt_oss(c: DecoderConfig) -> dict[str, Any]:
    own = {"num_local_experts": c.experts, "attention_bias": True} | _OSS_SWIGLU
    rope = write_rope(c)
    rope["rope_scaling"] = rope["rope_scaling"] or {"rope_type": "default"}  # without one it would be stretched
    return write_llama(c) | write_windows(c) | _write_router(c) | own | rope


def _gpt_oss_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """Gate and up take turns on the last axis of one tensor."""
    at, experts = "model.layers.{layer}.mlp.", "blocks/experts"
    found = [weight for weight in llama_weights(c) if not weight.path.startswith("blocks/mlp/")]
    found.append(linear(f"{experts}/router/kernel", f"{at}router.weight", (c.width,), (c.experts,)))
    found.append(same(f"{experts}/router/bias", f"{at}router.bias", (c.experts,)))
    for i, name in enumerate(("gate", "up")):
        for leaf, ending, shape in (("kernel", "", (c.experts, c.width)), ("bias", "_bias", (c.experts,))):
            path, theirs = f"{experts}/{name}/{leaf}", f"{at}experts.gate_up_proj{ending}"
            found.append(Weight(path, theirs, (*shape, 2 * c.mlp_width), lambda x, i=i: x[..., i::2], shared=True))
    found.append(same(f"{experts}/down/kernel", f"{at}experts.down_proj", (c.experts, c.mlp_width, c.width)))
    found.append(same(f"{experts}/down/bias", f"{at}experts.down_proj_bias", (c.experts, c.width)))
    return tuple(found)


def _read_router(s: Settings, experts: int, usual: int) -> dict[str, Any]:
    s.take("output_router_logits", bool, False)
    per_token = s.size("num_experts_per_tok", usual)
    if per_token > experts:
        raise ConfigError(f"config.json: expected num_experts_per_tok of at most {experts} experts, got {per_token}")
    return {
        "experts": experts,
        "experts_per_token": per_token,
        "load_balancing_coef": s.take("router_aux_loss_coef", float, 0.001),
    }


def _write_router(c: DecoderConfig) -> dict[str, Any]:
    return {"num_experts_per_tok": c.experts_per_token, "router_aux_loss_coef": c.load_balancing_coef}


def _write_mixtral(c: DecoderConfig) -> dict[str, Any]:
    return write_llama(c) | _write_router(c) | {"num_local_experts": c.experts, "sliding_window": c.window}


def _write_qwen3_moe(c: DecoderConfig) -> dict[str, Any]:
    return (
        write_llama(c)
        | _write_router(c)
        | {
            "num_experts": c.experts,
            "moe_intermediate_size": c.mlp_width,
            "norm_topk_prob": c.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": c.window is not None,
            "sliding_window": c.window,
            "max_window_layers": 0,
        }
    )


def _weights(c: DecoderConfig, block: str, names: dict[str, str]) -> tuple[Weight, ...]:
    """Llama's tensors with the router and the experts of `block` in the place of the feed-forward block."""
    at = "model.layers.{layer}." + block
    found = [weight for weight in llama_weights(c) if not weight.path.startswith("blocks/mlp/")]
    found.append(linear("blocks/experts/router/kernel", f"{at}.gate.weight", (c.width,), (c.experts,)))
    for ours, theirs in names.items():
        inner, outer = ((c.mlp_width,), (c.width,)) if ours == "down" else ((c.width,), (c.mlp_width,))
        name = f"{at}.experts." + "{expert}." + f"{theirs}.weight"
        found.append(linear(f"blocks/experts/{ours}/kernel", name, inner, outer))
    return tuple(found)


def _mixtral_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    return _weights(c, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})


def _qwen3_moe_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    return _weights(c, "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


MIXTURES = {
    "gpt_oss": Architecture("GptOss", "gpt_oss", _read_gpt_oss, _write_gpt_oss, _gpt_oss_weights),
    "mixtral": Architecture("Mixtral", "mixtral", _read_mixtral, _write_mixtral, _mixtral_weights),
    "qwen3_moe": Architecture("Qwen3Moe", "qwen3_moe", _read_qwen3_moe, _write_qwen3_moe, _qwen3_moe_weights),
}
