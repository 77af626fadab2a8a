"""The rows of an evaluation, by hand on toy data and on the real ratings where they are prepared."""

import numpy as np
import pytest

from rlhfjax.errors import DataError
from rlhfjax.evaluation.judges import Judge, fit_ridge_judge, tfidf_ridge_baseline, vader_judge
from rlhfjax.evaluation.pairwise import RatedTexts
from rlhfjax.evaluation.rows import MEASURES, accuracy_row, comparison_row, human_rows, policy_row, win_row

LENGTH = Judge("length", "characters", lambda texts: [len(text) for text in texts])


def toy_texts() -> RatedTexts:
    """Two batches of two texts: means 1 and 0 (training labeler), the held-out labeler the other way round, weakly."""
    ratings = [[3, 0], [0, 1], [4, 4], [0, 0]]
    return RatedTexts.from_rows(ratings, [0, 0, 1, 1], [[False, True]] * 4)


def test_accuracy_row_by_hand():
    """Scores order both batches as the means do. Held-out labeler: against in batch 0, with in batch 1. Means 1.5, .5,
    4, 0: clear pairs across batches are 1.5–4 (wrong), 1.5–0 (right), .5–4 (wrong); .5–0 is not over 0.5 apart."""
    row = accuracy_row("model", [3.0, 2.0, 1.0, 0.0], toy_texts())
    estimates = {measure: interval.estimate for measure, interval in row.values.items() if interval}
    assert estimates == {
        "within_heldout": 0.5,
        "within_mean": 1.0,
        "within_clear": 1.0,
        "across_clear": pytest.approx(1 / 3),
    }
    assert set(row.values) <= set(MEASURES)


def test_human_rows_by_hand():
    """Labeler 1 trains, 2 is held out. Batch 0: they disagree. Batch 1: 2 ties, so 1 is not asked, but 2 is, by 1."""
    texts = RatedTexts.from_rows([[3, 0], [0, 1], [4, 4], [0, 4]], [0, 0, 1, 1], [[False, True]] * 4)
    one, others = human_rows(texts)
    assert one.values.keys() == accuracy_row("model", [1, 2, 3, 4], texts).values.keys()
    assert one.values["within_heldout"].estimate == others.values["within_heldout"].estimate == 0.0
    assert one.values["within_mean"].estimate == one.values["within_clear"].estimate == pytest.approx(0.5 / 3)
    # labeler 1 as scorer, by labeler 2: 3-4 right, 3-0 wrong, 0-4 right, 0-0 a tie; labeler 2 by 1: 0-4 right for 3<4,
    # 0-4 wrong for 3>0, 1-4 right for 0<4, and 0, 0 is not asked
    assert one.values["across_clear"].estimate == pytest.approx((1 + 0 + 1 + 0.5 + 1 + 0 + 1) / 7)
    assert others.values.keys() == {"within_heldout"}


def test_every_measure_of_people_stands_under_its_own_name():
    """Labelers who agree but for one who ties two texts close together: only the clear pairs are all right."""
    ratings = [[0.0, 0, 0.0], [0.3, 0, 0.3], [2, 2, 2], [3, 3, 3]]
    values = human_rows(RatedTexts.from_rows(ratings, [0, 0, 0, 1], [[False, False, True]] * 4))[0].values
    assert values["within_heldout"].estimate == pytest.approx(1 - 0.5 / 6)  # one labeler of two ties one of three pairs
    assert values["within_mean"].estimate == pytest.approx(1 - 0.5 / 9)  # and one of three, as they score
    assert values["within_clear"].estimate == values["across_clear"].estimate == 1.0


def test_measures_without_pairs_are_none():
    row = accuracy_row("model", [1.0, 2.0], RatedTexts.from_rows([[1], [2]], [0, 0]))
    assert row.values["within_heldout"] is None
    assert row.values["across_clear"] is None
    assert row.values["within_mean"].estimate == 1.0


def test_comparison_row():
    row = comparison_row("model", [2.0, 1.0, 1.0, 2.0], [[1, 2], [1, 2]])
    assert row.values["comparisons"].estimate == 0.5


def test_comparisons_of_one_prompt_are_drawn_together():
    """Prompt x three times right, prompt y twice wrong: resamples are x alone, y alone or both, so 0 to 1."""
    ranks, prompts = [[1, 2]] * 5, ["x", "y", "x", "x", "y"]
    scores = [2.0, 1.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0]
    together = comparison_row("model", scores, ranks, prompts).values["comparisons"]
    assert (together.estimate, together.low, together.high) == (pytest.approx(0.6), 0.0, 1.0)
    apart = comparison_row("model", scores, ranks).values["comparisons"]
    assert comparison_row("model", scores, ranks, "abcde").values["comparisons"] == apart
    assert apart.low > 0.0


def test_responses_to_one_prompt_are_drawn_together():
    # fails where NumPy's texts are compared, which lose a NUL at the end
    row = win_row(LENGTH, "ppo", ["aa", "aa", "aa", "b"], "sft", ["a", "a", "a", "bb"], ["x", "x", "x", "x\0"])
    assert (row.win.estimate, row.win.low, row.win.high) == (0.75, 0.0, 1.0)


def test_win_row_by_hand():
    row = win_row(LENGTH, "ppo", ["long text", "a", "tie"], "sft", ["text", "ab", "two"])
    assert (row.judge, row.policy, row.baseline) == ("length", "ppo", "sft")
    assert row.win.estimate == 0.5
    assert row.ties == pytest.approx(1 / 3)
    assert (row.policy_mean, row.baseline_mean) == (pytest.approx(13 / 3), 3.0)


def test_policy_row_by_hand():
    row = policy_row("sft", [[1, 1, 1, 1], [2]], [True, False], kl=[0.25, 0.75], entropy=[8.0, 1.0])
    assert (row.length, row.distinct_1, row.distinct_2, row.eos_rate) == (2.5, 2 / 5, 1 / 3, 0.5)
    assert row.repetition == 0.5  # 111 twice in the first response
    assert (row.kl, row.entropy, row.reward) == (0.5, 9 / 5, None)  # a token, not a response
    # both draws of two prompts in four are mixed: the ends are those of one response twice
    assert row.intervals["length"] == (2.5, 1.0, 4.0)
    assert row.intervals["entropy"] == (9 / 5, 1.0, 2.0)
    assert "reward" not in row.intervals
    assert row.prompts is None
    assert policy_row("sft", [[1], [2], [3]], [True] * 3, prompts=["x", "y", "x"]).prompts == 2


def test_diversity_is_of_the_words_where_they_are_given():
    """One trigram of three comes again in a b a b a, two words of five are different; no token comes twice."""
    row = policy_row("sft", [[1, 2, 3, 4], [5]], [True, True], words=[list("ababa"), []])
    assert (row.repetition, row.distinct_1, row.distinct_2) == (1 / 3, 2 / 5, 2 / 4)
    assert row.length == 2.5


def test_intervals_of_a_policy_draw_prompts():
    """Eight copies of the responses to two prompts say no more than two responses do."""
    once = policy_row("sft", [[1, 2, 3], [1]], [True, False], prompts=["a", "b"])
    often = policy_row("sft", [[1, 2, 3], [1]] * 8, [True, False] * 8, prompts=["a", "b"] * 8)
    for figure in ("length", "eos_rate"):
        assert often.intervals[figure] == once.intervals[figure]


def test_wrong_input_is_named():
    with pytest.raises(DataError, match="a flag for each of 1"):
        policy_row("sft", [[1]], [True, False])
    with pytest.raises(DataError, match="one length"):
        win_row(LENGTH, "ppo", ["a"], "sft", ["a", "b"])


def test_real_ratings_give_the_known_accuracies():
    """Published figures for these ratings: TF-IDF ridge .64/.65/.71/.80, word list .61/.60/.66/.67.
    People, by the rule of the scorers: .719/.732/.813/.891, the mean of the others .832."""
    data = pytest.importorskip("rlhfjax.data.datasets")
    try:
        splits = {
            split: [source[i] for i in range(len(source))]
            for split in ("rm", "judge", "test")
            for source in [data.open_source("movies/ratings", split, data.default_data_dir())]
        }
    except DataError:
        pytest.skip("the movies dataset is not prepared on this machine")
    test, rm = splits["test"], splits["rm"]
    texts = [row["text"] for row in test]
    rated = RatedTexts.from_rows(*([row[key] for row in test] for key in ("ratings", "batch", "heldout")))
    judged = splits["judge"]
    judge = fit_ridge_judge([row["text"] for row in judged], [np.mean(row["ratings"]) for row in judged])
    baseline = tfidf_ridge_baseline([row["text"] for row in rm], [row["mean_train"] for row in rm])
    expected = {
        baseline: (0.645, 0.655, 0.71, 0.80),
        judge: (0.635, 0.645, 0.70, 0.785),
        vader_judge(): (0.61, 0.61, 0.66, 0.67),
    }
    for scorer, figures in expected.items():
        row = accuracy_row(scorer.name, scorer(texts), rated)
        assert [v.estimate for v in row.values.values() if v] == pytest.approx(figures, abs=0.02), scorer.name
    one, others = (row.values for row in human_rows(rated))
    assert [v.estimate for v in one.values() if v] == pytest.approx((0.719, 0.732, 0.813, 0.891), abs=0.001)
    assert others["within_heldout"].estimate == pytest.approx(0.832, abs=0.001)
