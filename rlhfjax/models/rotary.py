"""Rotary positions (Su et al. 2021) and the ways of stretching them beyond the context of pretraining."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.products import settled


class Turn(NamedTuple):
    """Sines and cosines of the angles by which RoPE turns each pair of a token's coordinates."""

    sin: Float[Array, "B T 1 D/2"]
    cos: Float[Array, "B T 1 D/2"]


def rope_frequencies(config: DecoderConfig, local: bool = False) -> Float[Array, "D/2"]:
    """Radians a position: theta^(-2i/D), stretched as `rope_scaling` says; layers with a theta of their own are not.

    `linear` divides all by the factor. `llama3` divides those whose wavelength is over original_context / low_freq,
    keeps those under original_context / high_freq, and blends in between (Grattafiori et al. 2024, section 3.4.1).
    `yarn` blends over the dimensions instead (`_kept_by_yarn`). `longrope` divides each by a factor of its own, the
    short ones up to a `context` of the original and the long ones above, so that no token's angle depends on how long
    its row is (Ding et al. 2024). `dynamic` stretches only what goes on beyond the context, and nothing does here.
    """
    c, half = config, config.rotated_size // 2
    own = c.rope_local_theta if local else None
    frequency = (own or c.rope_theta) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if own is not None or c.rope_scaling in ("none", "dynamic"):
        return frequency
    if c.rope_scaling == "linear":
        return frequency / c.rope_factor
    if c.rope_scaling == "longrope":
        factors = c.rope_long_factors if c.context > c.rope_original_context else c.rope_short_factors
        return frequency / jnp.asarray(factors, jnp.float32)
    if c.rope_scaling == "yarn":
        keep = _kept_by_yarn(c)
    else:
        turns = c.rope_original_context * frequency / (2 * jnp.pi)  # in the original context
        keep = jnp.clip((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq), 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / c.rope_factor


def _kept_by_yarn(config: DecoderConfig) -> Float[Array, "D/2"]:
    """How much of each frequency stays as it is: all where a pair turns `beta_fast` times in the original context,
    nothing where it turns `beta_slow` times, linear over the dimensions in between (Peng et al. 2023, section 3.2).
    """
    size = config.rotated_size

    def dimension(turns: float) -> float:
        ratio = config.rope_original_context / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(config.rope_theta))

    first, last = dimension(config.rope_beta_fast), dimension(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 0.001 if first == last else 0
    ramp = (jnp.arange(size // 2, dtype=jnp.float32) - first) / (last - first)
    return 1 - jnp.clip(ramp, 0.0, 1.0)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all: float | None = None) -> float:
    """What YaRN multiplies queries and keys by where nothing is said: 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22).

    With both of DeepSeek's `mscale` it is the ratio of two such numbers (DeepSeek-AI 2024).
    """

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return of(mscale) / of(mscale_all) if mscale and mscale_all else of(1.0)


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """sqrt(1 + ln(factor) / ln(original context)), and 1 where nothing is stretched (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def turns(config: DecoderConfig, positions: Int[Array, "B T"]) -> dict[bool, Turn]:
    """The turns of tokens at these positions in each kind of layer, once for all layers; none without RoPE."""
    c = config
    if not any(c.rotated_layers):
        return {}

    def turn(local: bool) -> Turn:
        angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c, local)[None, None, None, :]
        scale = 1.0 if local and c.rope_local_theta is not None else c.rope_attention_factor
        return Turn(settled(scale * jnp.sin(angle)), settled(scale * jnp.cos(angle)))

    return {local: turn(local) for local in sorted(set(c.local_layers))}


def rotate(x: Float[Array, "B T H D"], turn: Turn) -> Float[Array, "B T H D"]:
    """Rotary position embedding, half-split (Su et al. 2021): pair (i, i + D/2) turns by position · frequency_i.

    Where there are fewer frequencies than pairs, only the first coordinates turn.
    """
    sin, cos = turn
    turned = x[..., : 2 * sin.shape[-1]].astype(jnp.float32)
    first, second = jnp.split(turned, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if turned.shape == x.shape else jnp.concatenate([turned, x[..., turned.shape[-1] :]], axis=-1)


def turn_of(turned: dict[bool, Turn], local: bool | Array, rotated: bool | Array) -> Turn | None:
    """The turn of a layer of this kind; where it is traced whether it knows of positions, by an angle of 0 in place of
    none.
    """
    if not turned or rotated is False:
        return None
    if isinstance(local, bool):
        turn = turned[local]
    else:
        turn = jax.tree.map(lambda near, far: jnp.where(local, near, far), turned[True], turned[False])
    if rotated is True:
        return turn
    return Turn(jnp.where(rotated, turn.sin, 0.0), jnp.where(rotated, turn.cos, 1.0))
