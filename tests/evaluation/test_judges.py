"""Judges on a made-up corpus whose right answer is known, and on the real ratings where they are prepared."""

import sys

import numpy as np
import pytest
from scipy import stats

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.evaluation.judges import Judge, fit_ridge_judge, tfidf_ridge_baseline, vader_judge

WORTH = {"superb": 2.0, "warm": 1.0, "slow": -1.0, "dreadful": -2.0}
FILLER = ["a", "the", "film", "story", "of", "with", "and", "its", "cast", "scene", "music", "plot", "hero", "tale"]


def corpus(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Sentences of filler with two words of known worth; the rating is their sum and a little noise."""
    rng = np.random.default_rng(seed)
    texts, ratings = [], []
    for _ in range(count):
        chosen = list(rng.choice(list(WORTH), 2))
        words = [*rng.choice(FILLER, 8), *chosen]
        texts.append(" ".join(rng.permutation(words)))
        ratings.append(sum(WORTH[word] for word in chosen) + rng.normal(0, 0.3))
    return texts, np.array(ratings)


@pytest.mark.parametrize("fit", [fit_ridge_judge, tfidf_ridge_baseline])
def test_ridge_learns_which_words_are_worth_what(fit):
    judge = fit(*corpus(300, 0))
    texts, ratings = corpus(200, 1)
    scores = judge(texts)
    assert scores.shape == (200,)
    assert stats.spearmanr(scores, ratings).statistic > 0.95
    assert np.abs(scores - ratings).mean() < 0.6  # in rating points, not only in the right order
    good, bad, unknown = judge(["a superb film", "a dreadful film", "zzz"])
    assert bad < unknown < good


def test_ridge_reads_parts_of_words():
    """'superbly' is in no training text; its character n-grams are those of 'superb'."""
    judge = fit_ridge_judge(*corpus(300, 0))
    better, worse = judge(["superbly", "dreadfully"])
    assert better > worse + 1.0


def test_ridge_is_a_function_of_its_data_and_seed():
    """Ratings without meaning leave the choice of α to the shuffle: seeds differ, the same seed does not."""
    texts, ratings = corpus(16, 0)
    ratings = np.random.default_rng(9).permutation(ratings)
    probe = corpus(20, 2)[0]
    by_seed = [[tuple(fit_ridge_judge(texts, ratings, seed)(probe)) for _ in range(2)] for seed in range(8)]
    assert all(first == again for first, again in by_seed)
    assert len({first for first, _ in by_seed}) > 1


def test_regularisation_is_chosen_by_the_data():
    """Ratings that have nothing to do with the texts are shrunk to their mean; with a meaning they are not."""
    texts, ratings = corpus(300, 0)
    noise = np.random.default_rng(9).permutation(ratings)
    probe = corpus(100, 1)[0]
    assert fit_ridge_judge(texts, noise)(probe).std() < 0.6 * fit_ridge_judge(texts, ratings)(probe).std()


def test_vader_orders_plain_words():
    judge = vader_judge()
    best, good, plain, bad = judge(["An excellent, wonderful film!", "a good film", "a film", "a terrible film"])
    assert best > good > plain > bad
    assert plain == 0.0
    assert judge.name == "VADER"


def test_no_texts_no_scores_and_an_empty_text_has_one():
    assert vader_judge()([]).shape == (0,)
    assert vader_judge()([""]).tolist() == [0.0]
    assert np.isfinite(fit_ridge_judge(*corpus(40, 0))([""])).all()


def test_a_judge_that_loses_a_text_is_an_error():
    with pytest.raises(DataError, match="short: expected one score for each of 2"):
        Judge("short", "points", lambda texts: [0.0])(["a", "b"])


@pytest.mark.parametrize(
    ("texts", "ratings", "said"),
    [
        (["a good film"] * 9, [0.0] * 9, "at least 10 texts"),
        (["a good film"] * 12, [0.0] * 11, "12 texts and ratings of shape"),
        (["a good film"] * 12, [float("nan")] * 12, "NaN"),
        (["!?"] * 12, [0.0] * 12, "hold words"),
    ],
)
def test_wrong_input_is_named(texts, ratings, said):
    with pytest.raises(DataError, match=said):
        fit_ridge_judge(texts, ratings)


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("sklearn.linear_model", lambda: fit_ridge_judge(*corpus(20, 0))),
        ("vaderSentiment.vaderSentiment", vader_judge),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhfjax\[judges\]'"):
        make()
