"""Sums, means and whitening over real tokens only.

A mask is True on real tokens. Masked positions never reach a result, whatever they hold (NaN and infinity included).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scalar = Float[Array, ""] | float


def length_mask(lengths: Int[Array, "B"], max_length: int) -> Bool[Array, "B T"]:
    """Mask of right-padded rows from their lengths in tokens: m_bt = [t < n_b].

    Lengths, never `ids != pad`: an id inside a response says nothing about where the response ends.
    """
    return jax.lax.broadcasted_iota(lengths.dtype, (lengths.shape[0], max_length), 1) < lengths[:, None]


def last_token_mask(mask: Bool[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """True at the last real token of each row, nowhere in a row that has none."""
    mask = jnp.asarray(mask).astype(bool)
    real_from_here = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1, dtype=jnp.int32), -1)
    return mask & (real_from_here == 1)


def at_last(x: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
    """The value at the last real token of each row; 0 in a row that has none."""
    return jnp.where(last_token_mask(mask), x, 0.0).sum(axis=-1)


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None) -> Float[Array, "..."]:
    """Sum over real tokens: Σ m·x, over everything or along one axis."""
    keep = jnp.asarray(mask).astype(bool)
    return jnp.sum(jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0), axis=axis)


def masked_mean(
    x: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    axis: int | None = None,
    *,
    normalizer: Scalar | None = None,
) -> Float[Array, "..."]:
    """Mean over real tokens: Σ m·x / Σ m, and 0 where no token is real.

    `normalizer` replaces Σ m by a count taken elsewhere. With the token count of the whole update there, the results
    of its micro batches add up to the mean over the update, however unevenly the real tokens fall.
    """
    total = masked_sum(x, mask, axis)
    keep = jnp.asarray(mask).astype(bool)
    count = jnp.sum(keep, axis=axis, dtype=jnp.float32) if normalizer is None else jnp.asarray(normalizer, jnp.float32)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def masked_centred(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None
) -> Float[Array, "*shape"]:
    """Distance of each real token from the mean of them all, x − μ; masked positions 0, and equal values exactly 0.

    The mean of n equal float32 numbers may be rounded to another one, and dividing by a deviation that is as small
    would blow the difference up to the size of a signal. So the least value is taken away first: that is exact for
    equal values, and the mean of zeros is zero.
    """
    keep = jnp.asarray(mask).astype(bool)
    x = jnp.asarray(x, jnp.float32)
    least = jnp.min(jnp.where(keep, x, jnp.inf), axis=axis, keepdims=True)
    # Without a gradient: what is centred does not depend on what was taken away.
    least = jax.lax.stop_gradient(jnp.where(keep.any(axis=axis, keepdims=True), least, 0.0))
    above = jnp.where(keep, x - jnp.broadcast_to(least, x.shape), 0.0)
    mean = masked_mean(above, keep, axis)
    mean = mean if axis is None else jnp.expand_dims(mean, axis)
    return jnp.where(keep, above - jnp.broadcast_to(mean, x.shape), 0.0)


def masked_variance(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None) -> Array:
    """Population variance over real tokens: Σ m·(x − μ)² / Σ m; exactly 0 for equal values, and where none is real."""
    return masked_mean(jnp.square(masked_centred(x, mask, axis)), mask, axis)


def whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], shift_mean: bool = True) -> Float[Array, "*shape"]:
    """Zero mean and unit variance over real tokens: (x − μ)·(σ² + 1e-8)^-½, masked positions 0.

    σ² is the population variance, as in Ziegler's code; TRL, verl and NeMo-RL divide by n − 1. Equal values become
    exactly 0. `shift_mean=False` adds μ back: the scale changes and the mean stays (rewards).
    Source: Ziegler et al. 2019 (released code); Huang et al. 2024, details on reward and advantage whitening.
    """
    keep = jnp.asarray(mask).astype(bool)
    centred = masked_centred(x, keep)
    whitened = centred * jax.lax.rsqrt(masked_mean(jnp.square(centred), keep) + 1e-8)
    if not shift_mean:
        whitened = whitened + masked_mean(x, keep)
    return jnp.where(keep, whitened, 0.0)
