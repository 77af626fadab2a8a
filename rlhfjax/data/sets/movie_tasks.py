"""Rated snippets as batches and labelers, and the tasks made of them: demonstrations and K-way rankings."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rlhfjax.data.sets.movie_archives import Snippet

INSTRUCTION = "Review:"
SEED = 0
BATCH_SIZE = 30
MIN_K, MAX_K = 4, 9
ACROSS_K, ACROSS_ROUNDS, ELSEWHERE_ROUNDS = 9, 4, 2
_RM_SHARE, _JUDGE_SHARE, _VALIDATION_SHARE = 0.50, 0.35, 0.10
_MIN_SPREAD, _MIN_AGREEMENT = 0.3, 0.3
_PROMPT_WORDS, _MIN_COMPLETION_WORDS = (4, 5, 6), 3
_HELDOUT_EVERY = 5

T = TypeVar("T", int, str)


@dataclass(frozen=True)
class Batch:
    """Snippets rated by the same people. Column j of `scores` is one labeler; `heldout` and `dropped` mark columns."""

    number: int
    snippets: tuple[Snippet, ...]
    scores: np.ndarray
    heldout: np.ndarray
    dropped: np.ndarray

    @property
    def trained(self) -> np.ndarray:
        """The columns that training may see: neither held out nor dropped."""
        return ~self.heldout & ~self.dropped

    @property
    def train_means(self) -> np.ndarray:
        """Each snippet's mean rating over the training labelers."""
        return self.scores[:, self.trained].mean(axis=1)


@dataclass(frozen=True)
class Ratings:
    """All batches, assigned to the splits rm (reward model, and all other training), judge and test."""

    splits: dict[str, tuple[Batch, ...]]

    @classmethod
    def of(cls, snippets: Sequence[Snippet]) -> "Ratings":
        """Splits the batches at random and drops repeated texts, so that none appears in two splits."""
        by_number: dict[int, list[Snippet]] = {}
        for snippet in snippets:
            by_number.setdefault((snippet.number - 1) // BATCH_SIZE, []).append(snippet)
        order = shuffled(by_number, "split")
        first, second = round(_RM_SHARE * len(order)), round((_RM_SHARE + _JUDGE_SHARE) * len(order))
        numbers = {"rm": order[:first], "judge": order[first:second], "test": order[second:]}
        seen: set[str] = set()
        return cls(
            {
                split: tuple(_batch(number, by_number[number], seen) for number in sorted(members))
                for split, members in numbers.items()
            }
        )

    def batches(self, split: str) -> tuple[Batch, ...]:
        """The batches of one split, in source order."""
        return self.splits[split]

    def snippets(self, split: str) -> list[Snippet]:
        """The snippets of one split, in source order."""
        return [snippet for batch in self.splits[split] for snippet in batch.snippets]

    def reward_batches(self) -> tuple[list[Batch], list[Batch]]:
        """The rm batches, as those that reward models learn from and those that they are validated on."""
        batches = self.splits["rm"]
        checked = set(
            shuffled([batch.number for batch in batches], "validation")[: round(_VALIDATION_SHARE * len(batches))]
        )
        fit = [batch for batch in batches if batch.number not in checked]
        return fit, [batch for batch in batches if batch.number in checked]


def shuffled(items: Iterable[T], *salt: int | str) -> list[T]:
    """The items in an order given by SHA-256 of (seed, salt, item): random-looking, the same everywhere."""
    return sorted(items, key=lambda item: _hash(*salt, item))


def _hash(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, (SEED, *parts))).encode()).digest()[:8], "big")


def _batch(number: int, snippets: Sequence[Snippet], seen: set[str]) -> Batch:
    kept = []
    for row, snippet in enumerate(snippets):
        if snippet.text.lower() not in seen:
            seen.add(snippet.text.lower())
            kept.append(row)
    scores = np.array([snippet.ratings for snippet in snippets], np.int64)
    columns = scores.shape[1]
    heldout = np.arange(columns) % _HELDOUT_EVERY == _HELDOUT_EVERY - 1
    dropped = np.array([not heldout[j] and _careless(scores, j) for j in range(columns)])
    return Batch(number, tuple(snippets[row] for row in kept), scores[kept], heldout, dropped)


def _careless(scores: np.ndarray, column: int) -> bool:
    """Whether a labeler rates nearly everything the same, or with no relation to the others in the batch."""
    own, others = scores[:, column], np.delete(scores, column, axis=1).mean(axis=1)
    if own.std() < _MIN_SPREAD:
        return True
    return bool(np.corrcoef(own, others)[0, 1] < _MIN_AGREEMENT)


def demonstration(snippet: Snippet) -> dict[str, Any] | None:
    """The first 4 to 6 words of a review to complete, and the rest as the human's completion; None if too short."""
    words = snippet.text.split()
    shown = _PROMPT_WORDS[_hash("prompt", snippet.number) % len(_PROMPT_WORDS)]
    if len(words) < shown + _MIN_COMPLETION_WORDS:
        return None
    return {
        "prompt": f"{INSTRUCTION} {' '.join(words[:shown])}",
        "completion": " " + " ".join(words[shown:]),  # the text is prompt + completion, space included
        "prompt_id": str(snippet.number),
    }


def rated_texts(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Every snippet with all the ratings it got, and which columns are held-out labelers or dropped ones."""
    for batch in batches:
        for snippet, mean, scores in zip(batch.snippets, batch.train_means, batch.scores, strict=True):
            yield {
                "text": snippet.text,
                "text_id": str(snippet.number),
                "batch": batch.number,
                "mean_train": float(np.float32(mean)),  # as it is stored
                "ratings": scores.tolist(),
                "heldout": batch.heldout.tolist(),
                "dropped": batch.dropped.tolist(),
            }


def labeler_rankings(batches: Sequence[Batch], *, heldout: bool) -> Iterator[dict[str, Any]]:
    """Rankings of K = 4 to 9 texts of one batch by one labeler each; every labeler's batch is cut differently."""
    for batch in batches:
        for column in np.flatnonzero(batch.heldout if heldout else batch.trained).tolist():
            labeler = f"{batch.number:03d}-{column:02d}"
            rows = shuffled(range(len(batch.snippets)), "cut", labeler)
            for group, size in enumerate(_group_sizes(len(rows), labeler)):
                chosen, rows = rows[:size], rows[size:]
                yield from _comparison(
                    [batch.snippets[row].text for row in chosen],
                    batch.scores[chosen, column],
                    labeler_id=labeler,
                    prompt_id=f"{labeler}-{group}",
                )


def across_rankings(batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
    """Rankings of 9 texts of 9 different batches by their mean training rating; a text appears in about 4 of them.

    In each round every batch is shuffled, and the i-th texts of all batches are dealt into groups of 9; those that
    do not fill a group sit this round out.
    """
    by_number = {batch.number: batch for batch in batches}
    means = {batch.number: batch.train_means for batch in batches}
    for turn in range(ACROSS_ROUNDS):
        orders = {b.number: shuffled(range(len(b.snippets)), "across", turn, b.number) for b in batches}
        for layer in range(max(map(len, orders.values()))):
            here = shuffled([number for number in orders if layer < len(orders[number])], "deal", turn, layer)
            for start in range(0, len(here) - ACROSS_K + 1, ACROSS_K):
                chosen = [(number, orders[number][layer]) for number in here[start : start + ACROSS_K]]
                yield from _comparison(
                    [by_number[number].snippets[row].text for number, row in chosen],
                    np.array([means[number][row] for number, row in chosen]),
                    labeler_id="mean",
                    prompt_id=f"across-{turn}-{layer}-{start // ACROSS_K}",
                )


def elsewhere_rankings(snippets: Sequence[Snippet], taken: set[str]) -> Iterator[dict[str, Any]]:
    """Rankings of 9 texts that are no film reviews by the mean of all their ratings; a text appears in 2 of them.

    `taken` holds the lower-cased texts that some split of the film reviews has.
    """
    usable = {snippet.text.lower(): snippet for snippet in snippets if snippet.text.lower() not in taken}
    for turn in range(ELSEWHERE_ROUNDS):
        order = shuffled(usable, "elsewhere", turn)
        for group, start in enumerate(range(0, len(order) - ACROSS_K + 1, ACROSS_K)):
            chosen = [usable[text] for text in order[start : start + ACROSS_K]]
            yield from _comparison(
                [snippet.text for snippet in chosen],
                np.array([np.mean(snippet.ratings) for snippet in chosen]),
                labeler_id="mean",
                prompt_id=f"elsewhere-{turn}-{group}",
            )


def _group_sizes(total: int, labeler: str) -> Iterator[int]:
    """Sizes of 4 to 9 that sum to `total`: at random, each leaving enough for the groups still to come."""
    fewest, most = -(-total // MAX_K), total // MIN_K
    groups = fewest + _hash("groups", labeler) % (most - fewest + 1) if most >= fewest else 0
    for left in range(groups, 0, -1):
        low, high = max(MIN_K, total - MAX_K * (left - 1)), min(MAX_K, total - MIN_K * (left - 1))
        size = low + _hash("size", labeler, left) % (high - low + 1)
        total -= size
        yield size


def _comparison(texts: list[str], scores: np.ndarray, **ids: str) -> Iterator[dict[str, Any]]:
    """One comparison, rank 1 for the highest score, equal scores tied, no gaps; nothing when all of them tie."""
    ranks = np.unique(-scores, return_inverse=True)[1] + 1
    if ranks.max() > 1:
        yield {"prompt": INSTRUCTION, "responses": [f" {text}" for text in texts], "ranks": ranks.tolist(), **ids}
