"""Pairwise accuracy of scorers and of people against double loops over every pair, and by hand."""

from itertools import combinations

import numpy as np
import pytest

from rlhfjax.errors import DataError
from rlhfjax.evaluation.pairwise import RatedTexts, crowd_agreement, human_agreement, pairwise_accuracy

SCORES = np.random.default_rng(7).normal(size=24).round(1)  # rounded, so that some scores tie


def ragged_texts(seed: int = 0) -> RatedTexts:
    """Four unsorted batches of 6 texts with 3, 4, 5 and 6 labelers; every third column held out."""
    rng = np.random.default_rng(seed)
    batches = rng.permutation(np.repeat([3, 0, 7, 5], 6))
    count = {3: 3, 0: 4, 7: 5, 5: 6}
    ratings = [list(rng.integers(-2, 3, count[b])) for b in batches]
    return RatedTexts.from_rows(ratings, batches, [[j % 3 == 2 for j in range(len(r))] for r in ratings])


def agreement(predicted: float, wanted: float) -> float:
    return 0.5 if predicted == 0 else float((predicted > 0) == (wanted > 0))


def by_loops(texts: RatedTexts, against: str, pairs: str, min_difference: float) -> float:
    """Every pair of texts, every column, one at a time."""
    points = []
    for a, b in combinations(range(len(texts.batches)), 2):
        if (texts.batches[a] == texts.batches[b]) != (pairs == "within"):
            continue
        if against == "mean":
            wanted = [np.nanmean(texts.ratings[a]) - np.nanmean(texts.ratings[b])]
        else:
            columns = [j for j in range(texts.ratings.shape[1]) if against == "labelers" or texts.heldout[a, j]]
            wanted = [texts.ratings[a, j] - texts.ratings[b, j] for j in columns]
        points += [agreement(SCORES[a] - SCORES[b], w) for w in wanted if abs(w) > min_difference]
    return float(np.mean(points))


@pytest.mark.parametrize("min_difference", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("against", "pairs"), [("heldout", "within"), ("labelers", "within"), ("mean", "within"), ("mean", "across")]
)
def test_accuracy_is_that_of_the_loops(against, pairs, min_difference):
    for seed in range(3):
        texts = ragged_texts(seed)
        found = pairwise_accuracy(SCORES, texts, against, pairs, min_difference, resamples=50)
        assert found is not None
        assert found.estimate == pytest.approx(by_loops(texts, against, pairs, min_difference))
        assert found.low <= found.estimate <= found.high


def test_accuracy_by_hand():
    """One labeler says a > b, a > c, b = c; scores a > b, a = c: one right, one tie, b and c not asked."""
    texts = RatedTexts.from_rows([[2], [1], [1]], [0, 0, 0])
    assert pairwise_accuracy([1.0, 0.0, 1.0], texts, "labelers").estimate == 0.75


def test_held_out_means_held_out():
    """The scorer follows the training labeler; the held-out one always disagrees."""
    texts = RatedTexts.from_rows([[1, 5], [2, 4], [3, 3]], [0, 0, 0], [[False, True]] * 3)
    assert pairwise_accuracy([1, 2, 3], texts, "heldout").estimate == 0.0
    assert pairwise_accuracy([1, 2, 3], texts, "labelers").estimate == 0.5


def test_ranked_comparisons_are_rated_texts():
    """Ranks 1, 2, 2: two pairs, one right. Ranks 2, 1: wrong. One of three; pairs between comparisons do not count."""
    texts = RatedTexts.from_comparisons([[1, 2, 2], [2, 1]])
    assert pairwise_accuracy([5.0, 9.0, 1.0, 3.0, 2.0], texts, "labelers").estimate == pytest.approx(1 / 3)


def test_interval_draws_batches():
    """In half of the batches the scorer is always right, in half always wrong: the interval is that of 20 coin flips,
    not that of 20 × 45 pairs."""
    batches = np.repeat(np.arange(20), 10)
    order = np.tile(np.arange(10.0), 20)
    texts = RatedTexts.from_rows(order[:, None], batches)
    interval = pairwise_accuracy(order * np.where(batches % 2, 1, -1), texts, "labelers")
    assert interval.estimate == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(20), rel=0.1)


def test_interval_across_batches_draws_batches_too():
    """The estimate of every resample is the count over drawn pairs of batches, each as often as both were drawn."""
    texts = ragged_texts()
    interval = pairwise_accuracy(SCORES, texts, "mean", "across", resamples=4000)
    means, ids, rng, found = texts.means, np.unique(texts.batches), np.random.default_rng(11), []
    for _ in range(300):
        drawn = rng.choice(ids, ids.size)
        right = [
            agreement(SCORES[a] - SCORES[b], means[a] - means[b])
            for g, h in combinations(drawn, 2)
            if g != h
            for a in np.flatnonzero(texts.batches == g)
            for b in np.flatnonzero(texts.batches == h)
            if means[a] != means[b]
        ]
        if right:
            found.append(np.mean(right))
    assert interval.high - interval.low == pytest.approx(np.subtract(*np.quantile(found, [0.975, 0.025])), rel=0.2)


def people_by_loops(texts: RatedTexts, clear: float) -> list[float]:
    """One labeler as the scorer: for each held-out other, for the mean of the others, where that is clear, across;
    and the mean of the others as the scorer, for each held-out labeler."""
    one, mean, distinct, across, crowd = [], [], [], [], []
    ratings = texts.ratings
    for a, b in combinations(range(len(texts.batches)), 2):
        same = texts.batches[a] == texts.batches[b]
        for j in range(ratings.shape[1]):
            ours = ratings[a, j] - ratings[b, j]
            if np.isnan(ours):
                continue
            others = np.nanmean(np.delete(ratings[a], j)) - np.nanmean(np.delete(ratings[b], j))
            if same:
                mean += [agreement(ours, others)] if abs(others) > 0 else []
                distinct += [agreement(ours, others)] if abs(others) > clear else []
                for k in range(ratings.shape[1]):
                    theirs = ratings[a, k] - ratings[b, k]
                    one += [agreement(ours, theirs)] if k != j and texts.heldout[a, k] and abs(theirs) > 0 else []
                crowd += [agreement(others, ours)] if texts.heldout[a, j] and ours else []
            else:
                across += [agreement(ours, others)] if abs(others) > clear else []
    return [float(np.mean(points)) for points in (one, mean, distinct, across, crowd)]


def test_people_are_measured_as_the_loops_do():
    for seed in range(3):
        texts = ragged_texts(seed)
        found = [*human_agreement(texts, 0.5, resamples=20), crowd_agreement(texts, resamples=20)]
        assert [interval.estimate for interval in found if interval] == pytest.approx(people_by_loops(texts, 0.5))


def test_people_by_hand():
    """The held-out third labeler says b > a; 1 says a > b, and 2 holds them equal: wrong, and one half. The others of 1
    hold a at 1 and b at 2.5, of 2 a at 1 and b at 1.5, of 3 a at 2 and b at 1: wrong, one half, wrong. The mean of the
    others of 3 is wrong, too."""
    texts = RatedTexts.from_rows([[2, 2, 0], [0, 2, 3]], [0, 0], [[False, False, True]] * 2)
    people = human_agreement(texts)
    assert people.labeler is not None
    assert people.labeler.estimate == 0.25
    assert people.mean is not None
    assert people.mean.estimate == pytest.approx(1 / 6)
    assert people.across is None
    assert crowd_agreement(texts).estimate == 0.0


def test_a_labeler_is_asked_what_a_scorer_is_asked():
    """With one labeler beside a held-out one, that labeler's row is the accuracy of their ratings as scores."""
    rng = np.random.default_rng(1)
    ratings, batches = rng.integers(0, 4, (12, 2)), np.repeat([0, 1], 6)
    texts = RatedTexts.from_rows(ratings, batches, [[False, True]] * 12)
    scorer = pairwise_accuracy(ratings[:, 0], texts, "heldout")
    assert human_agreement(texts).labeler == scorer == crowd_agreement(texts)


def test_people_who_agree_reach_one_and_a_single_labeler_nothing():
    same = RatedTexts.from_rows(
        np.repeat(np.arange(8.0)[:, None], 3, axis=1), np.repeat([0, 1], 4), [[False, False, True]] * 8
    )
    assert [interval.estimate for interval in human_agreement(same) if interval] == [1.0] * 4
    assert list(human_agreement(RatedTexts.from_rows([[1], [2]], [0, 0]))) == [None] * 4
    assert crowd_agreement(RatedTexts.from_rows([[1], [2]], [0, 0], [[True]] * 2)) is None


def test_no_pair_is_none():
    ties = RatedTexts.from_rows([[1], [1]], [0, 0], [[True], [True]])
    assert pairwise_accuracy([1.0, 2.0], ties) is None
    assert pairwise_accuracy([1.0, 2.0], RatedTexts.from_rows([[1], [2]], [0, 0])) is None  # nobody held out


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pairwise_accuracy([1.0], ragged_texts()), "24 scores"),
        (lambda: pairwise_accuracy(np.full(24, np.nan), ragged_texts()), "24 NaN"),
        (lambda: pairwise_accuracy(SCORES, ragged_texts(), "heldout", "across"), "no labeler saw both"),
        (lambda: RatedTexts.from_rows([[1], [2]], [0]), "one batch"),
        (lambda: RatedTexts.from_rows([[1], []], [0, 0]), "none for text 1"),
        (lambda: RatedTexts.from_rows([[1, 2]], [0], [[True]]), "text 0"),
    ],
)
def test_wrong_input_is_named(call, said):
    with pytest.raises(DataError, match=said):
        call()
