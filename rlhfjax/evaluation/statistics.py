"""Estimates with their uncertainty: percentile bootstrap intervals and paired win rates.

A figure of an evaluation is never shown without its interval. Observations that share a labeler, a batch or a prompt
are not independent, so every function takes the groups that are resampled whole (the cluster bootstrap).
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from rlhfjax.errors import DataError


class Interval(NamedTuple):
    """A point estimate and the two ends of its confidence interval, all in the unit of the estimate."""

    estimate: float
    low: float
    high: float


def percentile_interval(estimate: float, resampled: Float[np.ndarray, "R"], level: float) -> Interval:
    """The central `level` share of the resampled statistics around an estimate.

    `[q((1 − level) / 2), q((1 + level) / 2)]`, resamples without a value (NaN) left out. Raises DataError unless
    `0 < level < 1`. Source: Efron 1979, the percentile method.
    """
    if not 0.0 < level < 1.0:
        raise DataError(f"expected a confidence level between 0 and 1, got {level}; 0.95 is usual")
    resampled = resampled[~np.isnan(resampled)]
    if resampled.size == 0:
        return Interval(float(estimate), float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(float(estimate), float(low), float(high))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], Any] = np.mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Interval:
    """The statistic of the values and its percentile bootstrap interval.

    Draws the N values with replacement `resamples` times. With `groups` (one id per value) whole groups are drawn,
    which keeps values of one group together and widens the interval when they are alike. Rows are drawn when
    `values` has more than one axis. Raises DataError on no values, or on groups of another length.
    Source: Efron 1979; Davison and Hinkley 1997, section 3.8 for groups.
    """
    array = np.asarray(values)
    if array.ndim == 0 or len(array) == 0:
        raise DataError("expected at least one value to bootstrap, got none")
    rng = np.random.default_rng(seed)
    members = _members(np.arange(len(array)) if groups is None else np.asarray(groups), len(array))
    resampled = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, len(members), len(members))
        rows = drawn if groups is None else np.concatenate([members[g] for g in drawn])
        resampled[i] = statistic(array[rows])
    return percentile_interval(float(statistic(array)), resampled, level)


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`Σ numerators / Σ denominators` (a mean, without denominators) and its percentile bootstrap interval.

    Draws whole `groups` (one id per value; each value by itself without them). Raises DataError on no values, or on
    groups of another length. Source: as `bootstrap_interval`.
    """
    above = np.asarray(numerators, np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, np.float64)
    if above.ndim != 1 or not above.size or above.shape != below.shape:
        raise DataError(f"expected values and as many denominators, got shapes {above.shape} and {below.shape}")
    members = _members(np.arange(above.size) if groups is None else np.asarray(groups), above.size)
    sums = np.array([[above[rows].sum(), below[rows].sum()] for rows in members])
    # How often each group is drawn says as much as which: all resamples of a sum are then one matrix product.
    drawn = np.random.default_rng(seed).multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    top, bottom = (drawn @ sums).T
    shares = np.divide(top, bottom, out=np.full(resamples, np.nan), where=bottom != 0)
    return percentile_interval(above.sum() / below.sum() if below.sum() else float("nan"), shares, level)


def jackknife_interval(estimate: float, left_out: ArrayLike, level: float = 0.95) -> Interval:
    """A statistic and its normal interval, from its values with one observation left out at a time.

    `estimate ± z √((n − 1)/n Σ (θ₍ᵢ₎ − θ̄)²)`. For counts of different things, which a bootstrap would understate: its
    draws repeat observations, and what is repeated is not different. Source: Efron and Tibshirani 1993, section 11.5.
    """
    values = np.asarray(left_out, np.float64)
    if values.size < 2:
        return Interval(float(estimate), float("nan"), float("nan"))
    error = np.sqrt((values.size - 1) / values.size * ((values - values.mean()) ** 2).sum())
    reach = NormalDist().inv_cdf(0.5 + level / 2) * error
    return Interval(float(estimate), float(estimate - reach), float(estimate + reach))


def win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    prompts: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """How often A scores above B on the same prompt; a tie counts one half.

    `mean(1[a > b] + ½·1[a = b])` over pairs, in [0, 1]. Element i of both arrays answers the same prompt. When a prompt
    has several pairs, `prompts` gives their prompt ids and the bootstrap draws prompts. Raises DataError when the two
    are not equally long, are empty, or hold a score that is not a number.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"expected two lists of scores of one length, got shapes {a.shape} and {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise DataError("expected scores that are numbers, got NaN; check the judge on the empty response")
    return bootstrap_interval((np.sign(a - b) + 1.0) / 2.0, np.mean, level, resamples, seed, prompts)


def _members(groups: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each group, groups in the order of their ids."""
    if groups.shape != (count,):
        raise DataError(f"expected one group id for each of the {count} values, got shape {groups.shape}")
    _, inverse = np.unique(groups, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
