"""Accuracies: how often reward model, baselines, judges and people order texts as held-out people did."""

from dataclasses import dataclass

import numpy as np

from rlhfjax.config import schema
from rlhfjax.data.datasets import open_source
from rlhfjax.data.pipeline import Reader
from rlhfjax.evaluation.calibration import calibration
from rlhfjax.evaluation.judges import Judge, fit_ridge_judge, tfidf_ridge_baseline, vader_judge
from rlhfjax.evaluation.pairwise import RatedTexts
from rlhfjax.evaluation.results import AccuracyRow, Calibration
from rlhfjax.evaluation.rows import REWARD_MODEL, accuracy_row, comparison_row, human_rows
from rlhfjax.stages.measures.reward_scores import RewardScorer
from rlhfjax.text.chat import beginning


@dataclass(frozen=True)
class Accuracies:
    """Of reward model, baseline, lexicon and people on the same held-out pairs; of the judges; how calibrated it is."""

    reward: list[AccuracyRow]
    of_judges: list[AccuracyRow]
    judges: list[Judge]
    calibration: Calibration | None


def accuracies_of(c: schema.Evaluate, reader: Reader, scorer: RewardScorer | None) -> Accuracies:
    """Whatever there are ratings and comparisons for; without a `scorer` no reward model is among them."""
    seed, judges, accuracy, judge_accuracy, calibrated = reader.seed, [], [], [], None
    if c.ratings:
        judged, based, tested = (
            list(open_source(entry.source, entry.split, reader.data_dir, kind="rated_text"))
            for entry in (c.ratings.judge, c.ratings.baseline, c.ratings.test)
        )
        texts = [row["text"] for row in tested]
        rated = RatedTexts.from_rows(
            [row["ratings"] for row in tested], [row["batch"] for row in tested], [row["heldout"] for row in tested]
        )
        ridge = fit_ridge_judge([row["text"] for row in judged], [np.mean(row["ratings"]) for row in judged], seed)
        baseline = tfidf_ridge_baseline([row["text"] for row in based], [row["mean_train"] for row in based], seed)
        lexicon = vader_judge()
        judges = [ridge, lexicon]
        judge_accuracy = [accuracy_row(judge.name, judge(texts), rated, seed) for judge in judges]
        if scorer:
            t = reader.tokenizer
            prefix = (*beginning(t), *t.encode(c.ratings.prefix))
            answers = [(*t.encode_continuation(f" {text}", after=prefix[-1]), t.eos_id) for text in texts]
            scores = scorer([prefix] * len(texts), answers)
            accuracy = [accuracy_row(REWARD_MODEL, scores, rated, seed)]
            calibrated = calibration(scores, rated, scorer.gain)
        accuracy += [
            accuracy_row(baseline.name, baseline(texts), rated, seed),
            judge_accuracy[1],
            *human_rows(rated, seed),
        ]
    if scorer and c.comparisons:
        compared = reader.comparison_ids(c.comparisons, c.batch)
        pairs = [(prompt, response) for prompt, responses, _ in compared for response in responses]
        scores = scorer([prompt for prompt, _ in pairs], [response for _, response in pairs])
        asked, ranks = [prompt for prompt, *_ in compared], [ranks for *_, ranks in compared]
        row = comparison_row(REWARD_MODEL, scores, ranks, asked, seed)
        others = [other for other in accuracy if other.name != REWARD_MODEL]
        rated_values = next((other.values for other in accuracy if other.name == REWARD_MODEL), {})
        accuracy = [AccuracyRow(REWARD_MODEL, rated_values | row.values), *others]
    return Accuracies(accuracy, judge_accuracy, judges, calibrated)
