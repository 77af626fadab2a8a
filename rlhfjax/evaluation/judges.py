"""Judges that score a text without hearing of the policy or its reward model.

A policy is optimised against its reward model, so that model cannot say whether the text got better (Gao et al. 2023).
Two judges from different sources are used side by side: a regression on human ratings of texts that nothing else was
trained on, and a word list made by other people. Both need the extra `judges`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from rlhfjax.errors import ConfigError, DataError

_ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_FOLDS = 3
_FEWEST_TEXTS = 10


@dataclass(frozen=True)
class Judge:
    """A named score of texts: higher is better, in the unit that `unit` names."""

    name: str
    unit: str
    score: Callable[[Sequence[str]], ArrayLike]

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        """One score per text. Texts have the form of those the judge was fitted on (no instruction, no markers)."""
        scores = np.asarray(self.score(texts), np.float64) if len(texts) else np.zeros(0)
        if scores.shape != (len(texts),):
            raise DataError(f"judge {self.name}: expected one score for each of {len(texts)} texts, got {scores.shape}")
        return scores


def fit_ridge_judge(texts: Sequence[str], mean_ratings: ArrayLike, seed: int = 0, name: str = "ridge judge") -> Judge:
    """Ridge regression of mean human ratings on TF-IDF n-grams, in rating points.

    `argmin_w Σ (wᵀ φ(x) + b − r̄(x))² + α|w|²` with φ the TF-IDF of words (1–2) and of character n-grams (3–5), α by
    three-fold cross-validation inside the given texts (`seed` shuffles them). Fit it on texts and labelers that the
    reward model and the policy never saw. Raises DataError for fewer than 10 texts, ConfigError without scikit-learn.
    """
    return _fit_tfidf_ridge(texts, mean_ratings, seed, name)


def tfidf_ridge_baseline(
    texts: Sequence[str], mean_train_ratings: ArrayLike, seed: int = 0, name: str = "TF-IDF + ridge"
) -> Judge:
    """The same regression as a baseline for the reward model, in rating points.

    Fit it on exactly what the reward model learns from: its texts, and the mean of its training labelers. A reward
    model that does not order held-out pairs better than this has learned no more than words. Errors as above.
    """
    return _fit_tfidf_ridge(texts, mean_train_ratings, seed, name)


def vader_judge(name: str = "VADER") -> Judge:
    """The compound sentiment of the VADER word list, in [−1, 1]; nothing is fitted.

    Raises ConfigError without vaderSentiment. Source: Hutto and Gilbert 2014.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise _missing("vaderSentiment") from error
    analyzer: Any = SentimentIntensityAnalyzer()
    return Judge(name, "compound", lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts])


def _fit_tfidf_ridge(texts: Sequence[str], ratings: ArrayLike, seed: int, name: str) -> Judge:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import GridSearchCV, KFold
        from sklearn.pipeline import make_union
    except ImportError as error:
        raise _missing("scikit-learn") from error
    targets = np.asarray(ratings, np.float64)
    if targets.shape != (len(texts),) or len(texts) < _FEWEST_TEXTS or np.isnan(targets).any():
        raise DataError(
            f"{name}: expected at least {_FEWEST_TEXTS} texts with one mean rating each, "
            f"got {len(texts)} texts and ratings of shape {targets.shape} (or NaN among them)"
        )
    features: Any = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=2, sublinear_tf=True),
    )
    try:
        matrix = features.fit_transform(texts)
    except ValueError as error:  # scikit-learn says so when no word is left
        raise DataError(
            f"{name}: expected texts that hold words, got none usable in {len(texts)} texts: {error}"
        ) from error
    folds = KFold(_FOLDS, shuffle=True, random_state=seed)  # files are often sorted by rating
    search = GridSearchCV(
        Ridge(solver="sparse_cg", tol=1e-3), {"alpha": _ALPHAS}, cv=folds, scoring="neg_mean_squared_error"
    )
    ridge: Any = search.fit(matrix, targets).best_estimator_
    return Judge(name, "rating", lambda batch: ridge.predict(features.transform(batch)))


def require_judges() -> None:
    """Raises ConfigError where the extra `judges` is not installed."""
    for package, module in (("scikit-learn", "sklearn"), ("vaderSentiment", "vaderSentiment")):
        if importlib.util.find_spec(module) is None:
            raise _missing(package)


def _missing(package: str) -> ConfigError:
    return ConfigError(f"this judge needs {package}, which is not installed; run: pip install 'rlhfjax[judges]'")
