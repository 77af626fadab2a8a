"""The rows of an evaluation: scorers and people under one set of measures, a judge's verdict, a policy's responses."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from rlhfjax.errors import DataError
from rlhfjax.evaluation.diversity import distinct_n, distinct_without_each, repetition_counts
from rlhfjax.evaluation.judges import Judge
from rlhfjax.evaluation.pairwise import (
    Pairs,
    RatedTexts,
    Reference,
    crowd_agreement,
    human_agreement,
    pairwise_accuracy,
)
from rlhfjax.evaluation.results import AccuracyRow, PolicyRow, WinRow
from rlhfjax.evaluation.statistics import jackknife_interval, ratio_interval, win_rate

CLEAR_DIFFERENCE = 0.5  # rating points: below this, people themselves disagree about the order

REWARD_MODEL = "reward model"  # the name of its row, which the summary looks for

MEASURES: dict[str, str] = {
    "within_heldout": "One batch, each held-out labeler",
    "within_mean": "One batch, mean of all labelers",
    "within_clear": "One batch, means over 0.5 apart",
    "across_clear": "Two batches, means over 0.5 apart",
    "comparisons": "Held-out comparisons",
}

_ASKED: dict[str, tuple[Reference, Pairs, float]] = {
    "within_heldout": ("heldout", "within", 0.0),
    "within_mean": ("mean", "within", 0.0),
    "within_clear": ("mean", "within", CLEAR_DIFFERENCE),
    "across_clear": ("mean", "across", CLEAR_DIFFERENCE),
}


def accuracy_row(name: str, scores: ArrayLike, texts: RatedTexts, seed: int = 0) -> AccuracyRow:
    """A scorer's agreement with the ratings under the four measures; None where the texts hold no such pair.

    Raises DataError unless there is one score, a number, for each text.
    """
    return AccuracyRow(
        name,
        {
            measure: pairwise_accuracy(scores, texts, against, pairs, difference, seed=seed)
            for measure, (against, pairs, difference) in _ASKED.items()
        },
    )


def human_rows(texts: RatedTexts, seed: int = 0) -> list[AccuracyRow]:
    """What people reach under the same measures: one labeler as the scorer, and the mean of all the others."""
    one = human_agreement(texts, CLEAR_DIFFERENCE, seed=seed)
    return [
        AccuracyRow(
            "one labeler",
            {
                "within_heldout": one.labeler,
                "within_mean": one.mean,
                "within_clear": one.clear,
                "across_clear": one.across,
            },
        ),
        AccuracyRow("mean of the other labelers", {"within_heldout": crowd_agreement(texts, seed=seed)}),
    ]


def comparison_row(
    name: str,
    scores: ArrayLike,
    ranks: Sequence[Sequence[int]],
    prompts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> AccuracyRow:
    """A scorer's agreement with ranked comparisons; `scores` lists all candidates, one comparison after the other.

    With several comparisons of a prompt, `prompts` names the prompt of each so that the interval draws prompts. None
    where no two candidates differ in rank. Raises DataError unless there is one score a candidate.
    """
    texts, clusters = RatedTexts.from_comparisons(ranks), None if prompts is None else numbered(prompts)
    interval = pairwise_accuracy(scores, texts, "labelers", seed=seed, clusters=clusters)
    return AccuracyRow(name, {"comparisons": interval})


def numbered(prompts: Sequence[Hashable]) -> Int[np.ndarray, "N"]:
    """A number for each prompt, the same for equal ones, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], np.int64)


def win_row(
    judge: Judge,
    policy: str,
    policy_texts: Sequence[str],
    baseline: str,
    baseline_texts: Sequence[str],
    prompts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> WinRow:
    """One judge's verdict on two policies; text i of both answers the same prompt.

    With several responses per prompt, `prompts` names the prompt of each so that the interval draws prompts. Raises
    DataError when there are no texts or not equally many.
    """
    ours, theirs = judge(policy_texts), judge(baseline_texts)
    win = win_rate(ours, theirs, None if prompts is None else numbered(prompts), seed=seed)
    return WinRow(
        judge.name, policy, baseline, win, float(ours.mean()), float(theirs.mean()), float((ours == theirs).mean())
    )


def policy_row(
    name: str,
    responses: Sequence[Sequence[Hashable]],
    ended: ArrayLike,
    words: Sequence[Sequence[Hashable]] | None = None,
    kl: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    reward: ArrayLike | None = None,
    prompts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> PolicyRow:
    """Length of the responses in tokens, diversity, the share that ended by themselves (`ended`, bools), and intervals.

    `kl`, `entropy` (both summed over a response, nats) and `reward` have one number per response. Diversity is counted
    over `words` where they are given, as Li et al. 2016 do. `prompts` says which responses answer the same prompt:
    intervals draw prompts. Raises DataError without responses or unless all have one element for each.
    """
    finished = np.asarray(ended, bool)
    if finished.shape != (len(responses),):
        raise DataError(f"{name}: expected a flag for each of {len(responses)} responses, got shape {finished.shape}")
    lengths = np.array([len(response) for response in responses])
    groups = None if prompts is None else numbered(prompts)
    ratios = {
        "length": (lengths, None),
        "eos_rate": (finished, None),
        "repetition": repetition_counts(words or responses),
        "kl": (kl, None),
        "entropy": (entropy, lengths),
        "reward": (reward, None),
    }
    found = {
        key: ratio_interval(above, below, groups, seed=seed)
        for key, (above, below) in ratios.items()
        if above is not None
    }
    for n in (1, 2):
        without = distinct_without_each(words or responses, n, None if groups is None else groups.tolist())
        found[f"distinct_{n}"] = jackknife_interval(distinct_n(words or responses, n), without)
    figures = {key: interval.estimate for key, interval in found.items()}
    asked = None if prompts is None else len(set(prompts))
    return PolicyRow(name=name, responses=len(responses), prompts=asked, **figures, intervals=found)
