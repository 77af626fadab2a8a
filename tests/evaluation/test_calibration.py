"""Calibration on simulated people whose preferences follow Bradley–Terry, and on pairs worked by hand."""

import numpy as np
import pytest

from rlhfjax.evaluation.calibration import calibration
from rlhfjax.evaluation.pairwise import RatedTexts


def people(seed=0, batches=150, size=2, labelers=40):
    """Scores, and pairs that labelers prefer with σ(score difference): one of two ratings is higher."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=batches * size) * 1.3
    ratings = []
    for a, b in scores.reshape(batches, size):
        first = draw.random(labelers) < 1.0 / (1.0 + np.exp(b - a))
        ratings += [first.astype(int), (~first).astype(int)]
    held = np.ones(labelers, bool)
    return scores, RatedTexts.from_rows(ratings, np.repeat(np.arange(batches), size), [held] * len(scores))


# fails when the gain is left out, when the slope's sign is turned, and when bins are not weighed by pairs: seen
def test_log_odds_are_calibrated_and_scaled_ones_are_not():
    scores, texts = people()
    good = calibration(scores, texts)
    assert good.slope == pytest.approx(1.0, abs=0.06)
    assert good.error < 0.02
    assert sum(good.pairs) == 150 * 40
    loud = calibration(3.0 * scores, texts)
    assert loud.slope == pytest.approx(good.slope / 3.0, rel=1e-3)
    assert loud.error > 0.08
    same = calibration(3.0 * scores + 7.0, texts, gain=3.0)
    assert (same.slope, same.error) == pytest.approx((good.slope, good.error), rel=1e-6)


def test_a_pair_by_hand():
    texts = RatedTexts.from_rows([[3, 1, 5], [1, 2, 5]], [0, 0], [[True, True, True]] * 2)
    made = calibration([np.log(4.0), 0.0], texts)  # σ(log 4) = .8; one of two agrees, the tie does not count
    assert made.predicted == pytest.approx([0.8])
    assert made.observed == [0.5]
    assert made.pairs == [2]
    assert made.error == pytest.approx(0.3)
    assert made.slope == pytest.approx(0.0, abs=1e-9)


def test_scores_that_tie_say_one_half_and_are_right():
    made = calibration([2.0, 2.0], RatedTexts.from_rows([[3], [1]], [0, 0], [[True]] * 2))
    assert (made.predicted, made.observed, made.error) == ([0.5], [0.5], 0.0)


def test_only_held_out_labelers_count():
    texts = RatedTexts.from_rows([[3, 1], [1, 2]], [0, 0], [[True, False]] * 2)
    assert calibration([1.0, 0.0], texts).pairs == [1]
    assert calibration([1.0, 0.0], RatedTexts.from_rows([[3], [1]], [0, 0], [[False]] * 2)) is None
