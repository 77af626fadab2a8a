"""Pairwise accuracy: how well scores order texts that people rated, and how well people order them for each other.

A labeler who rated two texts differently has said which one is better. A scorer (a reward model, a judge, another
labeler) agrees when it orders the two alike. Texts come in batches rated by the same few people, so a pair inside a
batch is one person's comparison, as in Ouyang et al. 2022, and the bootstrap draws whole batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from rlhfjax.errors import DataError
from rlhfjax.evaluation.statistics import Interval, percentile_interval

Reference = Literal["heldout", "labelers", "mean"]
Pairs = Literal["within", "across"]


@dataclass(frozen=True)
class RatedTexts:
    """N texts with up to J ratings each; a labeler is one column of one batch.

    `ratings` [N, J] is NaN where a batch has fewer than J labelers; `batches` [N] says who rated with whom;
    `heldout` [N, J] marks the columns whose ratings no model was trained on.
    """

    ratings: Float[np.ndarray, "N J"]
    batches: Int[np.ndarray, "N"]
    heldout: Bool[np.ndarray, "N J"]

    @classmethod
    def from_rows(
        cls, ratings: Sequence[ArrayLike], batches: ArrayLike, heldout: Sequence[ArrayLike] | None = None
    ) -> "RatedTexts":
        """Texts of any number of labelers each, padded on the right. Raises DataError when lengths disagree."""
        rows = [np.asarray(row, np.float64) for row in ratings]
        flags = [np.zeros(row.size, bool) for row in rows]
        if heldout is not None:
            flags = [np.asarray(row, bool) for row in heldout]
        ids = np.asarray(batches)
        if not rows or not len(rows) == len(flags) == len(ids):
            raise DataError(
                f"expected one batch and one row of held-out flags per text, got {len(ids)} and {len(flags)} "
                f"for {len(rows)} texts"
            )
        if min(row.size for row in rows) == 0:
            raise DataError(f"expected a rating per text or more, got none for text {[r.size for r in rows].index(0)}")
        width = max(row.size for row in rows)
        padded, marks = np.full((len(rows), width), np.nan), np.zeros((len(rows), width), bool)
        for i, (row, flag) in enumerate(zip(rows, flags, strict=True)):
            if row.shape != flag.shape:
                raise DataError(f"text {i}: expected a flag for each of its {row.size} ratings, got {flag.size}")
            padded[i, : row.size], marks[i, : row.size] = row, flag
        return cls(padded, ids, marks)

    @classmethod
    def from_comparisons(cls, ranks: Sequence[ArrayLike]) -> "RatedTexts":
        """The candidates of ranked comparisons (rank 1 best, equal = tie): a comparison is a batch of one labeler.

        The scores that go with it are those of all candidates in the same order, one comparison after the other.
        """
        rows = [np.atleast_1d(np.asarray(row, np.float64)) for row in ranks]
        batches = np.repeat(np.arange(len(rows)), [row.size for row in rows])
        return cls.from_rows([[-rank] for row in rows for rank in row], batches)

    @property
    def means(self) -> Float[np.ndarray, "N"]:
        """The mean of all labelers of a text, in rating points."""
        return np.nanmean(self.ratings, axis=1)

    def members(self) -> list[Int[np.ndarray, "M"]]:
        """The rows of each batch."""
        return [np.flatnonzero(self.batches == batch) for batch in np.unique(self.batches)]


class HumanAgreement(NamedTuple):
    """How well one labeler, taken as a scorer, orders the pairs that scorers are asked; None where no pair is left.

    Within a batch for each held-out labeler, for the mean of the other labelers, and for pairs that this mean holds
    clearly different; across batches for clearly different pairs, where the two ratings come from two people.
    """

    labeler: Interval | None
    mean: Interval | None
    clear: Interval | None
    across: Interval | None


def pairwise_accuracy(
    scores: ArrayLike,
    texts: RatedTexts,
    against: Reference = "heldout",
    pairs: Pairs = "within",
    min_difference: float = 0.0,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Int[np.ndarray, "G"] | None = None,
) -> Interval | None:
    """The share of rated pairs that the scores order as the people did; a tie of the scores counts one half.

    `mean(½ (1 + sign(s_a − s_b) sign(r_a − r_b)))` over pairs with `|r_a − r_b| > min_difference` rating points: once
    for each held-out labeler (`against="heldout"`), for each labeler ("labelers"), or once by the mean rating ("mean").
    `pairs="within"` takes both texts from one batch, "across" from two, where only means compare. The interval draws
    whole batches, and those of one cluster together, where `clusters` numbers that of each batch (from 0; "within"
    alone). None when there is no such pair. Raises DataError unless there is one score, a number, for each text.
    Source: Ouyang et al. 2022, section 3.5.
    """
    values = np.asarray(scores, np.float64)
    if values.shape != texts.batches.shape or np.isnan(values).any():
        raise DataError(
            f"expected {texts.batches.size} scores that are numbers, "
            f"got shape {values.shape} with {np.isnan(values).sum()} NaN"
        )
    if pairs == "across" and against != "mean":
        raise DataError(f"expected against='mean' across batches, where no labeler saw both texts, got {against!r}")
    tally = _tally(values[:, None], _reference(texts, against), texts.members(), pairs, min_difference)
    return (tally if clusters is None else tally.by_cluster(clusters)).interval(level, resamples, seed)


def human_agreement(
    texts: RatedTexts, clear_difference: float = 0.5, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> HumanAgreement:
    """Each labeler as a scorer of the texts, by the rule of `pairwise_accuracy`: a tie of the labeler counts one half.

    Nobody is compared with themselves: a held-out labeler is ordered by the other labelers of the batch, and the mean
    is that of all labelers but the one who scores. Intervals draw batches. `clear_difference` is in rating points.
    """
    ratings, members, others = texts.ratings, texts.members(), _others(texts)
    heldout, one_to_one = np.where(texts.heldout, ratings, np.nan), _Tally.zeros(len(members), "within")
    for shift in range(1, ratings.shape[1]):  # every labeler beside every other one, once
        one_to_one += _tally(np.roll(ratings, shift, axis=1), heldout, members, "within", 0.0)
    tallies = [
        one_to_one,
        _tally(ratings, others, members, "within", 0.0),
        _tally(ratings, others, members, "within", clear_difference),
        _tally(ratings, others, members, "across", clear_difference),
    ]
    return HumanAgreement(*(tally.interval(level, resamples, seed) for tally in tallies))


def crowd_agreement(texts: RatedTexts, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """The mean of all other labelers as a scorer of the texts, for each held-out labeler within a batch.

    It knows of each text what no text shows, what other people gave it, so a scorer of texts can't be expected above
    it. None without held-out labelers who have others beside them.
    """
    heldout = np.where(texts.heldout, texts.ratings, np.nan)
    return _tally(_others(texts), heldout, texts.members(), "within", 0.0).interval(level, resamples, seed)


def _others(texts: RatedTexts) -> Float[np.ndarray, "N J"]:
    """The mean rating of a text by all its labelers but the one of the column; NaN where there is no other."""
    present = (~np.isnan(texts.ratings)).sum(axis=1, keepdims=True)
    rest = np.nansum(texts.ratings, axis=1, keepdims=True) - texts.ratings
    return rest / np.where(present > 1, present - 1.0, np.nan)


@dataclass
class _Tally:
    """Pairs ordered alike and pairs compared: per batch [G], or per pair of batches [G, G] above the diagonal."""

    correct: np.ndarray
    total: np.ndarray

    @classmethod
    def zeros(cls, groups: int, pairs: Pairs) -> "_Tally":
        shape = (groups,) if pairs == "within" else (groups, groups)
        return cls(np.zeros(shape), np.zeros(shape))

    def __iadd__(self, other: "_Tally") -> "_Tally":
        self.correct += other.correct
        self.total += other.total
        return self

    def by_cluster(self, clusters: Int[np.ndarray, "G"]) -> "_Tally":
        """The counts of each cluster of batches."""
        return _Tally(np.bincount(clusters, self.correct), np.bincount(clusters, self.total))

    def interval(self, level: float, resamples: int, seed: int) -> Interval | None:
        """Draws batches; a pair across two batches weighs the product of how often each was drawn."""
        if self.total.sum() == 0:
            return None
        groups = len(self.total)
        drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1.0 / groups), resamples).astype(float)

        def weighted(counts: np.ndarray) -> np.ndarray:
            return drawn @ counts if counts.ndim == 1 else ((drawn @ counts) * drawn).sum(axis=1)

        total = weighted(self.total)
        shares = np.divide(weighted(self.correct), total, out=np.full(resamples, np.nan), where=total > 0)
        return percentile_interval(self.correct.sum() / self.total.sum(), shares, level)


def _reference(texts: RatedTexts, against: Reference) -> Float[np.ndarray, "N C"]:
    if against == "mean":
        return texts.means[:, None]
    if against == "labelers":
        return texts.ratings
    columns = np.where(texts.heldout, texts.ratings, np.nan)
    return columns[:, ~np.isnan(columns).all(axis=0)]


def _tally(
    predictor: Float[np.ndarray, "N C"],
    reference: Float[np.ndarray, "N C"],
    members: list[Int[np.ndarray, "M"]],
    pairs: Pairs,
    min_difference: float,
) -> _Tally:
    """Counts pairs a < b whose reference differs by more than `min_difference`, by column (one side may broadcast)."""
    tally = _Tally.zeros(len(members), pairs)
    for first, left in enumerate(members):
        for second in [first] if pairs == "within" else range(first + 1, len(members)):
            right = members[second]
            wanted = reference[left][:, None] - reference[right][None]
            given = np.sign(predictor[left][:, None] - predictor[right][None])
            kept = np.abs(wanted) > min_difference  # false for NaN, where a labeler is absent
            if pairs == "within":  # a pair once, and no text with itself
                kept &= np.triu(np.ones(kept.shape[:2], bool), 1)[:, :, None]
            kept = kept & ~np.isnan(given)  # where the predictor is a labeler who is absent
            agreement = np.where(kept, given * np.sign(wanted), 0.0)  # 0, which counts one half, where it ties
            cell = first if pairs == "within" else (first, second)
            tally.total[cell] = kept.sum()
            tally.correct[cell] = (agreement.sum() + kept.sum()) / 2.0
    return tally
