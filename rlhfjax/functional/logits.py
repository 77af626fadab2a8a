"""Temperature and truncation of next-token distributions.

Temperature is part of the policy, so it divides the logits in every log-probability too (`likelihood.py`). Top-k and
top-p are not: they belong to sampling alone and are off while rewards are being collected. Where logits tie with the
k-th largest exactly k stay (transformers keeps all of them). At temperature 0 the sampler takes the argmax itself, and
reports what the policy says of it at temperature 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LEAST_TEMPERATURE = 1e-15
_CANDIDATES = 256  # the likeliest tokens, among which nearly every row that is cut off is cut off

PerRow = Float[Array, "*B"] | float
PerRowCount = Int[Array, "*B"] | int


def apply_temperature(logits: Float[Array, "*B V"], temperature: PerRow) -> Float[Array, "*B V"]:
    """Logits divided by a temperature T > 0, one for all rows or one per row: z / max(T, 1e-15), in float32.

    As T goes to 0 the softmax of this becomes 1 at the largest logit, and below the bound, where z / T would leave
    float32 and make every probability NaN, it has got there: logits that differ at all differ by hundreds of nats.
    """
    logits = jnp.asarray(logits, jnp.float32)
    temperature = jnp.maximum(jnp.asarray(temperature, jnp.float32), LEAST_TEMPERATURE)
    return logits / jnp.broadcast_to(temperature, logits.shape[:-1])[..., None]


def top_k(logits: Float[Array, "*B V"], k: PerRowCount) -> Float[Array, "*B V"]:
    """Keep exactly the k largest logits of each row, −∞ elsewhere; k = 0 keeps all.

    Of equal logits the lower ids win. Source: Fan et al. 2018.
    """
    return _truncate(logits, k, 1.0)


def top_p(logits: Float[Array, "*B V"], p: PerRow) -> Float[Array, "*B V"]:
    """Keep the fewest largest logits of each row whose probabilities sum to at least p, −∞ elsewhere; p = 1 keeps all.

    At least one token stays, also at p = 0. Source: Holtzman et al. 2020.
    """
    return _truncate(logits, 0, p)


def filter_logits(
    logits: Float[Array, "*B V"],
    temperature: PerRow = 1.0,
    top_k: PerRowCount = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
) -> Float[Array, "*B V"]:
    """Temperature, then top-k, then top-p over what top-k left, then min-p; each one scalar or one value per row."""
    filtered = _truncate(apply_temperature(logits, temperature), top_k, top_p)
    return filtered if isinstance(min_p, (int, float)) and min_p <= 0 else _above(filtered, min_p)


def min_p(logits: Float[Array, "*B V"], p: PerRow) -> Float[Array, "*B V"]:
    """Keep the tokens at least p times as probable as the likeliest of their row, −∞ elsewhere; p = 0 keeps all.

    Source: Nguyen et al. 2024, eq. 3.
    """
    return _above(jnp.asarray(logits, jnp.float32), p)


def _above(logits: Float[Array, "*B V"], p: PerRow) -> Float[Array, "*B V"]:
    # p_v >= p · p_max is z_v >= z_max + log p, so neither a sum nor a sort is needed.
    bound = jnp.log(jnp.broadcast_to(jnp.asarray(p, jnp.float32), logits.shape[:-1]))[..., None]
    return jnp.where(logits >= logits.max(axis=-1, keepdims=True) + bound, logits, -jnp.inf)


def _truncate(logits: Float[Array, "*B V"], k: PerRowCount, p: PerRow) -> Float[Array, "*B V"]:
    logits = jnp.asarray(logits, jnp.float32)
    if isinstance(k, int) and k == 0 and isinstance(p, (int, float)) and p >= 1:
        return logits  # no sort in the compiled program when both are known to be off
    if not isinstance(k, int) and logits.shape[-1] > _CANDIDATES:
        return _truncate_rows(logits, k, p)
    per_row = logits.shape[:-1]
    counts = jnp.broadcast_to(jnp.asarray(k, jnp.int32), per_row)[..., None]
    shares = jnp.broadcast_to(jnp.asarray(p, jnp.float32), per_row)[..., None]
    # The whole vocabulary is sorted only where nothing says how many tokens can stay.
    return _truncate_sorted(logits, counts, shares, k if isinstance(k, int) and 0 < k < logits.shape[-1] else None)


def _truncate_sorted(
    logits: Float[Array, "*B V"], k: Int[Array, "*B 1"], p: Float[Array, "*B 1"], bound: int | None = None
) -> Float[Array, "*B V"]:
    """`_truncate` by the order of all logits, or of the `bound` largest where no row keeps more."""
    if bound is None:
        order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
        descending = jnp.take_along_axis(logits, order, axis=-1)
    else:
        descending, order = jax.lax.top_k(logits, bound)
    place = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    keep = (k <= 0) | (place < k)
    mass = jnp.cumsum(jax.nn.softmax(jnp.where(keep, descending, -jnp.inf), axis=-1), axis=-1)
    mass_before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
    # p >= 1 is tested by itself because a rounded cumulative sum reaches 1 before the last token.
    keep &= (p >= 1) | (place == 0) | (mass_before < p)

    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, keep, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def _truncate_rows(logits: Float[Array, "*B V"], k: PerRowCount, p: PerRow) -> Float[Array, "*B V"]:
    """`_truncate` by settings of each row that only a run knows: it sorts a vocabulary where a row asks for it alone.

    A row is read off its `_CANDIDATES` likeliest tokens if what it keeps is among them, whatever the others ask for.
    """
    count, per_row = logits.shape[-1], logits.shape[:-1]
    k, p = jnp.broadcast_to(jnp.asarray(k, jnp.int32), per_row), jnp.broadcast_to(jnp.asarray(p, jnp.float32), per_row)
    k = jnp.where((k <= 0) | (k > count), count, k)[..., None]
    p = p[..., None]
    descending, order = jax.lax.top_k(logits, _CANDIDATES)
    place = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    among = jnp.where(place < k, descending, -jnp.inf)
    # Top-p counts shares of what top-k leaves: of the candidates where k is as small, else of the whole row.
    total = jnp.where(k <= _CANDIDATES, *(jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (among, logits)))
    mass = jnp.cumsum(jnp.exp(among - total), axis=-1)
    mass_before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
    keep = (place < k) & ((p >= 1) | (place == 0) | (mass_before < p))
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, keep, axis=-1, inplace=False)
    whole = (k == count) & (p >= 1)
    enough = whole | (k <= _CANDIDATES) | ((k == count) & (mass[..., -1:] >= p))
    found = jnp.where(kept | whole, logits, -jnp.inf)

    def with_sorted() -> Float[Array, "*B V"]:
        return jnp.where(enough, found, _truncate_sorted(logits, k, p))

    return jax.lax.cond(enough.all(), lambda: found, with_sorted)
