"""Rotary positions of a config.json: which of the keys of ten versions hold, and what they stretch.

transformers 5 keeps all of it in `rope_parameters`. Where `rope_scaling` is there as well, which people add by hand to
have longer contexts, that takes its place; what it does not say is read at the top, and is a default otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.interop.settings import Settings
from rlhfjax.models import DecoderConfig
from rlhfjax.models.rotary import longrope_attention_factor, yarn_attention_factor

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"
_FAR, _NEAR = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RopeKeys:
    """How a family names its rotary positions, and what it takes where nothing is said.

    Without a `fraction_key` all of a head turns. `usual` is the scaling of a file without one, `renamed` are kinds of
    scaling that its class takes for others, and `original` says that the context of pretraining stands at the top, with
    this default.
    """

    theta: float = 1e4
    theta_key: str = "rope_theta"
    fraction: float = 1.0
    fraction_key: str | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    original: int | None = None


PLAIN = RopeKeys()


def read_rope(s: Settings, keys: RopeKeys) -> dict[str, Any]:
    """Fields of rotary positions, and of the context.

    Raises ConfigError naming a scaling that is not known, and where `rope_scaling` would make a setting in
    `rope_parameters` void.
    """
    scaling, parameters = (s.take(key, dict, None) or {} for key in ("rope_scaling", "rope_parameters"))
    theta = s.positive(keys.theta_key, None) or keys.theta
    fraction = s.positive(keys.fraction_key or "partial_rotary_factor", None) or keys.fraction
    fields = _rope(s, scaling or parameters or keys.usual, replace(keys, theta=theta, fraction=fraction))
    for key, ours in (("rope_theta", "rope_theta"), ("partial_rotary_factor", "rope_fraction")):
        if parameters.get(key, fields[ours]) != fields[ours]:
            raise ConfigError(
                f"config.json: expected {key} {parameters[key]!r:.80} of rope_parameters in rope_scaling too, which "
                f"takes the place of all of rope_parameters, got {fields[ours]}; write both into one"
            )
    if keys.fraction_key is None and fields["rope_fraction"] != 1:
        raise ConfigError(
            f"config.json: expected partial_rotary_factor 1.0, got {fields['rope_fraction']}; not supported for this "
            "architecture"
        )
    return fields


def read_two_ropes(s: Settings, theta: float, local_theta: float, local_key: str) -> dict[str, Any]:
    """The same where layers with a window have a theta of their own, and are not stretched."""
    parameters, scaling = (s.take(key, dict, None) or {} for key in ("rope_parameters", "rope_scaling"))
    if parameters and not {_FAR, _NEAR} & parameters.keys():
        raise ConfigError(f"config.json: expected {_FAR} and {_NEAR} in rope_parameters, got {', '.join(parameters)}")
    near = _rope(s, parameters.get(_NEAR) or {}, RopeKeys(s.positive(local_key, None) or local_theta))
    far = _rope(s, (parameters.get(_FAR) or {}) | scaling, RopeKeys(s.positive("rope_theta", None) or theta))
    if not far.get("rope_truncate", True):  # transformers looks for it one level higher, where there is none
        raise ConfigError(f"config.json: expected truncate true in {_FAR}, got false; not supported")
    if near.get("rope_scaling", "none") != "none":
        raise ConfigError(f"config.json: expected plain rotary positions in {_NEAR}, got {near['rope_scaling']}")
    return far | {"rope_local_theta": near["rope_theta"]}


def _rope(s: Settings, given: Mapping[str, Any], keys: RopeKeys) -> dict[str, Any]:
    rope, context = Settings(given, "config.json: rotary positions"), s.size("max_position_embeddings")
    older = rope.expect("type", (*_KINDS, *keys.renamed), "default")
    kind = rope.expect("rope_type", (*_KINDS, *keys.renamed), older)
    kind = keys.renamed.get(kind, kind)
    fields = {
        "context": context,
        "rope_theta": rope.positive("rope_theta", None) or keys.theta,
        "rope_fraction": rope.positive("partial_rotary_factor", None) or keys.fraction,
    }
    original = rope.size(_ORIGINAL, None)
    if keys.original is not None:
        original = s.size(_ORIGINAL, keys.original)
    if kind != "default":
        if min(original or context, fields["rope_theta"]) <= 1:
            raise ConfigError(
                f"config.json: expected {_ORIGINAL} and rope_theta above 1, got {original} and {given!r:.80}"
            )
        fields |= {"rope_scaling": kind} | _STRETCHES[kind](rope, context, original or context)
    rope.check_all_read()
    return fields


def _read_factor(rope: Settings, context: int, original: int) -> dict[str, Any]:
    return {"rope_factor": rope.positive("factor")}


def _read_llama3(rope: Settings, context: int, original: int) -> dict[str, Any]:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if not low < high:
        raise ConfigError(f"config.json: expected low_freq_factor below high_freq_factor, got {low} and {high}")
    return {
        "rope_factor": rope.positive("factor"),
        "rope_low_freq": low,
        "rope_high_freq": high,
        "rope_original_context": original,
    }


def _read_yarn(rope: Settings, context: int, original: int) -> dict[str, Any]:
    factor = rope.positive("factor", None) or context / original
    usual = yarn_attention_factor(factor, rope.positive("mscale", None), rope.positive("mscale_all_dim", None))
    return {
        "rope_factor": factor,
        "rope_original_context": original,
        "rope_attention_factor": rope.positive("attention_factor", None) or usual,
        "rope_beta_fast": rope.positive("beta_fast", None) or 32.0,
        "rope_beta_slow": rope.positive("beta_slow", None) or 1.0,
        "rope_truncate": rope.take("truncate", bool, True),
    }


def _read_longrope(rope: Settings, context: int, original: int) -> dict[str, Any]:
    """With the short factors, and so a context of the original; `rope_factor` keeps how far the long ones go."""
    usual = longrope_attention_factor(rope.positive("factor", None) or context / original, original)
    return {
        "context": min(context, original),
        "rope_factor": context / original,
        "rope_original_context": original,
        "rope_attention_factor": rope.positive("attention_factor", None) or usual,
        "rope_short_factors": _factors(rope, "short_factor"),
        "rope_long_factors": _factors(rope, "long_factor"),
    }


def _factors(rope: Settings, key: str) -> tuple[float, ...]:
    factors = rope.take(key, list)
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in factors):
        raise ConfigError(f"config.json: expected numbers above 0 in {key}, got {factors!r:.80}")
    return tuple(map(float, factors))


_STRETCHES = {
    "linear": _read_factor,
    "dynamic": _read_factor,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The settings of transformers 4, which 5 reads as well."""
    c, kind = config, config.rope_scaling
    scaling: dict[str, Any] | None = None if kind == "none" else {"rope_type": kind, "factor": c.rope_factor}
    context, original = c.context, {_ORIGINAL: c.rope_original_context}
    if scaling and kind == "llama3":
        scaling |= {"low_freq_factor": c.rope_low_freq, "high_freq_factor": c.rope_high_freq} | original
    if scaling and kind == "yarn":
        scaling |= original | {"attention_factor": c.rope_attention_factor, "truncate": c.rope_truncate}
        scaling |= {"beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow}
    if kind == "longrope":  # transformers 4 wants these three of Phi-3, and no other
        scaling = {"type": kind, "short_factor": [*c.rope_short_factors], "long_factor": [*c.rope_long_factors]}
        context = max(context, round(c.rope_original_context * c.rope_factor))
        if c.rope_attention_factor != longrope_attention_factor(c.rope_factor, c.rope_original_context):
            scaling |= {"attention_factor": c.rope_attention_factor}
    return {"max_position_embeddings": context, "rope_theta": c.rope_theta, "rope_scaling": scaling}


def write_two_ropes(config: DecoderConfig) -> dict[str, Any]:
    """The same for layers of two kinds, as transformers 4 and 5 have it."""
    written = write_rope(config)
    far = {"rope_type": "default", "rope_theta": config.rope_theta} | (written["rope_scaling"] or {})
    near = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    return written | {"rope_parameters": {_FAR: far, _NEAR: near}}
