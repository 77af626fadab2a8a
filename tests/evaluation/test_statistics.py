"""Intervals against scipy and the normal approximation; win rates by hand."""

import numpy as np
import pytest
from scipy import stats

from rlhfjax.errors import DataError
from rlhfjax.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    jackknife_interval,
    percentile_interval,
    ratio_interval,
    win_rate,
)


def test_interval_of_the_mean_is_that_of_scipy():
    values = np.random.default_rng(1).exponential(2.0, 200)
    ours = bootstrap_interval(values, resamples=4000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    spread = values.std() / np.sqrt(values.size)
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.15 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.15 * spread)


def test_interval_of_another_statistic_and_level_is_that_of_scipy():
    values = np.random.default_rng(2).normal(3.0, 1.0, 101)
    ours = bootstrap_interval(values, np.median, level=0.8, resamples=4000)
    theirs = stats.bootstrap(
        (values,), np.median, n_resamples=4000, confidence_level=0.8, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.estimate == np.median(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_clustered_values_have_a_wider_interval_as_theory_says():
    """20 groups of 25 equal values: 20 observations, so √25 times the width that counting 500 would give."""
    groups = np.repeat(np.arange(20), 25)
    values = np.random.default_rng(3).normal(size=20)[groups]
    alone, clustered = bootstrap_interval(values), bootstrap_interval(values, groups=groups)
    assert clustered.estimate == alone.estimate
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(5.0, rel=0.1)


def test_groups_of_one_are_no_groups_and_ids_may_be_unsorted_texts():
    values = np.random.default_rng(4).normal(size=60)
    alone = bootstrap_interval(values)
    singles = bootstrap_interval(values, groups=[f"id{i}" for i in np.random.default_rng(0).permutation(60)])
    assert singles.high - singles.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_unequal_groups_stay_whole():
    """Groups (0) and (1, 1, 1): the mean is 0, 3/4 or 1, so no resample lies elsewhere."""
    seen = []
    bootstrap_interval(
        [1, 0, 1, 1], lambda x: seen.append(x.mean()) or x.mean(), resamples=200, groups=["b", "a", "b", "b"]
    )
    assert set(seen) == {0.0, 0.75, 1.0}


def test_seed_repeats_and_matters():
    values = np.random.default_rng(5).normal(size=30)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_percentiles_leave_out_resamples_without_a_value():
    assert percentile_interval(2.0, np.array([np.nan, 0.0, 1.0, 2.0, 3.0, 4.0]), 0.5) == Interval(2.0, 1.0, 3.0)
    assert np.isnan(percentile_interval(2.0, np.array([np.nan]), 0.5).low)


def test_win_rate_by_hand():
    """Two wins, one loss, one tie of four: (2 + ½) / 4."""
    assert win_rate([1.0, 2.0, 0.0, 3.0], [0.0, 1.0, 5.0, 3.0]).estimate == 0.625


def test_win_rate_interval_is_near_the_binomial_one():
    wins = np.repeat([1.0, 0.0], [70, 30])
    interval = win_rate(wins, 1.0 - wins)
    exact = stats.binomtest(70, 100).proportion_ci(0.95, "wilson")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high), abs=0.02)


def test_win_rate_draws_prompts_when_a_prompt_has_several_pairs():
    wins, prompts = np.repeat(np.arange(30) % 2, 8).astype(float), np.repeat(np.arange(30), 8)
    alone, grouped = win_rate(wins, 1.0 - wins), win_rate(wins, 1.0 - wins, prompts)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bootstrap_interval([]), "at least one value"),
        (lambda: bootstrap_interval([1.0], groups=[1, 2]), "one group id"),
        (lambda: bootstrap_interval([1.0], level=95), "confidence level"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "one length"),
        (lambda: win_rate([float("nan")], [1.0]), "NaN"),
        (lambda: win_rate([], []), "at least one value"),
    ],
)
def test_wrong_input_is_named(call, said):
    with pytest.raises(DataError, match=said):
        call()


def test_a_ratio_and_its_interval_are_those_of_the_plain_bootstrap():
    """Group sums drawn by their counts against whole rows drawn one resample at a time."""
    rng = np.random.default_rng(3)
    above, below, groups = rng.normal(2, 1, 60), rng.integers(1, 9, 60), np.repeat(np.arange(20), 3)
    rows = np.stack([above, below], axis=1)
    plain = bootstrap_interval(rows, lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum(), resamples=4000, groups=groups)
    found = ratio_interval(above, below, groups, resamples=4000)
    assert found.estimate == pytest.approx(plain.estimate)
    assert found == pytest.approx(plain, rel=0.03)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """θ₍ᵢ₎ = (Σ − xᵢ)/(n − 1) gives s/√n exactly (Efron and Tibshirani 1993, section 11.2)."""
    values = np.array([1.0, 4.0, 2.0, 7.0, 1.0])
    without = (values.sum() - values) / 4
    reach = 1.959964 * values.std(ddof=1) / np.sqrt(5)
    assert jackknife_interval(3.0, without) == pytest.approx((3.0, 3.0 - reach, 3.0 + reach), rel=1e-6)
    assert np.isnan(jackknife_interval(1.0, [1.0]).low)
