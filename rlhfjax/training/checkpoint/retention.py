"""Retention: the steps that stay when a new one is saved."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhfjax.plain_json import number


@dataclass(frozen=True)
class Retention:
    """The newest `keep` steps stay, those that `every` divides, and the best.

    With `scored` that is the one with the highest score, with `metric` the one where that metric was highest (of
    `-NAME`: lowest). Both are in the meta of a step.
    """

    keep: int
    every: int | None = None
    scored: bool = False
    metric: str | None = None

    def of(self, directory: Path, steps: Iterable[int]) -> set[int]:
        """Those of `steps` that stay."""
        ordered = sorted(steps)
        kept = set(ordered[-self.keep :]) | {step for step in ordered if self.every and step % self.every == 0}
        best = self.best(directory, ordered), self._best_by_metric(directory, ordered)
        return kept | {step for step in best if step is not None}

    def best(self, directory: Path, steps: Iterable[int]) -> int | None:
        """The step with the highest score, the newest of equal ones; None where scores are not kept."""
        if not self.scored:
            return None
        found = {step: read_figures(directory / str(step))[0] for step in steps}
        return _highest({step: score for step, score in found.items() if score is not None})

    def figures(self, score: float | None, metrics: Mapping[str, float]) -> dict[str, object]:
        """What a step's meta says of how good it is."""
        name = (self.metric or "").removeprefix("-")
        return {"score": score, "metrics": {name: float(metrics[name])} if name in metrics else {}}

    def _best_by_metric(self, directory: Path, steps: Iterable[int]) -> int | None:
        if self.metric is None:
            return None
        name, sign = self.metric.removeprefix("-"), -1.0 if self.metric.startswith("-") else 1.0
        found = {step: read_figures(directory / str(step))[1].get(name) for step in steps}
        return _highest({step: sign * value for step, value in found.items() if value is not None})


def read_figures(step_dir: Path) -> tuple[float | None, Mapping[str, float]]:
    """Score and metrics of a step; nothing of one that cannot be read, which is for whoever restores it to say."""
    try:
        meta = json.loads((step_dir / "meta" / "metadata").read_text(encoding="utf-8"))
        older = step_dir / "metrics" / "metrics"  # where format 1 has the score
        if "metrics" not in meta and older.is_file():
            meta |= json.loads(older.read_text(encoding="utf-8"))
        metrics = {name: number(value) for name, value in (meta.get("metrics") or {}).items()}
        return number(meta.get("score")), {name: value for name, value in metrics.items() if value is not None}
    except (OSError, ValueError, AttributeError, TypeError):
        return None, {}


def _highest(figures: Mapping[int, float]) -> int | None:
    """The step of the highest figure, the newest of equal ones; NaN is below every number."""
    return max(
        figures, key=lambda step: (-math.inf if math.isnan(figures[step]) else figures[step], step), default=None
    )
