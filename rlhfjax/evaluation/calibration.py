"""Calibration: a reward model's differences should be what its loss makes them, log-odds of what people prefer."""

import numpy as np
from numpy.typing import ArrayLike

from rlhfjax.evaluation.pairwise import RatedTexts
from rlhfjax.evaluation.results import Calibration

_BINS = np.linspace(0.5, 1.0, 11)


def calibration(scores: ArrayLike, texts: RatedTexts, gain: float = 1.0) -> Calibration | None:
    """σ(|r_a − r_b| / gain) against how often held-out labelers agree, over pairs of one batch.

    `gain` is what the scores were multiplied with after training. A tie of the scores says one half and counts as one
    half. The error is the mean distance of a bin's mean prediction from the share that agrees, weighted by pairs
    (Naeini et al. 2015); the slope is the k at which σ(k · |r_a − r_b| / gain) is most likely (1 is calibrated, below
    1 overconfident). None without such pairs.
    """
    differences, agreed = _held_out_pairs(np.asarray(scores, np.float64) / gain, texts)
    if not differences.size:
        return None
    predicted = 1.0 / (1.0 + np.exp(-differences))
    place = np.clip(np.digitize(predicted, _BINS) - 1, 0, len(_BINS) - 2)
    kept = [np.flatnonzero(place == b) for b in range(len(_BINS) - 1) if (place == b).any()]
    means = [float(predicted[rows].mean()) for rows in kept]
    shares = [float(agreed[rows].mean()) for rows in kept]
    counts = [len(rows) for rows in kept]
    error = sum(n * abs(p - o) for n, p, o in zip(counts, means, shares, strict=True)) / len(predicted)
    return Calibration(error, _slope(differences, agreed), means, shares, counts)


def _held_out_pairs(scores: np.ndarray, texts: RatedTexts) -> tuple[np.ndarray, np.ndarray]:
    """|r_a − r_b| and whether the labeler agrees (1, 0; ½ where the scores tie), for every pair that one told apart."""
    columns = np.where(texts.heldout, texts.ratings, np.nan)
    differences, agreed = [], []
    for rows in texts.members():
        first, second = np.triu_indices(len(rows), 1)
        delta = (scores[rows[first]] - scores[rows[second]])[:, None]
        rated = columns[rows[first]] - columns[rows[second]]
        told = np.abs(rated) > 0  # false for NaN
        differences.append(np.broadcast_to(np.abs(delta), rated.shape)[told])
        agreed.append(((1.0 + np.sign(delta) * np.sign(rated)) / 2.0)[told])
    return np.concatenate(differences), np.concatenate(agreed)


def _slope(differences: np.ndarray, agreed: np.ndarray, steps: int = 25) -> float:
    """Newton's method on the log-likelihood of one coefficient, which is concave."""
    k = 0.0
    for _ in range(steps):
        p = 1.0 / (1.0 + np.exp(-k * differences))
        curvature = (differences**2 * p * (1.0 - p)).sum()
        if curvature < 1e-12:
            break
        k += ((agreed - p) * differences).sum() / curvature
    return float(k)
