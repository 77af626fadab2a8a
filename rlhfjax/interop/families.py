"""Decoders as Hugging Face's config.json and tensor names say them, in both directions.

A configuration is read through lists of what is known: a setting that would change the numbers and is not known here is
refused by its name. It is written only where reading it again gives the same decoder.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.interop.architectures import ARCHITECTURES, Architecture
from rlhfjax.interop.later_architectures import LATER
from rlhfjax.interop.mixtures import MIXTURES
from rlhfjax.interop.settings import Settings
from rlhfjax.interop.tensors import Weight
from rlhfjax.models import DecoderConfig

__all__ = ["Weight", "config_of", "hf_config", "weights"]

_KNOWN = ARCHITECTURES | LATER | MIXTURES
_CLASSIFIER = "ForSequenceClassification"
# The scalings of rotary positions that each setting is of.
_STRETCHED = {
    "rope_factor": ("linear", "dynamic", "llama3", "yarn", "longrope"),
    "rope_attention_factor": ("yarn", "longrope"),
    "rope_original_context": ("llama3", "yarn", "longrope"),
    "rope_low_freq": ("llama3",),
    "rope_high_freq": ("llama3",),
    "rope_beta_fast": ("yarn",),
    "rope_beta_slow": ("yarn",),
    "rope_truncate": ("yarn",),
    "rope_short_factors": ("longrope",),
    "rope_long_factors": ("longrope",),
}


def config_of(hf: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes, of a language model or of a classifier on top of one.

    Raises ConfigError naming an architecture that is not supported, or a setting that is missing, wrong or unknown.
    """
    settings = Settings(hf)
    if quantised := settings.take("quantization_config", dict, None):
        raise ConfigError(
            "config.json: expected weights of a float type, got quantization_config of "
            f"{quantised.get('quant_method')!r:.40}; write the model in bfloat16 first (transformers dequantises it)"
        )
    family = _family_of(settings)
    config = DecoderConfig(family=family, **_KNOWN[family].read(settings))
    settings.check_all_read()
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"config.json: expected num_attention_heads a multiple of num_key_value_heads, got {config.heads} and "
            f"{config.kv_heads}"
        )
    _check_rope(config)
    return config


def _check_rope(config: DecoderConfig) -> None:
    size = config.rotated_size
    if config.positions == "rope" and (size % 2 or not 0 < size <= config.head_dim):
        raise ConfigError(
            f"config.json: expected an even head_dim, and a part of it that turns, got {config.head_dim} and {size}"
        )
    for key, factors in (("short_factor", config.rope_short_factors), ("long_factor", config.rope_long_factors)):
        if config.rope_scaling == "longrope" and len(factors) != size // 2:
            raise ConfigError(f"config.json: expected {size // 2} numbers in {key}, one per pair, got {len(factors)}")


def hf_config(config: DecoderConfig, scalar: bool = False) -> dict[str, Any]:
    """config.json of a decoder, or of a classifier with one label; the weights' type is for the writer to add.

    Raises ConfigError when no architecture there is this combination of settings.
    """
    architecture = _architecture_of(config)
    name = architecture.stem + architecture.causal
    labels: dict[str, Any] = {}
    if scalar and not architecture.classified:
        raise ConfigError(f"export: transformers has no {architecture.stem}{_CLASSIFIER}; export a policy instead")
    if scalar:  # the classifier of Gemma 3 without "Text" reads pictures
        name = architecture.stem + ("Text" if architecture.stem == "Gemma3" else "") + _CLASSIFIER
        labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    described = {"architectures": [name], "model_type": architecture.model_type, "initializer_range": config.init_std}
    return described | labels | architecture.write(config)


def weights(config: DecoderConfig, scalar: bool = False) -> tuple[Weight, ...]:
    """Every parameter of the decoder and the tensor it is over there; tied embeddings once.

    A scalar model has no unembedding; its head is not among them. Raises ConfigError as `hf_config` does.
    """
    found = _architecture_of(config).weights(config)
    return tuple(weight for weight in found if not (scalar and weight.path.startswith("unembed/")))


def _family_of(settings: Settings) -> str:
    names, kind = settings.take("architectures", list, None), settings.take("model_type", str, None)
    text = settings.take("text_config", dict, None)
    if text is not None or names == ["Gemma3ForConditionalGeneration"]:
        inner = (text or {}).get("model_type", "gemma3_text")
        raise ConfigError(
            f"config.json: expected a model of text such as Gemma3ForCausalLM, got {names!r:.100} around "
            f"{inner!r:.40}, which reads pictures or sounds as well; save its language model by itself first"
        )
    for family, known in _KNOWN.items():
        stem = known.stem
        if names in ([stem + known.causal], [stem + _CLASSIFIER], [stem + "Text" + _CLASSIFIER]):
            return family
        if names is None and kind == known.model_type:
            return family
    supported = ", ".join(known.stem + known.causal for known in _KNOWN.values())
    got = f"model_type {kind!r}" if names is None else f"{names!r:.100}"
    raise ConfigError(f"config.json: expected one of {supported}, got {got}")


def _architecture_of(config: DecoderConfig) -> Architecture:
    """The architecture that says exactly this decoder: its own family's if that does, else any that does."""
    own = {family: known for family, known in _KNOWN.items() if family == config.family}
    for architecture in (own | _KNOWN).values():
        if _says(architecture, config):
            return architecture
    raise ConfigError(
        f"export: expected a decoder that transformers has under some name, got {config.family} with {config.norm} "
        f"norm ({config.norm_place}), {config.positions} positions, {config.activation}, biases {config.biases}, "
        f"{config.heads} heads and {config.kv_heads} for keys; leave model.architecture as the family has it"
    )


def _says(architecture: Architecture, config: DecoderConfig) -> bool:
    try:
        again = DecoderConfig(**architecture.read(Settings(architecture.write(config))))
    except ConfigError:
        return False
    return _numbers(again) == _numbers(config)


def _numbers(config: DecoderConfig) -> dict[str, Any]:
    """What decides the numbers that a decoder computes, each thing said in one way."""
    plain = asdict(replace(config, family="", init_std=0.0, lora_alpha=0.0, remat="", dtype="", attention=""))
    for name in ("capacity_factor", "load_balancing_coef", "router_z_coef"):  # of training
        del plain[name]
    plain["window_pattern"] = config.local_layers
    plain["rope_pattern"] = config.rotated_layers
    plain["attention_multiplier"] = config.score_scale
    unused = {"query_scalar"}
    if not any(config.local_layers):
        unused |= {"window", "rope_local_theta"}
    if config.positions != "rope":
        unused |= {name for name in plain if name.startswith("rope_")}
    for name, kinds in _STRETCHED.items():
        if config.rope_scaling not in kinds:
            unused |= {name}
    if not config.qk_norm:
        unused |= {"qk_norm_whole"}
    if not config.experts:
        unused |= {"experts_per_token", "norm_topk"}
    return {name: value for name, value in plain.items() if name not in unused}
