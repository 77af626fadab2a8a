"""Counts again the rows of committed results that depend on the data alone: people, the baseline, the judges.

    python -m benchmarks.data_rows benchmarks/results/NAME.json…

Needs the prepared movies data (`rlhfjax data prepare movies`). Rows of models, and what judges said of responses, stay.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.collect import rounded
from benchmarks.tables import Result
from rlhfjax.data.datasets import default_data_dir, open_source
from rlhfjax.evaluation.judges import fit_ridge_judge, tfidf_ridge_baseline, vader_judge
from rlhfjax.evaluation.pairwise import RatedTexts
from rlhfjax.evaluation.rows import REWARD_MODEL, accuracy_row, human_rows


def counted(seed: int) -> tuple[Result, Result]:
    """The rows beside the reward model's, and those of the judges, by name, as the evaluate stage computes them."""
    judged, learned, tested = (
        list(open_source("movies/ratings", split, default_data_dir())) for split in ("judge", "rm", "test")
    )
    texts = [row["text"] for row in tested]
    rated = RatedTexts.from_rows(*([row[key] for row in tested] for key in ("ratings", "batch", "heldout")))
    ridge = fit_ridge_judge([row["text"] for row in judged], [np.mean(row["ratings"]) for row in judged], seed)
    baseline = tfidf_ridge_baseline([row["text"] for row in learned], [row["mean_train"] for row in learned], seed)
    found = {scorer.name: accuracy_row(scorer.name, scorer(texts), rated, seed) for scorer in (ridge, vader_judge())}
    rows = [accuracy_row(baseline.name, baseline(texts), rated, seed), found["VADER"], *human_rows(rated, seed)]
    return rounded({row.name: row.values for row in rows}), rounded({row.name: row.values for row in found.values()})


def main(paths: Sequence[str]) -> None:
    """Rewrites the files."""
    for path in map(Path, paths):
        result = json.loads(path.read_text("utf-8"))
        for run in result["runs"]:
            beside, judges = counted(run["seed"])
            run["reward_accuracy"] = {REWARD_MODEL: run["reward_accuracy"][REWARD_MODEL]} | beside
            run["judge_accuracy"] = judges
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
