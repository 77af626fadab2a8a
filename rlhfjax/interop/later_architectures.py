"""Later families as transformers has them: OLMo, GPT-NeoX, Phi, Granite, SmolLM3; each is Llama but for a few lines."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.interop.architectures import (
    MOST_LAYERS,
    Architecture,
    divided,
    read_llama,
    read_windows,
    shortest,
    write_llama,
    write_windows,
)
from rlhfjax.interop.rope import RopeKeys, read_rope, read_two_ropes, write_rope, write_two_ropes
from rlhfjax.interop.settings import Settings
from rlhfjax.interop.tensors import Weight, layer_norm, linear, llama_weights, rows, same, unembedding
from rlhfjax.models import DecoderConfig

_OLMO = {"norm_place": "output", "qk_norm": True, "qk_norm_whole": True}
_PARTIAL, _ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def _read_olmo2(s: Settings) -> dict[str, Any]:
    return read_llama(s, norm_eps=1e-5) | _OLMO


def _read_olmo3(s: Settings) -> dict[str, Any]:
    theta = s.positive("rope_theta", None) or 5e5  # of both kinds of layers
    fields = read_llama(s, read_two_ropes(s, theta, theta, "rope_theta"), norm_eps=1e-5) | _OLMO
    usual = lambda layer: (layer + 1) % 4 != 0  # noqa: E731
    return fields | read_windows(s, fields["layers"], s.size("sliding_window", 4096), usual)


def _write_olmo3(c: DecoderConfig) -> dict[str, Any]:
    return write_llama(c) | write_windows(c) | write_two_ropes(c)


_NEOX_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}


def _read_gpt_neox(s: Settings) -> dict[str, Any]:
    s.expect("attention_bias", (True,), True)
    width, heads = s.size("hidden_size"), s.size("num_attention_heads")
    keys = RopeKeys(theta_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct")
    return {
        "vocab_size": s.size("vocab_size"),
        "layers": s.size("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": divided(width, heads),
        "mlp_width": s.size("intermediate_size"),
        "norm": "layer",
        "norm_eps": s.positive("layer_norm_eps", 1e-5),
        "activation": _NEOX_ACTIVATIONS[s.expect("hidden_act", tuple(_NEOX_ACTIVATIONS), "gelu")],
        "biases": True,
        "parallel": s.take("use_parallel_residual", bool, True),
        "tied": s.take("tie_word_embeddings", bool, False),
        "init_std": s.positive("initializer_range", 0.02),
        **read_rope(s, keys),
    }


def _write_gpt_neox(c: DecoderConfig) -> dict[str, Any]:
    rope = write_rope(c)
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": "gelu" if c.activation == "gelu_exact" else "gelu_new",
        "use_parallel_residual": c.parallel,
        "attention_bias": True,
        "tie_word_embeddings": c.tied,
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": c.rope_fraction,
    } | rope


def _gpt_neox_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """Query, key and value are one matrix, head by head."""

    def block() -> Iterator[Weight]:
        at = "gpt_neox.layers.{layer}."
        for i, ours in enumerate(("query", "key", "value")):
            yield from _of_each_head(c, f"blocks/attention/{ours}", f"{at}attention.query_key_value", i)
        for path, name, inputs, outputs in (
            ("attention/out", "attention.dense", (c.heads, c.head_dim), c.width),
            ("mlp/up", "mlp.dense_h_to_4h", (c.width,), c.mlp_width),
            ("mlp/down", "mlp.dense_4h_to_h", (c.mlp_width,), c.width),
        ):
            yield linear(f"blocks/{path}/kernel", f"{at}{name}.weight", inputs, (outputs,))
            yield same(f"blocks/{path}/bias", f"{at}{name}.bias", (outputs,))
        yield from layer_norm("blocks/attention_norm", f"{at}input_layernorm", c.width)
        yield from layer_norm("blocks/mlp_norm", f"{at}post_attention_layernorm", c.width)

    embedding = same("embed/embedding", "gpt_neox.embed_in.weight", (c.vocab_size, c.width))
    final = layer_norm("final_norm", "gpt_neox.final_layer_norm", c.width)
    return (embedding, *block(), *final, *unembedding(c, "embed_out"))


def _of_each_head(c: DecoderConfig, path: str, name: str, index: int) -> Iterator[Weight]:
    """Third `index` of the outputs of every head."""
    heads, size = c.heads, c.head_dim

    def kernel(x: np.ndarray) -> np.ndarray:
        return x.reshape(heads, 3, size, c.width)[:, index].transpose(2, 0, 1)

    yield Weight(f"{path}/kernel", f"{name}.weight", (3 * heads * size, c.width), kernel, shared=True)
    yield Weight(
        f"{path}/bias", f"{name}.bias", (3 * heads * size,), lambda x: x.reshape(heads, 3, size)[:, index], shared=True
    )


def _read_phi3(s: Settings) -> dict[str, Any]:
    for key in ("full_attn_mod", "interpolate_factor"):  # of their training; transformers reads neither
        s.expect(key, (1, None), None)
    # Its class takes the scalings of other names for longrope, which they were.
    renamed = {"su": "longrope", "yarn": "longrope"}
    rope = RopeKeys(fraction_key=_PARTIAL, renamed=renamed, original=4096)
    return read_llama(s, rope, norm_eps=1e-5) | {"window": s.size("sliding_window", None)}


def _write_phi3(c: DecoderConfig) -> dict[str, Any]:
    described = write_llama(c) | {"sliding_window": c.window, _PARTIAL: c.rope_fraction}
    return described | ({_ORIGINAL: c.rope_original_context} if c.rope_scaling == "longrope" else {})


def _phi3_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """Query, key and value are one matrix, gate and up another."""

    def block() -> Iterator[Weight]:
        at, total = "model.layers.{layer}.", (c.heads + 2 * c.kv_heads) * c.head_dim
        start = 0
        for ours, heads in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads)):
            path, name = f"blocks/attention/{ours}/kernel", f"{at}self_attn.qkv_proj.weight"
            yield rows(path, name, (c.width,), (heads, c.head_dim), start, total)
            start += heads * c.head_dim
        for i, ours in enumerate(("gate", "up")):
            path, name = f"blocks/mlp/{ours}/kernel", f"{at}mlp.gate_up_proj.weight"
            yield rows(path, name, (c.width,), (c.mlp_width,), i * c.mlp_width, 2 * c.mlp_width)

    joined = tuple(block())
    apart = {weight.path for weight in joined}
    return tuple(weight for weight in llama_weights(c) if weight.path not in apart) + joined


def _read_granite(s: Settings) -> dict[str, Any]:
    multiplied = {
        "embedding_multiplier": s.positive("embedding_multiplier", 1.0),
        "residual_multiplier": s.positive("residual_multiplier", 1.0),
        "attention_multiplier": s.positive("attention_multiplier", 1.0),
        "logit_divisor": s.positive("logits_scaling", 1.0),
    }
    return read_llama(s) | multiplied


def _write_granite(c: DecoderConfig) -> dict[str, Any]:
    return write_llama(c) | {
        "embedding_multiplier": c.embedding_multiplier,
        "residual_multiplier": c.residual_multiplier,
        "attention_multiplier": c.score_scale,
        "logits_scaling": c.logit_divisor,
    }


def _read_smollm3(s: Settings) -> dict[str, Any]:
    """Every fourth layer knows of no positions; windows, where they are switched on, are of those layers."""
    fields = read_llama(s, RopeKeys(2e6), tied=True)
    layers, every = fields["layers"], s.size("no_rope_layer_interval", 4)
    turned = s.take("no_rope_layers", list, None) or [int((layer + 1) % every != 0) for layer in range(layers)]
    if len(turned) < layers or not all(isinstance(one, int) and one in (0, 1) for one in turned):
        raise ConfigError(f"config.json: expected no_rope_layers with 0 or 1 for each of {layers} layers")
    s.take("max_window_layers", int, None)  # which its class does not look at
    window = s.size("sliding_window", None)
    window = window if s.take("use_sliding_window", bool, False) else None
    fields |= {"rope_pattern": shortest("".join("NR"[one] for one in turned[:layers]))}
    return fields | read_windows(s, layers, window, lambda layer: window is not None and not turned[layer])


def _write_smollm3(c: DecoderConfig) -> dict[str, Any]:
    turned = {"no_rope_layers": [int(rotated) for rotated in c.rotated_layers]}
    return write_llama(c) | write_windows(c) | turned | {"use_sliding_window": any(c.local_layers)}


LATER = {
    "olmo2": Architecture("Olmo2", "olmo2", _read_olmo2, write_llama, llama_weights),
    "olmo3": Architecture("Olmo3", "olmo3", _read_olmo3, _write_olmo3, llama_weights),
    "gpt_neox": Architecture("GPTNeoX", "gpt_neox", _read_gpt_neox, _write_gpt_neox, _gpt_neox_weights),
    "phi3": Architecture("Phi3", "phi3", _read_phi3, _write_phi3, _phi3_weights),
    "granite": Architecture("Granite", "granite", _read_granite, _write_granite, llama_weights, classified=False),
    "smollm3": Architecture("SmolLM3", "smollm3", _read_smollm3, _write_smollm3, llama_weights),
}
